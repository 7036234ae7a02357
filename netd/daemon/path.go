//go:build linux

package daemon

import (
	"cmp"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"

	"sekisho/attest"
	"sekisho/netd"
	"sekisho/netd/journal"
	"sekisho/netd/path"
)

const (
	// askEvery is how often the servers are asked who they are while nothing is
	// open, and clockEvery how often the verifier is asked for the time at least.
	askEvery, clockEvery = 5 * time.Second, 10 * time.Minute
	// slept is how far the wall clock may run away from the monotonic one,
	// which stands still while the laptop is suspended, before it is doubted.
	slept = 5 * time.Second
	// leap is how far ahead of the clock a signed time may be to be kept over
	// restarts at once. A farther one is kept when it has stood for as long: a
	// verifier whose clock runs ahead for a while must not shut laptops out until
	// the world has caught up.
	leap = time.Hour
)

// asked is what the path's watcher is to find out.
type asked struct {
	link    string
	source  [2]netip.Addr // IPv4 and IPv6; see sources
	flaps   uint32
	closed  bool // nothing is open: ask often, and who answers
	doubted int  // rises when the clock is in doubt
}

// pathFinding is what the path's watcher found on an uplink.
type pathFinding struct {
	link   string
	source [2]netip.Addr
	flaps  uint32
	portal bool
	who    netip.AddrPort // where somebody else answers
	what   string
}

// watchPath asks the servers who they are, and verifiers for the time.
func (d *Daemon) watchPath(ctx context.Context) {
	roots, err := d.Organization.Roots()
	if err != nil {
		d.Log.Error("no path probe", "err", err)
		return
	}
	floor := d.recall(certificates(d.Organization.CA))
	var last, want asked
	var clocked time.Time // when the verifier signed the time last
	for ctx.Err() == nil {
		d.mu.Lock()
		want = d.ask
		d.mu.Unlock()
		due := want != last && (want.closed || want.doubted != last.doubted) || want.closed || time.Since(clocked) > clockEvery
		if want.link != "" && due {
			var signed bool
			if floor, signed = d.askPath(ctx, want, path.Prober{Agreement: d.Organization.KeyAgreement, Proxy: d.Organization.Proxy, Roots: roots, Floor: floor, Link: want.link, Source: want.source[0], Source6: want.source[1]}); signed {
				clocked = time.Now()
			} else if !want.closed {
				clocked = time.Now().Add(askEvery - clockEvery) // soon again
			}
		}
		last = want
		wait(ctx, askEvery/2+rand.N(askEvery/2), d.asker)
	}
}

// recall returns the floor to begin with, and puts the clock there if it is
// behind: a laptop that was off has not gone back in time. A kept time from
// after the end of the organisation's CA is a fault of whatever kept it.
func (d *Daemon) recall(roots []*x509.Certificate) time.Time {
	floor, end := path.Floor(roots), time.Time{}
	for _, c := range roots {
		if c.NotAfter.After(end) {
			end = c.NotAfter
		}
	}
	if d.Times == nil {
		return floor
	}
	kept, err := d.Times.Load()
	switch {
	case errors.Is(err, fs.ErrNotExist): // of a new laptop
	case err != nil, kept.After(end):
		d.Log.Warn("no use of the last signed time", "kept", kept, "err", err)
	case kept.After(floor):
		floor = kept
	}
	if local := time.Now(); local.Before(floor.Add(-path.Tolerance)) {
		d.setClock(local, floor, "the last signed time", "前回の署名付き時刻")
	}
	return floor
}

// setClock sets the clock and notes it, with the reason in both languages.
func (d *Daemon) setClock(local, right time.Time, why, whyJA string) {
	err := d.SetClock(right)
	was, is := local.UTC().Format(time.RFC3339), right.UTC().Format(time.RFC3339)
	d.Log.Warn("clock", "was", was, "right", is, "why", why, "err", err)
	e := journal.Event{At: right, Kind: journal.Clock, Code: "set",
		EN: fmt.Sprintf("clock was %s, set to %s, %s", was, is, why),
		JA: fmt.Sprintf("時計を %s から %s に修正（%s）", was, is, whyJA)}
	if err != nil {
		e.Code, e.EN, e.JA = "wrong", e.EN+": "+err.Error(), e.JA+": 失敗"
	}
	d.Journal.Add(e)
	signal(d.wake)
}

// askPath asks every server once. It returns the floor for the next time, and
// whether a verifier signed the time.
func (d *Daemon) askPath(ctx context.Context, want asked, p path.Prober) (floor time.Time, signed bool) {
	var mu sync.Mutex
	var all sync.WaitGroup
	var results []path.Result
	ask := func(r path.Result) {
		mu.Lock()
		defer mu.Unlock()
		results = append(results, r)
	}
	each := func(servers []attest.Endpoint, clock bool) {
		for _, e := range servers {
			addresses := e.Addresses()
			if p.Proxy.IsValid() {
				addresses = addresses[len(addresses)-1:]
			}
			for _, a := range addresses {
				e.Address = a
				if first := cmp.Or(p.Proxy, a); want.source[family(first.Addr())].IsValid() {
					all.Go(func() { ask(d.probe(ctx, p, e, clock)) })
				}
			}
		}
	}
	each(d.Organization.Verifiers, true)
	if want.closed {
		each(d.Organization.Gateways, false)
	}
	all.Wait()
	f := pathFinding{link: want.link, source: want.source, flaps: want.flaps}
	var answers []path.Answer
	floor = p.Floor
	for _, r := range results {
		answers = append(answers, r.Answer)
		if r.Answer == path.Foreign && !f.who.IsValid() {
			f.who, f.what = r.Endpoint, r.What
		}
		if !r.Time.IsZero() && !signed {
			floor, signed = d.correct(r, p.Floor)
		}
	}
	f.portal = path.Portal(answers)
	if ctx.Err() == nil && want.closed {
		d.update(func(r *reports) { r.path = f })
	}
	return floor, signed
}

// sources are an uplink's addresses, of which either may be invalid: IPv4 and
// IPv6, at the places that family gives.
func sources(u netd.Uplink) [2]netip.Addr { return [2]netip.Addr{u.Address.Addr(), u.Address6} }

func family(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}

// correct sets the clock if a signed time says that it is wrong, and returns
// the floor that follows: the right time itself, for time does not go back.
func (d *Daemon) correct(r path.Result, floor time.Time) (time.Time, bool) {
	local := time.Now()
	right, set, err := path.Correct(local, r.Time, r.Trip, floor)
	if err != nil {
		d.Log.Warn("time refused", "from", r.Endpoint, "err", err)
		return floor, false
	}
	if set {
		d.setClock(local, right, fmt.Sprintf("signed by %s", r.Endpoint), fmt.Sprintf("%s の署名付き時刻", r.Endpoint))
	}
	if right.Sub(local) > leap {
		d.leapt = time.Now()
	}
	if d.Times != nil && (d.leapt.IsZero() || time.Since(d.leapt) >= leap) {
		if err := d.Times.Store(right); err != nil {
			d.Log.Warn("the signed time is not kept", "err", err)
		}
	}
	return right, true
}

// look tells the path's watcher what the loop wants to know.
func (l *loop) look(state netd.State, now time.Time) {
	u := l.in.uplink
	// The monotonic clock does not run in suspend, the wall clock does, and
	// neither does anybody who sets it: both are reasons to ask.
	if !l.looked0.IsZero() && (now.Round(0).Sub(l.looked0.Round(0))-now.Sub(l.looked0)).Abs() > slept {
		l.ask.doubted++
	}
	l.looked0 = now
	want := asked{doubted: l.ask.doubted}
	if u.Usable() {
		want.link, want.source, want.flaps = u.Name, sources(u), l.flaps(u.Name)
		want.closed = !l.tunnel.Open
	}
	if l.tunnel.Open && l.in.path.portal { // whoever it was has let us through
		l.d.mu.Lock()
		l.d.in.path = pathFinding{}
		l.d.mu.Unlock()
	}
	if want == l.ask {
		return
	}
	l.ask = want
	l.d.mu.Lock()
	l.d.ask = want
	l.d.mu.Unlock()
	signal(l.d.asker)
}

// portal reports whether the last answers on the present uplink were somebody else's.
func (l *loop) portal() bool {
	p, u := l.in.path, l.in.uplink
	return p.portal && p.link == u.Name && p.source == sources(u) && p.flaps == l.flaps(u.Name)
}

func (l *loop) flaps(name string) uint32 {
	for _, k := range l.outside {
		if k.Name == name {
			return k.Flaps
		}
	}
	return 0
}

// certificates parses those in PEM that can be; the pool made of the same text
// has refused the rest.
func certificates(text string) (out []*x509.Certificate) {
	for rest := []byte(text); ; {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			return out
		}
		if c, err := x509.ParseCertificate(b.Bytes); err == nil {
			out = append(out, c)
		}
	}
}
