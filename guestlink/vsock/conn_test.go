package vsock

import (
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"
)

// pipeSocket makes a socket of one end of a pipe.
type pipeSocket struct{ net.Conn }

func (p pipeSocket) Send(b []byte) (int, error) { return p.Write(b[:min(len(b), 3)]) }

func (p pipeSocket) Recv(b []byte) (int, error) {
	n, err := p.Read(b)
	if err == io.EOF {
		err = nil
	}
	return n, err
}

func TestBlockingConn(t *testing.T) {
	a, b := net.Pipe()
	c := &blockingConn{s: pipeSocket{a}, remote: Addr{2, 1024}}
	go func() {
		buf := make([]byte, 10)
		io.ReadFull(b, buf)
		b.Write(buf)
		b.Close()
	}()
	c.SetDeadline(time.Now().Add(time.Minute))
	if n, err := c.Write([]byte("0123456789")); n != 10 || err != nil {
		t.Fatalf("%d, %v", n, err)
	}
	c.SetDeadline(time.Time{})
	buf := make([]byte, 10)
	if _, err := io.ReadFull(c, buf); err != nil || string(buf) != "0123456789" {
		t.Fatalf("%q, %v", buf, err)
	}
	if _, err := c.Read(buf); err != io.EOF {
		t.Errorf("at the end: %v", err)
	}
	if c.RemoteAddr().String() != "2:1024" || c.Close() != nil || c.Close() != nil {
		t.Error("address or close")
	}
}

func TestBlockingConnDeadlines(t *testing.T) {
	for name, f := range map[string]func(c *blockingConn) error{
		"read":  func(c *blockingConn) error { _, err := c.Read(make([]byte, 1)); return err },
		"write": func(c *blockingConn) error { _, err := c.Write(make([]byte, 1)); return err },
	} {
		a, b := net.Pipe()
		defer b.Close()
		c := &blockingConn{s: pipeSocket{a}}
		c.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
		c.SetWriteDeadline(time.Now().Add(10 * time.Millisecond))
		if err := f(c); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSockaddr(t *testing.T) {
	if got := sockaddr(40, 2, 1024); got != [12]byte{40, 0, 0, 0, 0, 4, 0, 0, 2} {
		t.Errorf("%x", got)
	}
	for _, b := range [][]byte{nil, {40, 0, 0}, {0, 0, 0, 0}, {0, 0, 1, 0}} {
		if f, err := parseFamily(b); err == nil {
			t.Errorf("%x is family %d", b, f)
		}
	}
	if f, err := parseFamily([]byte{40, 0, 0, 0}); f != 40 || err != nil {
		t.Errorf("%d, %v", f, err)
	}
}
