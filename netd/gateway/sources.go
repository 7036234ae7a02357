package gateway

import (
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
)

// perSource is how many connections of one source address may be under way to
// a session at once: room for all the laptops behind a carrier-grade NAT that
// come back together, and not for one source to take every place.
const perSource = opening / 4

// sources is a listener that closes a connection at once when its source
// address has perSource under way. A connection is under way from its
// acceptance until it is opened or closed.
type sources struct {
	net.Listener
	refused atomic.Uint64

	mu    sync.Mutex
	count map[netip.Prefix]int
}

func newSources(l net.Listener) *sources {
	return &sources{Listener: l, count: map[netip.Prefix]int{}}
}

// Accept implements net.Listener.
func (s *sources) Accept() (net.Conn, error) {
	for {
		c, err := s.Listener.Accept()
		if err != nil {
			return nil, err
		}
		from := sourceOf(c.RemoteAddr())
		if s.enter(from) {
			return &sourceConn{Conn: c, leave: sync.OnceFunc(func() { s.leave(from) })}, nil
		}
		s.refused.Add(1)
		c.Close()
	}
}

func (s *sources) enter(from netip.Prefix) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.count[from] >= perSource {
		return false
	}
	s.count[from]++
	return true
}

func (s *sources) leave(from netip.Prefix) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.count[from]--; s.count[from] == 0 {
		delete(s.count, from)
	}
}

// sourceOf is the address of an IPv4 source, and the network of an IPv6 one,
// within which a host takes whatever address it likes (RFC 4291, section 2.5.1).
func sourceOf(a net.Addr) netip.Prefix {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.Prefix{}
	}
	ip := t.AddrPort().Addr().Unmap().WithZone("")
	bits := 64
	if ip.Is4() {
		bits = 32
	}
	return netip.PrefixFrom(ip, bits).Masked()
}

// sourceConn is a connection that is counted until leave or Close.
type sourceConn struct {
	net.Conn
	leave func()
}

// Close implements net.Conn.
func (c *sourceConn) Close() error {
	c.leave()
	return c.Conn.Close()
}
