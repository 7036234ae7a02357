package vsock

import (
	"io"
	"net"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// Addr is a vsock address.
type Addr struct{ CID, Port uint32 }

// Network implements net.Addr.
func (Addr) Network() string { return "vsock" }

func (a Addr) String() string {
	return strconv.FormatUint(uint64(a.CID), 10) + ":" + strconv.FormatUint(uint64(a.Port), 10)
}

// socket is a stream whose calls block, as Winsock's do. Close ends them.
type socket interface {
	Send(b []byte) (int, error)
	Recv(b []byte) (int, error) // 0 and no error: the other end has closed
	Close() error
}

// blockingConn makes a net.Conn of a socket. A blocking call cannot be left, so
// a deadline that passes closes the connection: later calls, whatever the
// deadline, fail too. The guest link resets itself then in any case.
type blockingConn struct {
	s       socket
	remote  Addr
	expired atomic.Bool
	once    sync.Once
	err     error

	mu          sync.Mutex
	read, write *time.Timer
}

var _ net.Conn = (*blockingConn)(nil)

func (c *blockingConn) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	n, err := c.s.Recv(b)
	switch {
	case c.expired.Load():
		return 0, os.ErrDeadlineExceeded
	case err == nil && n == 0:
		return 0, io.EOF
	}
	return n, err
}

func (c *blockingConn) Write(b []byte) (int, error) {
	sent := 0
	for sent < len(b) {
		n, err := c.s.Send(b[sent:])
		sent += n
		switch {
		case c.expired.Load():
			return sent, os.ErrDeadlineExceeded
		case err != nil:
			return sent, err
		case n == 0:
			return sent, io.ErrShortWrite
		}
	}
	return sent, nil
}

// Close implements net.Conn; it ends Read and Write.
func (c *blockingConn) Close() error {
	c.once.Do(func() {
		c.SetDeadline(time.Time{})
		c.err = c.s.Close()
	})
	return c.err
}

func (c *blockingConn) LocalAddr() net.Addr  { return Addr{} }
func (c *blockingConn) RemoteAddr() net.Addr { return c.remote }

// SetDeadline implements net.Conn.
func (c *blockingConn) SetDeadline(t time.Time) error {
	c.set(&c.read, t)
	c.set(&c.write, t)
	return nil
}

// SetReadDeadline implements net.Conn.
func (c *blockingConn) SetReadDeadline(t time.Time) error { c.set(&c.read, t); return nil }

// SetWriteDeadline implements net.Conn.
func (c *blockingConn) SetWriteDeadline(t time.Time) error { c.set(&c.write, t); return nil }

func (c *blockingConn) set(timer **time.Timer, t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if *timer != nil {
		(*timer).Stop()
		*timer = nil
	}
	if !t.IsZero() {
		*timer = time.AfterFunc(time.Until(t), func() {
			c.expired.Store(true)
			c.Close()
		})
	}
}
