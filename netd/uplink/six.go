package uplink

import (
	"cmp"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"time"

	"sekisho/netd/uplink/ndp"
)

const (
	// maxRouters and maxPrefixes bound what is remembered of a link's routers:
	// whoever floods fills them, and what is there stays until it lapses.
	maxRouters, maxPrefixes = 4, 8
	// minMTU6 is that of every IPv6 link (RFC 8200, section 5).
	minMTU6 = 1280
	// minRouter is the shortest life as a router that is believed: routers
	// advertise every 4 s at most (RFC 4861, section 6.2.1).
	minRouter = 10 * time.Second
	// floor is what a shorter life of a prefix is taken for once it is in use: no
	// single advertisement ends an address (RFC 4862, section 5.5.3 e).
	floor = 2 * time.Hour
	// objection is how long others have to claim a new address (RFC 4862, section
	// 5.4, RetransTimer), of which maxConflicts are tried (RFC 7217, section 6).
	objection    = time.Second
	maxConflicts = 3
	// firstAsk and mostAsk are between solicitations while no router is known
	// (RFC 7559).
	firstAsk, mostAsk = 4 * time.Second, 2 * time.Minute
	// answers is how long routers have to show that they are there: half a second
	// by chance, and 3 s between advertisements (RFC 4861, section 6.2.6).
	answers = 4 * time.Second
	// lookAgain is how often the wall clock is looked at, which sees a life end
	// while the machine was suspended.
	lookAgain = 10 * time.Second
)

// Six is what a link has of IPv6. The zero value is nothing.
type Six struct {
	Address netip.Addr   // zero while there is none that is sound
	Prefix  netip.Prefix // it was made in, or itself if DHCPv6 gave it
	Local   netip.Addr   // the link-local address beside it
	Router  netip.Addr
	MTU     int // bytes; 0 if the router says nothing
	Expires time.Time
	Detail  string // why there is no address, if something was heard
}

// slaac finds a router and makes an address (RFC 4862) of what was heard on one
// link. It is pure: the caller brings messages and the time, and sends.
type slaac struct {
	secret   ndp.Secret
	hardware net.HardwareAddr

	routers map[netip.Addr]*router
	heard   int // advertisements taken, for an order among routers
	local   claim
	global  claim
	prefix  netip.Prefix // global was made in
	router  netip.Addr   // the one in use
	given   lease6       // of DHCPv6
	asked   bool         // for the link-local address, by whom DHCPv6 would answer
	doubted time.Time    // since when it is in question which routers are there
	why     string
	next    time.Time // the next solicitation of routers
	pause   time.Duration
}

// router is what one router said.
type router struct {
	since    int
	heard    time.Time
	until    time.Time
	managed  bool
	mtu      int
	prefixes map[netip.Prefix]*life
}

// life is how long addresses of a prefix are good, and good for what is new.
type life struct{ valid, preferred time.Time }

// lease6 is an address that DHCPv6 gave; zero is none.
type lease6 struct {
	address netip.Addr
	until   time.Time
}

// claim is an address that others may object to until ready.
type claim struct {
	address   netip.Addr
	ready     time.Time
	conflicts uint8
}

func newSlaac(secret ndp.Secret, hardware net.HardwareAddr) *slaac {
	return &slaac{secret: secret, hardware: hardware, routers: map[netip.Addr]*router{}, pause: firstAsk}
}

// past reports whether t is past by the monotonic clock or by the other, which
// goes on in a suspend.
func past(t, now time.Time) bool { return !now.Before(t) || !now.Round(0).Before(t.Round(0)) }

// hear takes a message over.
func (s *slaac) hear(m ndp.Message, now time.Time) {
	switch {
	case m.Advertisement != nil:
		s.advertised(m.Advertisement, now)
	case m.Asked.IsValid():
		s.asked = s.asked || m.Asked == s.local.address
	case m.Claimed.IsValid():
		for _, c := range []*claim{&s.local, &s.global} {
			if c.address == m.Claimed && !past(c.ready, now) {
				*c = claim{conflicts: c.conflicts + 1}
				s.why = fmt.Sprintf("%s is in use by somebody else", m.Claimed)
			}
		}
	}
}

// advertised takes over what makes sense of an advertisement. What makes none is
// as if it had not been said.
func (s *slaac) advertised(a *ndp.Advertisement, now time.Time) {
	s.forget(now)
	if a.Lifetime == 0 {
		delete(s.routers, a.Router)
		return
	}
	if a.MTU != 0 && a.MTU < minMTU6 {
		s.why = fmt.Sprintf("router %s says mtu %d, want at least %d", a.Router, a.MTU, minMTU6)
		return
	}
	if a.Lifetime < minRouter {
		s.why = fmt.Sprintf("router %s says that it is one for %v, want at least %v", a.Router, a.Lifetime, minRouter)
		return
	}
	r := s.routers[a.Router]
	if r == nil {
		if len(s.routers) >= maxRouters {
			return
		}
		s.heard++
		r = &router{since: s.heard, prefixes: map[netip.Prefix]*life{}}
		s.routers[a.Router] = r
	}
	r.heard, r.until, r.managed, r.mtu = now, now.Add(a.Lifetime), a.Managed, a.MTU
	for _, p := range a.Prefixes {
		if !p.Autonomous {
			continue
		}
		known := r.prefixes[p.Prefix]
		if err := believable(p, known != nil); err != nil {
			s.why = fmt.Sprintf("router %s: %v", a.Router, err)
			continue
		}
		valid := min(p.Valid, maxLease)
		switch {
		case known == nil && len(r.prefixes) >= maxPrefixes:
			continue
		case known == nil:
			known = &life{valid: now.Add(valid)}
			r.prefixes[p.Prefix] = known
		case valid > floor || valid > known.valid.Sub(now):
			known.valid = now.Add(valid)
		default:
			known.valid = now.Add(min(known.valid.Sub(now), floor))
		}
		known.preferred = now.Add(min(p.Preferred, valid))
	}
}

// believable says what is wrong with a prefix that hosts are to make addresses in.
func believable(p ndp.Prefix, known bool) error {
	a := p.Prefix.Addr()
	switch {
	case p.Prefix.Bits() != 64: // RFC 4862, section 5.5.3 d, with RFC 2464's identifiers
		return fmt.Errorf("prefix %s is not a /64", p.Prefix)
	case !reachable(a):
		return fmt.Errorf("prefix %s is not one of unicast addresses", p.Prefix)
	case p.Preferred > p.Valid:
		return fmt.Errorf("prefix %s is preferred for longer than it is valid", p.Prefix)
	case p.Valid < minLease && !known:
		return fmt.Errorf("prefix %s is valid for %v, want at least %v", p.Prefix, p.Valid, minLease)
	}
	return nil
}

// doubt says that nothing comes back over the link: routers are asked, and those
// that are silent are left if another answers.
func (s *slaac) doubt(now time.Time) {
	if s.doubted.IsZero() && len(s.routers) > 0 {
		s.doubted, s.next = now, now
	}
}

// forget drops what has lapsed.
func (s *slaac) forget(now time.Time) {
	if !s.doubted.IsZero() && past(s.doubted.Add(answers), now) {
		silent := func(_ netip.Addr, r *router) bool { return r.heard.Before(s.doubted) }
		left := maps.Clone(s.routers)
		if maps.DeleteFunc(left, silent); len(left) > 0 {
			s.routers = left
		}
		s.doubted = time.Time{}
	}
	for a, r := range s.routers {
		if past(r.until, now) {
			delete(s.routers, a)
			continue
		}
		for p, l := range r.prefixes {
			if past(l.valid, now) {
				delete(r.prefixes, p)
			}
		}
	}
	if s.given.address.IsValid() && past(s.given.until, now) {
		s.given = lease6{}
	}
}

// known are the routers, the one in use first and then as they came.
func (s *slaac) known() []netip.Addr {
	var list []netip.Addr
	for a := range s.routers {
		list = append(list, a)
	}
	slices.SortFunc(list, func(a, b netip.Addr) int {
		if a == s.router || b == s.router {
			return map[bool]int{true: -1, false: 1}[a == s.router]
		}
		return s.routers[a].since - s.routers[b].since
	})
	return list
}

// pick decides on router and prefix: those in use as long as they are good, else
// the first router with a prefix that may be used for what is new, but a global
// prefix before a local one, from which nobody far away is reached (RFC 4193);
// without any, what DHCPv6 gave.
func (s *slaac) pick(now time.Time) {
	type choice struct {
		router netip.Addr
		prefix netip.Prefix
	}
	list, another := s.known(), s.another(now)
	var choices []choice
	for _, a := range list {
		for p, l := range s.routers[a].prefixes {
			if !past(l.preferred, now) || p == s.prefix && !another {
				choices = append(choices, choice{a, p})
			}
		}
	}
	rank := func(c choice) int {
		n := slices.Index(list, c.router)
		if c.prefix != s.prefix {
			n += maxRouters
		}
		if c.prefix.Addr().IsPrivate() {
			n += 2 * maxRouters
		}
		return n
	}
	switch {
	case len(choices) > 0:
		c := slices.MinFunc(choices, func(a, b choice) int {
			return cmp.Or(rank(a)-rank(b), a.prefix.Addr().Compare(b.prefix.Addr()))
		})
		s.use(c.router, c.prefix)
	case s.given.address.IsValid() && len(list) > 0:
		s.use(list[0], netip.PrefixFrom(s.given.address, 128))
	default:
		s.use(netip.Addr{}, netip.Prefix{})
	}
}

// another reports whether there is a prefix for what is new.
func (s *slaac) another(now time.Time) bool {
	for _, r := range s.routers {
		for _, l := range r.prefixes {
			if !past(l.preferred, now) {
				return true
			}
		}
	}
	return false
}

func (s *slaac) use(router netip.Addr, prefix netip.Prefix) {
	s.router = router
	if prefix != s.prefix {
		s.prefix, s.global = prefix, claim{}
	}
}

// managed reports whether an address has to come by DHCPv6: a router says so,
// and none has a prefix.
func (s *slaac) managed(now time.Time) bool {
	return !s.another(now) && slices.ContainsFunc(s.known(), func(a netip.Addr) bool { return s.routers[a].managed })
}

// granted takes over what came of DHCPv6.
func (s *slaac) granted(g grant) {
	if g.lease.address.IsValid() {
		s.given = g.lease
	} else {
		s.why = g.why
	}
}

// grant is what came of DHCPv6: an address, or why there is none.
type grant struct {
	lease lease6
	why   string
}

// step returns what has to be sent now, and when to step again at the latest.
func (s *slaac) step(now time.Time) (send [][]byte, next time.Time) {
	s.forget(now)
	s.pick(now)
	next = now.Add(lookAgain)
	soon := func(t time.Time) {
		if now.Before(t) && t.Before(next) {
			next = t
		}
	}
	link := netip.MustParsePrefix("fe80::/64")
	for _, c := range []struct {
		*claim
		prefix netip.Prefix
	}{{&s.local, link}, {&s.global, s.prefix}} {
		if !c.prefix.IsValid() || c.conflicts > maxConflicts || c.conflicts > 0 && c.prefix.IsSingleIP() {
			continue
		}
		if !c.address.IsValid() {
			if c.address = c.prefix.Addr(); !c.prefix.IsSingleIP() {
				c.address = s.secret.Address(c.prefix, s.hardware, c.conflicts)
			}
			c.ready = now.Add(objection)
			send = append(send, ndp.Probe(c.address))
		}
		soon(c.ready)
	}
	if s.asked && s.managed(now) && !s.given.address.IsValid() && past(s.local.ready, now) {
		send = append(send, ndp.Answer(s.local.address, s.hardware)) // the kernel does not know it yet
	}
	s.asked = false
	if len(s.routers) > 0 {
		if !s.next.IsZero() && !s.doubted.IsZero() {
			send = append(send, ndp.RouterSolicitation(netip.IPv6Unspecified()))
		}
		if s.next, s.pause = (time.Time{}), firstAsk; !s.doubted.IsZero() {
			soon(s.doubted.Add(answers))
		}
	} else {
		if s.next.IsZero() || past(s.next, now) {
			send = append(send, ndp.RouterSolicitation(netip.IPv6Unspecified()))
			s.next = now.Add(s.pause - s.pause/10 + rand.N(s.pause/5))
			s.pause = min(2*s.pause, mostAsk)
		}
		soon(s.next)
	}
	for _, r := range s.routers {
		soon(r.until)
		for _, l := range r.prefixes {
			soon(l.valid)
			soon(l.preferred)
		}
	}
	if s.given.address.IsValid() {
		soon(s.given.until)
	}
	return send, next
}

// six is what the link has now.
func (s *slaac) six(now time.Time) Six {
	r := s.routers[s.router]
	if r == nil || !s.prefix.IsValid() || !s.local.address.IsValid() || !s.global.address.IsValid() || !past(s.local.ready, now) || !past(s.global.ready, now) {
		if len(s.routers) > 0 && s.why == "" {
			return Six{Detail: "a router, and no prefix to make an address in"}
		}
		return Six{Detail: s.why}
	}
	expires := s.given.until
	if l := r.prefixes[s.prefix]; l != nil {
		expires = l.valid
	}
	if r.until.Before(expires) {
		expires = r.until
	}
	return Six{Address: s.global.address, Prefix: s.prefix, Local: s.local.address, Router: s.router, MTU: r.mtu, Expires: expires.Round(0)}
}
