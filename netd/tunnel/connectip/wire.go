package connectip

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
)

// wireBuffer is how much a Wire reads or writes at once, in bytes: several
// full TLS records.
const wireBuffer = 80 << 10

var wireBuffers = sync.Pool{New: func() any { return new([wireBuffer]byte) }}

// Wire is a TCP connection below TLS. It reads and writes several records with
// one system call, and holds a buffer only while bytes are in it: thousands of
// silent connections cost none.
type Wire struct {
	net.Conn
	raw syscall.RawConn

	in         *[wireBuffer]byte
	start, end int
	// header, of which got bytes are there, and left count off the records
	// (RFC 8446, section 5.1): no Read goes beyond one, so that crypto/tls never
	// holds a record that nobody asked it for, and wait is right to wait.
	header [5]byte
	got    int
	left   int
	// idle, if set, is called in Read before it waits for the peer.
	idle func()

	mu     sync.Mutex        // a reader may have to answer a key update (RFC 8446, section 4.6.3)
	out    *[wireBuffer]byte // nil: writes pass through
	queued int
}

// NewWire returns a Wire over conn.
func NewWire(conn *net.TCPConn) (*Wire, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	return &Wire{Conn: conn, raw: raw}, nil
}

// Read implements io.Reader.
func (w *Wire) Read(p []byte) (int, error) {
	if w.start == w.end {
		if w.idle != nil {
			w.idle()
		}
		if err := w.wait(); err != nil {
			return 0, err
		}
	}
	p = p[:min(len(p), w.end-w.start)]
	if w.left == 0 {
		p = p[:min(len(p), len(w.header)-w.got)]
	} else {
		p = p[:min(len(p), w.left)]
	}
	n := copy(p, w.in[w.start:w.end])
	if w.left > 0 {
		w.left -= n
	} else if w.got += copy(w.header[w.got:], p); w.got == len(w.header) {
		w.got, w.left = 0, int(binary.BigEndian.Uint16(w.header[3:]))
	}
	if w.start += n; w.start == w.end {
		wireBuffers.Put(w.in)
		w.in, w.start, w.end = nil, 0, 0
	}
	return n, nil
}

// wait returns when a Read would not wait. It takes a buffer only to try, and
// gives it back before it waits.
func (w *Wire) wait() error {
	if w.start < w.end {
		return nil
	}
	var n int
	var failed error
	err := w.raw.Read(func(fd uintptr) bool {
		w.in = wireBuffers.Get().(*[wireBuffer]byte)
		for {
			n, failed = syscall.Read(int(fd), w.in[:])
			if !errors.Is(failed, syscall.EINTR) {
				break
			}
		}
		if n <= 0 {
			wireBuffers.Put(w.in)
			w.in = nil
		}
		return !errors.Is(failed, syscall.EAGAIN)
	})
	switch {
	case err != nil:
		return err
	case failed != nil:
		return &net.OpError{Op: "read", Net: "tcp", Source: w.LocalAddr(), Addr: w.RemoteAddr(), Err: failed}
	case n == 0:
		return io.EOF
	}
	w.start, w.end = 0, n
	return nil
}

// Write implements io.Writer.
func (w *Wire) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.out == nil {
		return w.Conn.Write(p)
	}
	if w.queued+len(p) > len(w.out) {
		if err := w.flush(); err != nil {
			return 0, err
		}
	}
	if len(p) > len(w.out) {
		return w.Conn.Write(p)
	}
	w.queued += copy(w.out[w.queued:], p)
	return len(p), nil
}

func (w *Wire) flush() error {
	_, err := w.Conn.Write(w.out[:w.queued])
	w.queued = 0
	return err
}

// together lets the writes of f pass as few.
func (w *Wire) together(f func() error) error {
	w.mu.Lock()
	w.out = wireBuffers.Get().(*[wireBuffer]byte)
	w.mu.Unlock()
	err := f()
	w.mu.Lock()
	defer w.mu.Unlock()
	if err == nil {
		err = w.flush()
	}
	wireBuffers.Put(w.out)
	w.out, w.queued = nil, 0
	return err
}
