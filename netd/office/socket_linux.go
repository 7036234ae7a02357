package office

import (
	"errors"
	"syscall"

	"golang.org/x/sys/unix"
)

// bind returns a net.Dialer's or net.ListenConfig's Control: the socket stays
// on the named interface (SO_BINDTODEVICE, socket(7)), sends with TTL 255 and
// takes only what arrives with TTL 255, so what no router has passed on
// (RFC 5082; IP_MINTTL, ip(7)).
func bind(name string) func(network, address string, c syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error {
		var err error
		if e := c.Control(func(fd uintptr) {
			s := int(fd)
			err = errors.Join(
				unix.BindToDevice(s, name),
				unix.SetsockoptInt(s, unix.IPPROTO_IP, unix.IP_TTL, 255),
				unix.SetsockoptInt(s, unix.IPPROTO_IP, unix.IP_MINTTL, 255),
			)
		}); e != nil {
			return e
		}
		return err
	}
}
