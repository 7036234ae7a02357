// Package vsock is the only code that touches AF_VSOCK. It opens the two ends
// of the guest link and lets in no peer but the one that was named.
package vsock

import (
	"net"
	"sync/atomic"
)

// Listener accepts connections of one peer context id. Connections of any
// other are closed at once and counted.
type Listener struct {
	l       net.Listener
	peer    uint32
	cid     func(net.Conn) (uint32, bool) // context id of the other end
	refused atomic.Uint64
}

// Accept returns the next connection of the permitted peer.
func (l *Listener) Accept() (net.Conn, error) {
	for {
		c, err := l.l.Accept()
		if err != nil {
			return nil, err
		}
		if cid, ok := l.cid(c); ok && cid == l.peer {
			return c, nil
		}
		l.refused.Add(1)
		c.Close()
	}
}

// Refused is how many connections of other peers were closed.
func (l *Listener) Refused() uint64 { return l.refused.Load() }

// Close implements net.Listener; it unblocks Accept.
func (l *Listener) Close() error { return l.l.Close() }

// Addr implements net.Listener.
func (l *Listener) Addr() net.Addr { return l.l.Addr() }
