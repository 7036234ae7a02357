package tunnel

import (
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// BindToLink returns a net.Dialer's or net.ListenConfig's Control that binds a
// socket to a network device (SO_BINDTODEVICE, socket(7)): it then takes that
// device's routes alone and hears that device alone. An empty name binds to none.
func BindToLink(name string) func(network, address string, c syscall.RawConn) error {
	if name == "" {
		return nil
	}
	return func(_, _ string, c syscall.RawConn) error {
		var err error
		if cerr := c.Control(func(fd uintptr) { err = unix.BindToDevice(int(fd), name) }); cerr != nil {
			return cerr
		}
		if err != nil {
			return fmt.Errorf("bind to %s: %w", name, err)
		}
		return nil
	}
}
