package vsock

import (
	"context"
	"fmt"
	"net"

	mdlayher "github.com/mdlayher/vsock"
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
	return a.ContextID, true
}

// Dial connects to port of context id cid.
func Dial(ctx context.Context, cid, port uint32) (net.Conn, error) {
	c, err := mdlayher.DialContext(ctx, cid, port, nil)
	if err != nil {
		return nil, fmt.Errorf("vsock: dial cid %d port %d: %w", cid, port, err)
	}
	return c, nil
}
