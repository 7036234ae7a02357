package vsock

import (
	"context"
	"fmt"
	"net"
	"syscall"

	mdlayher "github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

// Listen listens on port of context id own (guestlink.HostCID on the host) for
// connections of context id peer.
func Listen(own, port, peer uint32) (*Listener, error) {
	l, err := mdlayher.ListenContextID(own, port, nil)
	if err != nil {
		return nil, fmt.Errorf("vsock: listen on cid %d port %d: %w; is the module vhost_vsock loaded?", own, port, err)
	}
	return &Listener{l: l, peer: peer, cid: peerCID}, nil
}

func peerCID(c net.Conn) (uint32, bool) {
	a, ok := c.RemoteAddr().(*mdlayher.Addr)
	if !ok {
		return 0, false
	}
	grow(c)
	return a.ContextID, true
}

// Dial connects to port of context id cid.
func Dial(ctx context.Context, cid, port uint32) (net.Conn, error) {
	c, err := mdlayher.DialContext(ctx, cid, port, nil)
	if err != nil {
		return nil, fmt.Errorf("vsock: dial cid %d port %d: %w", cid, port, err)
	}
	grow(c)
	return c, nil
}

// grow raises the buffer of a connection; one that cannot be raised stays as it
// is. The maximum comes first, because the size is cut to it (vsock(7)).
func grow(c net.Conn) {
	s, ok := c.(syscall.Conn)
	if !ok {
		return
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return
	}
	raw.Control(func(fd uintptr) {
		for _, opt := range []int{unix.SO_VM_SOCKETS_BUFFER_MAX_SIZE, unix.SO_VM_SOCKETS_BUFFER_SIZE} {
			unix.SetsockoptUint64(int(fd), unix.AF_VSOCK, opt, bufferSize)
		}
	})
}
