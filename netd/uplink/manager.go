//go:build linux

// Package uplink keeps the links towards the Internet ready: a lease on each
// that has carrier, and of each the knowledge how well it works. Choose says
// which of them to use. Addresses come by DHCPv4 (RFC 2131). Of what a server
// says it takes address, mask, router, lease times, server identifier and MTU,
// and only if they make sense. Routes (options 33, 121, 249), proxies (252),
// captive portals (114), vendor options (43), host and resolver names are never
// looked at. IPv6 addresses are made in what routers advertise (RFC 4862), stable
// and opaque (RFC 7217), or come by DHCPv6 if these say so; package ndp says how
// little of an advertisement is read.
package uplink

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"sekisho/netd"
	"sekisho/netd/uplink/wpa"
)

const (
	// settle is the least time that a better uplink has to be sound before it
	// takes over. Every loss of it doubles that, up to maxDoublings times.
	settle       = 3 * time.Second
	maxDoublings = 5
	// forgive is how long an uplink has to be sound until its losses are forgotten.
	forgive = 10 * time.Minute
)

// Config is what a Manager works with.
type Config struct {
	// Report is called with all candidates, ordered by index, after every
	// change. It must not block; it is called by one goroutine at a time.
	Report func([]Candidate)
	// Probe tries to reach a gateway over an uplink. Nil counts every lease as good.
	// It returns the MTU that packets must keep to, or 0 for the uplink's own.
	Probe func(context.Context, netd.Uplink) (int, error)
	// Claims are addresses that no local network may claim as its own: those of the organisation's servers on the
	// Internet. A lease whose prefix holds one is bad.
	Claims []netip.Addr
	Policy Policy
	// IPv6: the organisation's servers have such addresses, so that uplinks need
	// them too. Otherwise IPv6 is off everywhere outside.
	IPv6 bool
	// Wifi joins a Wi-Fi link to a network, Wired answers a switch that asks
	// for 802.1X, each until ctx is done: wpa.Supplicant's. Nil does not.
	Wifi, Wired func(ctx context.Context, name string, report func(wpa.Facts))
}

// Manager keeps every link's lease and health. Make one with New.
type Manager struct {
	Config
	lease  leaser
	lease6 func(ctx context.Context, l Link, doubt <-chan struct{}, report func(Six)) // nil: none
	now    func() time.Time
	events chan func() // for Run's goroutine, which alone touches records
	known  map[string]*record
}

// leaser keeps a lease on a link and reports it until ctx is done.
type leaser func(ctx context.Context, l Link, previous netip.Addr, report func(netd.Uplink))

// record is what is known of one link.
type record struct {
	link   Link
	four   netd.Uplink // what its lease reports
	six    Six
	uplink netd.Uplink // both together
	health string
	// pathMTU is what the last probe that got through had to keep to; 0 if nothing.
	pathMTU int
	since   time.Time // since when it is sound; zero while it is not
	losses  int
	last    netip.Addr // the last address had, to ask for again

	facts wpa.Facts // of the network that it has joined

	stopLease, stopProbe, stopJoin func()
	doubt, doubt6                  chan struct{} // for its prober, and the finder of IPv6 addresses
}

// Run follows the links that arrive on links until ctx is done.
func (m *Manager) Run(ctx context.Context, links <-chan []Link) {
	defer func() {
		for _, r := range m.known {
			m.leave(r)
			m.stop(ctx, r)
		}
	}()
	m.report()
	for {
		select {
		case <-ctx.Done():
			return
		case list := <-links:
			if m.follow(ctx, list) {
				m.join(ctx)
				m.report()
			}
		case do := <-m.events:
			do()
			m.join(ctx)
			m.report()
		}
	}
}

// post hands f to Run's goroutine.
func (m *Manager) post(ctx context.Context, f func()) {
	select {
	case m.events <- f:
	case <-ctx.Done():
	}
}

// Doubt says that nothing comes back over the named uplink, as whoever talks
// over it has noticed. It counts as dead until a probe has reached a gateway.
func (m *Manager) Doubt(ctx context.Context, name string) {
	m.post(ctx, func() {
		if r := m.known[name]; r != nil && r.doubt != nil {
			m.setHealth(r, netd.HealthDead)
			for _, c := range []chan struct{}{r.doubt, r.doubt6} {
				select {
				case c <- struct{}{}:
				default:
				}
			}
		}
	})
}

// SetDevice tells which laptop this is, for the groups of the policy.
func (m *Manager) SetDevice(ctx context.Context, id string) {
	m.post(ctx, func() { m.Policy.Device = id })
}

// follow takes over the list of links and reports whether anything changed.
func (m *Manager) follow(ctx context.Context, list []Link) (changed bool) {
	for name, r := range m.known {
		i := slices.IndexFunc(list, func(l Link) bool { return l.Name == name && l.Index == r.link.Index })
		if i < 0 {
			m.leave(r)
			m.stop(ctx, r)
			delete(m.known, name)
			changed = true
		}
	}
	for _, l := range list {
		r := m.known[l.Name]
		if r == nil {
			r = &record{uplink: netd.Uplink{Name: l.Name}}
			m.known[l.Name] = r
		} else if r.link.Carrier == l.Carrier && (r.link.Flaps == l.Flaps || !l.Carrier) {
			continue
		}
		r.link, changed = l, true
		m.stop(ctx, r)
		if l.Carrier {
			m.start(ctx, r)
		}
	}
	return changed
}

// join has every link join its network that the organisation allows: until then
// a radio is silent.
func (m *Manager) join(ctx context.Context) {
	for name, r := range m.known {
		keep := m.Wired
		if r.link.Kind == netd.KindWifi {
			keep = m.Wifi
		}
		_, _, allowed := m.Policy.Place(r.link)
		switch wanted := keep != nil && r.link.Kind != netd.KindUSB && allowed; {
		case wanted == (r.stopJoin != nil):
			continue
		case !wanted:
			m.leave(r)
			continue
		}
		whole := ctx
		ctx, cancel := context.WithCancel(ctx)
		done := make(chan struct{})
		go func() {
			defer close(done)
			keep(ctx, name, func(f wpa.Facts) {
				m.post(ctx, func() {
					if ctx.Err() == nil {
						m.joined(whole, r, f)
					}
				})
			})
		}()
		r.stopJoin = func() { cancel(); <-done }
	}
}

// joined takes over what is known of a link's network. Whoever was let in has
// perhaps asked for an address in vain before.
func (m *Manager) joined(ctx context.Context, r *record, f wpa.Facts) {
	again := f.Joined > r.facts.Joined && r.link.Carrier && !r.uplink.Usable()
	r.facts = f
	if again {
		m.stop(ctx, r)
		m.start(ctx, r)
	}
}

// leave ends what join began.
func (m *Manager) leave(r *record) {
	if r.stopJoin != nil {
		r.stopJoin()
	}
	r.stopJoin, r.facts = nil, wpa.Facts{}
}

// start gets a lease on r, which has carrier.
func (m *Manager) start(ctx context.Context, r *record) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	link, previous := r.link, r.last
	var all sync.WaitGroup
	doubt := make(chan struct{}, 1)
	r.doubt6 = doubt
	if m.lease6 != nil {
		all.Go(func() {
			m.lease6(ctx, link, doubt, func(s Six) {
				m.post(ctx, func() {
					if ctx.Err() == nil {
						m.leased6(ctx, r, s)
					}
				})
			})
		})
	}
	go func() {
		defer close(done)
		defer all.Wait()
		m.lease(ctx, link, previous, func(u netd.Uplink) {
			m.post(ctx, func() {
				if ctx.Err() == nil { // reported before r was stopped, and not of an older lease
					m.leased(ctx, r, u)
				}
			})
		})
	}()
	r.stopLease = func() { cancel(); <-done }
}

// stop ends what goes on for r. It has no lease after that.
func (m *Manager) stop(ctx context.Context, r *record) {
	if r.stopLease != nil {
		r.stopLease()
	}
	r.stopLease, r.six = nil, Six{}
	m.leased(ctx, r, netd.Uplink{Name: r.link.Name, Reason: netd.ReasonNoCarrier, Detail: "no carrier on " + r.link.Name})
}

// leased takes over what a lease's keeper reports.
func (m *Manager) leased(ctx context.Context, r *record, u netd.Uplink) {
	if u.Usable() {
		if i := slices.IndexFunc(m.Claims, u.Address.Contains); i >= 0 {
			u = netd.Uplink{Name: u.Name, Carrier: true, Reason: netd.ReasonBadLease,
				Detail: fmt.Sprintf("the network on %s claims %s, which holds the organisation's server %s", u.Name, u.Address.Masked(), m.Claims[i])}
		}
	}
	r.four = u
	m.changed(ctx, r)
}

// leased6 takes over what the finder of IPv6 addresses reports.
func (m *Manager) leased6(ctx context.Context, r *record, s Six) {
	if i := slices.IndexFunc(m.Claims, s.Prefix.Contains); i >= 0 {
		s = Six{Detail: fmt.Sprintf("the network on %s claims %s, which holds the organisation's server %s", r.link.Name, s.Prefix, m.Claims[i])}
	}
	r.six = s
	m.changed(ctx, r)
}

// both is what an uplink has by its lease and of IPv6. One without the other is
// an uplink too. On a link narrower than IPv6 needs there is none of it.
func both(four netd.Uplink, six Six) netd.Uplink {
	u := four
	if six.Address.IsValid() && four.Usable() && four.MTU != 0 && four.MTU < minMTU6 {
		six = Six{Detail: fmt.Sprintf("mtu %d, want at least %d", four.MTU, minMTU6)}
	}
	if u.IPv6 = six.Detail; !six.Address.IsValid() {
		return u
	}
	if !four.Usable() {
		u = netd.Uplink{Name: four.Name, Carrier: true, MTU: maxMTU, Expires: six.Expires}
	}
	u.Address6, u.Local6, u.Router6, u.MTU6 = six.Address, six.Local, six.Router, six.MTU
	if u.MTU6 >= u.MTU && u.MTU != 0 {
		u.MTU6 = 0
	}
	return u
}

// changed draws the conclusions: what an uplink lost makes it another, whose
// health has to be found, and what it gained only if it was dead.
func (m *Manager) changed(ctx context.Context, r *record) {
	was, u := r.uplink, both(r.four, r.six)
	r.uplink = u
	lost := was.Address.IsValid() && (u.Address != was.Address || u.Router != was.Router) ||
		was.Address6.IsValid() && (u.Address6 != was.Address6 || u.Router6 != was.Router6)
	gained := !was.Address.IsValid() && u.Address.IsValid() || !was.Address6.IsValid() && u.Address6.IsValid()
	if !lost && was.Usable() == u.Usable() && !(gained && r.health == netd.HealthDead) {
		return
	}
	if r.stopProbe != nil {
		r.stopProbe()
		r.stopProbe, r.doubt = nil, nil
	}
	if !u.Usable() {
		m.setHealth(r, netd.HealthUnknown)
		return
	}
	if r.pathMTU = 0; u.Address.IsValid() {
		r.last = u.Address.Addr()
	}
	if m.Probe == nil {
		m.setHealth(r, netd.HealthGood)
		return
	}
	m.setHealth(r, netd.HealthUnknown)
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	r.doubt = make(chan struct{}, 1)
	doubt := r.doubt
	go func() {
		defer close(done)
		watch(ctx, func(ctx context.Context) (int, error) { return m.Probe(ctx, u) }, doubt, func(health string, pathMTU int) {
			m.post(ctx, func() {
				if ctx.Err() == nil {
					if health == netd.HealthGood {
						r.pathMTU = pathMTU
					}
					m.setHealth(r, health)
				}
			})
		})
	}()
	r.stopProbe = func() { cancel(); <-done }
}

// setHealth notes the health, and with it since when r is sound, or that it
// was lost once more.
func (m *Manager) setHealth(r *record, health string) {
	r.health = health
	now := m.now()
	isSound := r.uplink.Usable() && health != netd.HealthDead
	switch {
	case isSound && r.since.IsZero():
		r.since = now
	case !isSound && !r.since.IsZero():
		if now.Sub(r.since) >= forgive {
			r.losses = 0
		}
		r.losses++
		r.since = time.Time{}
	}
}

// report tells all candidates.
func (m *Manager) report() {
	list := make([]Candidate, 0, len(m.known))
	for _, r := range slices.SortedFunc(maps.Values(m.known), func(a, b *record) int { return cmp.Compare(a.link.Index, b.link.Index) }) {
		u := r.uplink
		u.Carrier, u.Kind, u.Driver = r.link.Carrier, r.link.Kind, r.link.Driver
		u.Health, u.Losses, u.Since, u.PathMTU = r.health, r.losses, r.since, r.pathMTU
		u.Network, u.Signal, u.AccessPoint = r.facts.Network, r.facts.Signal, r.facts.AccessPoint
		if r.facts.Reason != "" && !u.Usable() && (r.link.Carrier || r.link.Kind == netd.KindWifi) {
			u.Reason, u.Detail = r.facts.Reason, r.facts.Detail
		}
		place, metered, allowed := m.Policy.Place(r.link)
		u.Metered = metered
		if !allowed {
			u.Reason, u.Detail = netd.ReasonNotAllowed, "the organisation does not allow "+u.Name+" ("+u.Kind+")"
		}
		list = append(list, Candidate{Uplink: u, Index: r.link.Index, Place: place, Settle: settle << min(r.losses, maxDoublings)})
	}
	m.Config.Report(list)
}
