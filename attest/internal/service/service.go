// Package service has what the daemons of this area share: the sockets that
// init or systemd opens for them, and who is at the other end of one.
package service

import (
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"
)

// Listen returns the one socket that was passed (LISTEN_FDS, sd_listen_fds(3))
// or, if there is none, listens on address, whose name in the configuration or
// on the command line is called. A stale unix socket is removed.
func Listen(network, address, called string) (net.Listener, error) {
	passed, err := activation.Listeners()
	if err != nil {
		return nil, fmt.Errorf("LISTEN_FDS: %w", err)
	}
	switch {
	case len(passed) == 1 && passed[0] != nil:
		return passed[0], nil
	case len(passed) > 0:
		return nil, fmt.Errorf("LISTEN_FDS: %d sockets, want 1 that listens", len(passed))
	case address == "":
		return nil, fmt.Errorf("no socket: neither LISTEN_FDS nor %s is given", called)
	}
	if network == "unix" {
		if err := os.Remove(address); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	return net.Listen(network, address)
}

// PeerUID returns the user at the other end of a unix socket (SO_PEERCRED,
// unix(7)).
func PeerUID(c net.Conn) (uint32, error) {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return 0, fmt.Errorf("%T is no unix socket", c)
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) {
		cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if cerr != nil {
		return 0, cerr
	}
	return cred.Uid, nil
}
