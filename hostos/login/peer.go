package login

import (
	"fmt"
	"log/slog"
	"net"
	"slices"

	"golang.org/x/sys/unix"
)

// Only is a listener that hears some users alone (unix(7), SO_PEERCRED).
func Only(l net.Listener, log *slog.Logger, allow ...uint32) net.Listener {
	return &only{l, log, allow}
}

type only struct {
	net.Listener
	log   *slog.Logger
	allow []uint32
}

func (o *only) Accept() (net.Conn, error) {
	for {
		c, err := o.Listener.Accept()
		if err != nil {
			return nil, err
		}
		uid, err := peer(c)
		if err == nil && slices.Contains(o.allow, uid) {
			return c, nil
		}
		o.log.Warn("client refused", "uid", uid, "error", err)
		c.Close()
	}
}

func peer(c net.Conn) (uint32, error) {
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
