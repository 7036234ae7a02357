package packet

import (
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// directWriter writes to a stream socket without waiting. It has one user at a
// time.
type directWriter struct {
	raw syscall.RawConn
	b   []byte
	n   int
	try func(fd uintptr) bool // made once: a closure per packet would be garbage
}

// newDirectWriter returns nil for a connection that is no socket.
func newDirectWriter(c net.Conn) *directWriter {
	s, ok := c.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return nil
	}
	d := &directWriter{raw: raw}
	d.try = func(fd uintptr) bool {
		n, err := unix.SendmsgN(int(fd), d.b, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		if err == nil {
			d.n = n
		}
		return true
	}
	return d
}

// write returns how many bytes of b went at once. A connection that has failed
// takes none: who then waits for it gets the error.
func (d *directWriter) write(b []byte) int {
	d.b, d.n = b, 0
	if d.raw.Write(d.try) != nil {
		return 0
	}
	return d.n
}
