package gateway

import (
	"net"
	"net/netip"
	"sync"
	"sync/atomic"

	"sekisho/netd/tunnel/connectip"
)

// perSource is how many connections of one source address may be under way to
// a session at once: room for all the laptops behind a carrier-grade NAT that
// come back together, and not for one source to take every place.
const perSource = opening / 4

// sources counts the connections under way to a session, by their source
// addresses: from acceptance until they are a session or closed. It closes a
// TCP connection at once when its source has perSource under way, or when max
// are open altogether.
type sources struct {
	net.Listener
	max     int
	refused atomic.Uint64

	mu    sync.Mutex
	count map[netip.Prefix]int
	way   int // sum of count
	open  int // TCP connections
}

func newSources(l net.Listener, max int) *sources {
	return &sources{Listener: l, max: max, count: map[netip.Prefix]int{}}
}

// Accept implements net.Listener.
func (s *sources) Accept() (net.Conn, error) {
	for {
		c, err := s.Listener.Accept()
		if err != nil {
			return nil, err
		}
		leave, ok := s.admit(c.RemoteAddr())
		if !ok {
			c.Close()
			continue
		}
		wire, err := connectip.NewWire(c.(*net.TCPConn))
		if err != nil || !s.opened() {
			leave()
			c.Close()
			continue
		}
		return &sourceConn{Wire: wire, leave: leave, closed: sync.OnceFunc(s.closed)}, nil
	}
}

// admit counts a connection under way, until leave is called.
func (s *sources) admit(source net.Addr) (leave func(), ok bool) {
	from := sourceOf(source)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.count[from] >= perSource || s.way >= opening {
		s.refused.Add(1)
		return nil, false
	}
	s.count[from]++
	s.way++
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.way--
		if s.count[from]--; s.count[from] == 0 {
			delete(s.count, from)
		}
	}), true
}

// underWay is how many connections are under way.
func (s *sources) underWay() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.way
}

func (s *sources) opened() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open >= s.max {
		s.refused.Add(1)
		return false
	}
	s.open++
	return true
}

func (s *sources) closed() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open--
}

// sourceOf is the address of an IPv4 source, and the network of an IPv6 one,
// within which a host takes whatever address it likes (RFC 4291, section 2.5.1).
func sourceOf(a net.Addr) netip.Prefix {
	var ip netip.Addr
	switch a := a.(type) {
	case *net.TCPAddr:
		ip = a.AddrPort().Addr()
	case *net.UDPAddr:
		ip = a.AddrPort().Addr()
	default:
		return netip.Prefix{}
	}
	ip = ip.Unmap().WithZone("")
	bits := 64
	if ip.Is4() {
		bits = 32
	}
	return netip.PrefixFrom(ip, bits).Masked()
}

// sourceConn is a connection that is counted until leave or Close.
type sourceConn struct {
	*connectip.Wire
	leave, closed func()
}

// Close implements net.Conn.
func (c *sourceConn) Close() error {
	c.leave()
	c.closed()
	return c.Wire.Close()
}
