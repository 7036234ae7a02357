//go:build linux

package daemon

import (
	"errors"
	"net/netip"
	"reflect"
	"slices"
	"time"

	"sekisho/attest/gate"
	"sekisho/netd"
	"sekisho/netd/journal"
	"sekisho/netd/kernel"
	"sekisho/netd/office"
	"sekisho/netd/plan"
	"sekisho/netd/tunnel"
	"sekisho/netd/uplink"
)

// loop derives and applies. Only Run's goroutine touches it.
type loop struct {
	d       *Daemon
	in      reports
	chosen  string // the uplink in use
	tunnel  tunnel.Status
	inner   netip.Addr // assigned last: it stays while the tunnel is away
	inner6  netip.Addr // beside it; zero if the gateway assigned none
	mtu     int        // of inner packets
	sent    office.Path
	ask     asked
	looked0 time.Time // when the clocks were compared
	granted time.Time // end of the last credential that was in force
	outside []kernel.Link
	inside  []kernel.Link

	sealed  bool      // the kernel was read back and holds last
	fault   error     // why it does not
	holdOff time.Time // no new attempt to open before this
	last    plan.Plan
	checked time.Time
	looked  time.Time // for hardware without a link
	line    string
	shown   netd.Status
	pushed  push
}

// push is what linkd is told anew about when it changes.
type push struct {
	state netd.State
	work  bool // work0 has a carrier: a linkd is there, a new one after each change
	inner [2]netip.Addr
}

// step goes once from facts to kernel.
func (l *loop) step(now time.Time) {
	l.observe(now)
	affirming := l.affirming(now)
	state := l.state(affirming, now)
	l.pipe(state) // before the kernel: it closes at once
	p := plan.Make(l.situation(state))
	if l.in.kernel || !l.sealed || now.Sub(l.checked) >= checkEvery || !reflect.DeepEqual(p, l.last) {
		err := l.apply(p)
		l.sealed, l.last, l.checked = err == nil, p, now
		if err != nil || !now.Before(l.holdOff) {
			l.fault = err // said until an attempt to open has succeeded
		}
		if err != nil {
			l.d.Log.Error("kernel does not hold the plan; closing", "state", state, "err", err)
			l.holdOff = now.Add(sealRetry)
			state = netd.Dark
			l.pipe(state)
			if err := l.apply(plan.Make(l.situation(state))); err != nil {
				l.d.Log.Error("kernel does not hold the closed plan", "err", err)
			}
		} else if state == netd.Dark && !now.Before(l.holdOff) {
			// The first plan holds: from now on the facts alone decide.
			if next := l.state(affirming, now); next != state {
				signal(l.d.wake)
			}
		}
	}
	l.look(state, now)
	l.lead(affirming) // after the plan, which lets the watcher reach its beacons
	l.publish(state, affirming, now)
}

// lead sends the watcher to where an office may be.
func (l *loop) lead(affirming bool) {
	p := l.path(affirming)
	if p == l.sent {
		return
	}
	l.sent = p
	select { // the newest path is the only one that counts
	case <-l.d.paths:
	default:
	}
	l.d.paths <- p
}

// pipe opens the way to the office's LAN for as long as the proof says, or closes it.
func (l *loop) pipe(state netd.State) {
	switch {
	case l.d.Pipe == nil:
	case state == netd.Office:
		l.d.Pipe.Open(l.in.office.Proof.Until, still(l.in.office.Proof.Path))
	default:
		l.d.Pipe.Open(time.Time{}, nil)
	}
}

// observe takes over what the parts reported.
func (l *loop) observe(now time.Time) {
	d := l.d
	d.mu.Lock()
	if d.Unserved != nil && !now.Before(l.looked.Add(checkEvery)) {
		l.looked, d.in.unserved = now, d.Unserved()
	}
	l.in = d.in
	d.in.kernel = false
	d.mu.Unlock()
	l.tunnel = d.Driver.Status()
	if a := l.tunnel.Assignment; a.Inner.IsValid() {
		l.inner, l.inner6, l.mtu = a.Inner, a.Inner6, a.MTU
	}
	var err1, err2 error
	l.outside, err1 = d.Outside.Links()
	l.inside, err2 = d.Inside.Links()
	if err := errors.Join(err1, err2); err != nil {
		d.Log.Error("cannot list links", "err", err)
		l.outside, l.inside = nil, nil
	}
	var links []uplink.Link
	for _, k := range l.outside {
		if k.Ethernet {
			links = append(links, uplink.Link{Index: k.Index, Name: k.Name, Hardware: k.Hardware, Carrier: k.Carrier, Flaps: k.Flaps, Kind: k.Kind, Driver: k.Driver, Device: k.Device})
		}
	}
	select { // the newest list is the only one that counts
	case <-d.links:
	default:
	}
	d.links <- links
	l.choose(links, now)
}

// choose picks the uplink in use, by what the kernel says of carriers now: the
// keeper of the uplinks may not have noticed yet.
func (l *loop) choose(links []uplink.Link, now time.Time) {
	l.in.candidates = slices.Clone(l.in.candidates)
	for i := range l.in.candidates {
		c := &l.in.candidates[i]
		if slices.ContainsFunc(links, func(k uplink.Link) bool { return k.Name == c.Name && k.Index == c.Index && k.Carrier }) {
			continue
		}
		c.Carrier = false
		if c.Reason == "" {
			c.Reason, c.Detail = netd.ReasonNoCarrier, "no carrier on "+c.Name
		}
	}
	name := uplink.Choose(l.in.candidates, l.chosen, now)
	i := slices.IndexFunc(l.in.candidates, func(c uplink.Candidate) bool { return c.Name == name })
	if i < 0 {
		l.in.uplink = netd.Uplink{Reason: netd.ReasonNoLink, Detail: "no network card"}
	} else {
		l.in.uplink = l.in.candidates[i].Uplink
	}
	if len(l.in.unserved) > 0 && !l.in.uplink.Carrier { // it may be the one that people wait for
		if i < 0 {
			l.in.uplink.Reason = netd.ReasonUnserved
		}
		l.in.uplink.Detail += "; " + l.in.unserved[0].String()
	}
	if name != l.chosen {
		l.d.Log.Info("uplink in use", "name", name, "before", l.chosen, "address", l.in.uplink.Addresses(), "reason", l.in.uplink.Reason, "detail", l.in.uplink.Detail)
		l.chosen = name
	}
}

func (l *loop) affirming(now time.Time) bool {
	until, open := gate.Open(l.in.gate, gate.Tunnel, now)
	switch {
	case open:
		l.granted = until
	case l.in.gate.State == gate.StateRefused:
		l.granted = time.Time{} // it did not lapse
	case !l.granted.IsZero():
		l.in.granted = l.granted
	}
	return open
}

func (l *loop) state(affirming bool, now time.Time) netd.State {
	return netd.Next(netd.Facts{
		Sealed:    l.sealed && !now.Before(l.holdOff),
		Uplink:    l.in.uplink.Usable(),
		Asked:     l.in.asked,
		Affirming: affirming,
		Session:   l.tunnel.Open,
		Office:    l.office(affirming, now),
		Portal:    l.portal(),
	})
}

// office reports whether the work domain is to leave the tunnel for the LAN.
func (l *loop) office(affirming bool, now time.Time) bool {
	_, proven := l.proven(affirming, now)
	return proven && l.inner.IsValid() && l.d.Pipe != nil && !l.d.Organization.Office.StayInTunnel
}

// next is when the loop has to look again if nothing happens.
func (l *loop) next(now time.Time) time.Duration {
	next := beat
	for _, t := range []time.Time{l.in.office.Proof.Until, l.in.gate.NotAfter} {
		if t.After(now) {
			next = min(next, t.Sub(now))
		}
	}
	return next
}

func (l *loop) situation(state netd.State) plan.Situation {
	s := plan.Situation{
		State: state, Uplink: l.in.uplink, Endpoints: l.d.endpoints, QUIC: l.d.quic, Beacons: l.d.beacons(),
		Inner: l.inner, Inner6: l.inner6, MTU: l.mtu, Session: l.tunnel.Open,
		Work: has(l.inside, netd.WorkLink), Tun: has(l.inside, netd.TunnelLink),
		Pipe: l.d.Pipe != nil && has(l.inside, netd.OfficeLink) && has(l.outside, netd.OfficeOuterLink),
	}
	if state == netd.Office {
		s.Networks = l.in.office.Proof.Networks
	}
	for _, k := range l.outside {
		if k.Ethernet {
			s.Links = append(s.Links, k.Name)
		}
	}
	for _, c := range l.in.candidates {
		if c.Name != l.chosen && c.Usable() {
			s.Standby = append(s.Standby, c.Uplink)
		}
	}
	return s
}

func has(links []kernel.Link, name string) bool {
	return slices.ContainsFunc(links, func(k kernel.Link) bool { return k.Name == name })
}

func carrier(links []kernel.Link, name string) bool {
	return slices.ContainsFunc(links, func(k kernel.Link) bool { return k.Name == name && k.Carrier })
}

// apply applies both halves, the inside first: it is where packets come from.
func (l *loop) apply(p plan.Plan) error {
	return errors.Join(l.d.Inside.Apply(p.Inside), l.d.Outside.Apply(p.Outside))
}

// publish makes the outcome the status, and tells keeper, linkd and console.
func (l *loop) publish(state netd.State, affirming bool, now time.Time) {
	d := l.d
	reason, detail := explain(state, l.in, l.in.uplink, l.fault, affirming)
	detail = netd.Plain(detail)
	d.mu.Lock()
	s := &d.status
	if s.State != state || s.Reason != reason || s.Detail != detail {
		if s.State != state {
			s.Since = now
		}
		s.State, s.Reason, s.Detail = state, reason, detail
		s.History = append(s.History, netd.Transition{At: now, State: state, Reason: reason, Detail: detail})
		s.History = slices.Delete(s.History, 0, max(0, len(s.History)-historySize))
		d.Log.Info("state", "state", state, "reason", reason, "detail", detail)
	}
	s.Uplink, s.Device, s.Unserved = l.in.uplink, l.in.gate.DeviceID, l.in.unserved
	s.Uplinks = make([]netd.Uplink, 0, len(l.in.candidates))
	for _, c := range l.in.candidates {
		s.Uplinks = append(s.Uplinks, c.Uplink)
	}
	if p, ok := l.proven(affirming, now); ok {
		s.Office = l.officeStatus(p, s.Office, now)
	} else {
		s.Office = nil
	}
	want := wanted{open: affirming && state >= netd.Portal, path: over(l.in.uplink), until: l.in.gate.NotAfter}
	wish := want != d.want
	d.want = want
	first := !d.ready && l.sealed
	d.ready = d.ready || l.sealed
	show := *s
	show.Tunnel = d.tunnelStatus()
	show.Words = show.Say()
	s.Words = show.Words
	d.mu.Unlock()
	d.Journal.Add(journal.Diff(l.shown, show, now)...)
	l.shown = show
	if wish {
		signal(d.keeper)
	}
	if pushed := (push{state, carrier(l.inside, netd.WorkLink), [2]netip.Addr{l.tunnel.Assignment.Inner, l.tunnel.Assignment.Inner6}}); pushed != l.pushed {
		l.pushed = pushed
		signal(d.pusher)
	}
	if first {
		d.Notify("READY=1")
	}
	if line := show.Line() + " / " + show.Words.JA; line != l.line {
		l.line = line
		d.Notify("STATUS=" + line)
	}
}
