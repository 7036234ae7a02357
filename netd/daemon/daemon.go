//go:build linux

// Package daemon is netd's loop. Every part of it only reports what it sees;
// each report means "derive again": facts → state → plan → kernel. One
// goroutine does that, and what it did last is what Status returns.
package daemon

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"sekisho/attest"
	"sekisho/attest/gate"
	"sekisho/guestlink"
	"sekisho/netd"
	"sekisho/netd/journal"
	"sekisho/netd/kernel"
	"sekisho/netd/office"
	"sekisho/netd/path"
	"sekisho/netd/plan"
	"sekisho/netd/tunnel"
	"sekisho/netd/uplink"
	"sekisho/netd/uplink/wpa"
)

const (
	beat        = time.Second      // of the loop: watchdog, expiry
	checkEvery  = 10 * time.Second // the kernel is compared with the plan at least this often
	sealRetry   = time.Second      // pause after the kernel refused a plan
	historySize = 32
)

// Attestation is what netd asks of attestd: gate.Client.
type Attestation interface {
	Wait(ctx context.Context, after uint64) (gate.Status, error)
	Credential(ctx context.Context) (*tls.Certificate, error)
}

// Namespace is what netd asks of a network namespace: kernel.Namespace.
type Namespace interface {
	Apply(plan.Namespace) error
	Links() ([]kernel.Link, error)
	Watch(context.Context) (<-chan struct{}, error)
}

// Uplinks is what netd asks of the keeper of its uplinks: uplink.Manager.
type Uplinks interface {
	Run(ctx context.Context, links <-chan []uplink.Link)
	// Doubt says that nothing comes back over an uplink.
	Doubt(ctx context.Context, name string)
	SetDevice(ctx context.Context, id string)
}

// Times keeps the last signed time: path.Kept.
type Times interface {
	Load() (time.Time, error)
	Store(time.Time) error
}

// Config is what a Daemon works with. Every field is needed but Notify, SetClock, Times and Pipe.
type Config struct {
	Organization    *attest.Organization
	Outside, Inside Namespace
	Driver          tunnel.Driver
	Attestation     Attestation
	// Wifi and Wired join links to networks: see uplink.Config. They may be nil.
	Wifi, Wired func(ctx context.Context, link string, report func(wpa.Facts))
	// Unserved lists network hardware without a link; it may be nil.
	Unserved func() []netd.Unserved
	// Access says what becomes of saved networks; it may be nil.
	Access func() netd.Access
	// Configure hands the work domain's configuration to linkd.
	Configure func(context.Context, guestlink.Config) error
	// Notify tells the service manager (sd_notify(3)).
	Notify func(string)
	// SetClock sets the system's clock to a signed time. Nil: nobody does.
	SetClock func(time.Time) error
	// Times keeps the last signed time over restarts; it may be nil.
	Times Times
	// Pipe is the way to an office's LAN, whose ends are netd.OfficeLink and
	// netd.OfficeOuterLink. Nil: there is none.
	Pipe Pipe
	// Watchdog says whether the service manager expects WATCHDOG=1.
	Watchdog bool
	Log      *slog.Logger
}

// Daemon is netd. Make one with New, and Run it once.
type Daemon struct {
	Config
	endpoints []netip.AddrPort
	// uplinks keeps the links ready and reports them: uplink.Manager.
	uplinks Uplinks
	quic    []netip.AddrPort // of endpoints: the gateways

	wake   chan struct{} // for the loop
	links  chan []uplink.Link
	keeper chan struct{} // for the tunnel's keeper
	pusher chan struct{} // for linkd's
	paths  chan office.Path
	asker  chan struct{} // for the path's watcher
	probe  func(context.Context, path.Prober, attest.Endpoint, bool) path.Result
	leapt  time.Time // when the clock was last set ahead; the path watcher's own
	// Journal is what has happened lately.
	Journal journal.Journal

	mu     sync.Mutex
	in     reports
	want   wanted
	ask    asked
	status netd.Status
	ready  bool
	radio  signals
}

// reports is what the parts have seen last.
type reports struct {
	candidates []uplink.Candidate // the uplinks there are
	uplink     netd.Uplink        // the one in use; the loop's choice
	gate       gate.Status
	granted    time.Time // end of the last credential, once it has lapsed
	asked      bool      // attestd's last answer was one
	silent     time.Time // since when it is not
	trouble    trouble   // of the tunnel
	office     office.Finding
	path       pathFinding
	kernel     bool // something in the kernel changed
	unserved   []netd.Unserved
}

// trouble is why the tunnel does not open; zero when nothing is known to be wrong.
type trouble struct {
	reason, what string
	since        time.Time
}

// wanted is what the keeper shall have open.
type wanted struct {
	open  bool
	path  tunnel.Path
	until time.Time
}

// New returns a Daemon.
func New(c Config) *Daemon {
	d := &Daemon{
		Config: c, wake: make(chan struct{}, 1), links: make(chan []uplink.Link, 1),
		radio: signals{}, keeper: make(chan struct{}, 1), pusher: make(chan struct{}, 1), paths: make(chan office.Path, 1), asker: make(chan struct{}, 1),
		probe: func(ctx context.Context, p path.Prober, e attest.Endpoint, clock bool) path.Result {
			return p.Ask(ctx, e, clock)
		},
	}
	keeper := uplink.Config{
		Report: d.reportUplinks, Policy: uplink.Policy{Rules: c.Organization.Uplinks, Groups: c.Organization.Groups},
		Wifi: c.Wifi, Wired: c.Wired,
	}
	for _, e := range slices.Concat(c.Organization.Verifiers, c.Organization.Gateways) {
		for _, a := range e.Addresses() {
			if !a.Addr().IsPrivate() {
				keeper.Claims = append(keeper.Claims, a.Addr())
			}
		}
	}
	if p := c.Organization.Proxy; p.IsValid() { // and no server straight
		d.endpoints = []netip.AddrPort{p}
	} else {
		for _, e := range c.Organization.Verifiers {
			d.endpoints = append(d.endpoints, e.Addresses()...)
		}
		for _, e := range c.Organization.Gateways {
			d.endpoints, d.quic = append(d.endpoints, e.Addresses()...), append(d.quic, e.Addresses()...)
		}
	}
	keeper.IPv6 = slices.ContainsFunc(d.endpoints, func(e netip.AddrPort) bool { return e.Addr().Is6() })
	if probe, err := uplink.Prober(c.Organization, dial, d.admitted); err == nil {
		keeper.Probe = probe
	} // without roots there is no tunnel either, and its keeper says so
	d.uplinks = uplink.New(keeper)
	d.in.silent = time.Now()
	d.status = netd.Status{Since: time.Now(), Reason: netd.ReasonKernel, Detail: "starting"}
	if d.SetClock == nil {
		d.SetClock = func(time.Time) error { return errors.ErrUnsupported }
	}
	if d.Notify == nil {
		d.Notify = func(string) {}
	}
	return d
}

// dial is tunnel.DialTCP over an uplink.
func dial(ctx context.Context, u netd.Uplink, mtu int, to, proxy netip.AddrPort) (net.Conn, error) {
	u.PathMTU = mtu
	return tunnel.DialTCP(ctx, over(u), to, proxy)
}

// over is the path of sessions over an uplink.
func over(u netd.Uplink) tunnel.Path {
	return tunnel.Path{Link: u.Name, Source: u.Address.Addr(), Source6: u.Address6, MTU: u.PathMTU}
}

// Run keeps the kernel, the tunnel and linkd as the facts ask until ctx is
// done. Then it closes: the ruleset of both namespaces passes nothing.
func (d *Daemon) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var parts sync.WaitGroup
	defer parts.Wait()
	defer cancel()
	for _, ns := range []Namespace{d.Outside, d.Inside} {
		parts.Go(func() { d.watch(ctx, ns) })
	}
	parts.Go(func() { d.followAttestation(ctx) })
	parts.Go(func() { d.uplinks.Run(ctx, d.links) })
	parts.Go(func() { d.keepTunnel(ctx) })
	parts.Go(func() { d.pushConfig(ctx) })
	parts.Go(func() { d.watchOffice(ctx) })
	parts.Go(func() { d.watchPath(ctx) })

	l := loop{d: d}
	tick := time.NewTimer(beat)
	defer tick.Stop()
	for {
		now := time.Now()
		l.step(now)
		tick.Reset(l.next(now))
		if d.Watchdog {
			d.Notify("WATCHDOG=1")
		}
		select {
		case <-ctx.Done():
			return errors.Join(ctx.Err(), l.apply(plan.Make(l.situation(netd.Dark))))
		case <-d.wake:
		case <-tick.C:
		}
	}
}

// Status returns the present status.
func (d *Daemon) Status() netd.Status {
	d.mu.Lock()
	s := d.status
	s.History = slices.Clone(s.History)
	s.Signals = d.radio.clone()
	d.mu.Unlock()
	s.Tunnel = d.tunnelStatus()
	if d.Access != nil {
		a := d.Access()
		s.Access = &a
	}
	return s
}

func (d *Daemon) tunnelStatus() *netd.TunnelStatus {
	t := d.Driver.Status()
	if !t.Open {
		return nil
	}
	return &netd.TunnelStatus{
		Gateway: t.Gateway, Inner: t.Assignment.Inner, Inner6: t.Assignment.Inner6, MTU: t.Assignment.MTU, DNS: t.Assignment.DNS,
		Carriage: t.Carriage, Since: t.Since, Until: t.Until, Cipher: t.Cipher, Counters: t.Counters,
	}
}

// admitted reports whether attestation opens the tunnel's gate now.
func (d *Daemon) admitted() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	_, open := gate.Open(d.in.gate, gate.Tunnel, time.Now())
	return open
}

// update changes the reports and wakes the loop.
func (d *Daemon) update(f func(*reports)) {
	d.mu.Lock()
	f(&d.in)
	d.mu.Unlock()
	signal(d.wake)
}

func signal(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

func (d *Daemon) reportUplinks(list []uplink.Candidate) {
	d.update(func(r *reports) {
		r.candidates = list
		d.radio.note(list, time.Now())
	})
}

// watch wakes the loop with every change in ns.
func (d *Daemon) watch(ctx context.Context, ns Namespace) {
	for ctx.Err() == nil {
		changes, err := ns.Watch(ctx)
		if err != nil {
			d.Log.Error("cannot watch the kernel; comparing now and then instead", "err", err)
			wait(ctx, checkEvery, nil)
			continue
		}
		d.update(func(r *reports) { r.kernel = true })
		for range changes {
			d.update(func(r *reports) { r.kernel = true })
		}
	}
}

// followAttestation keeps the reports equal to what attestd says. While
// attestd is silent the last answer stands until the credential's end.
func (d *Daemon) followAttestation(ctx context.Context) {
	var version uint64
	var device string // that the uplinks' keeper knows
	for ctx.Err() == nil {
		st, err := d.Attestation.Wait(ctx, version)
		if err != nil {
			version = 0 // a restarted attestd counts from the start
			d.update(func(r *reports) {
				if r.asked {
					r.asked, r.silent = false, time.Now()
				}
			})
			wait(ctx, time.Second, nil)
			continue
		}
		version = st.Version
		// First, for it may close; the uplinks' keeper may be busy.
		d.update(func(r *reports) { r.gate, r.asked = st, true })
		if st.DeviceID != device {
			device = st.DeviceID
			d.uplinks.SetDevice(ctx, device)
		}
	}
}

// wait returns after a time, when ctx is done, or early on a signal.
func wait(ctx context.Context, t time.Duration, early <-chan struct{}) {
	timer := time.NewTimer(t)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	case <-early:
	}
}

// explain returns reason code and sentence for a state; all is well in Tunnel.
func explain(s netd.State, r reports, u netd.Uplink, fault error, affirming bool) (reason, detail string) {
	at := func(t time.Time) string { return t.UTC().Truncate(time.Second).Format(time.RFC3339) }
	switch s {
	case netd.Dark:
		if fault != nil {
			return netd.ReasonKernel, fault.Error()
		}
		return cmp.Or(u.Reason, netd.ReasonNoLink), u.Detail
	case netd.Linked:
		return netd.ReasonAttestd, "attestd does not answer since " + at(r.silent)
	case netd.Portal:
		return netd.ReasonPortal, fmt.Sprintf("%s is answered by somebody else: %s", r.path.who, r.path.what)
	case netd.Attesting:
		switch {
		case !affirming && !r.granted.IsZero() && (r.gate.State == gate.StateUnreachable || r.gate.State == gate.StateAttesting || r.gate.State == gate.StateAffirming || !r.asked):
			detail := "attestation lapsed at " + at(r.granted)
			if r.gate.State == gate.StateUnreachable {
				detail += ", verifier unreachable since " + at(r.gate.Since)
			}
			return netd.ReasonLapsed, detail
		case affirming && r.trouble.reason != "":
			return r.trouble.reason, fmt.Sprintf("%s since %s", r.trouble.what, at(r.trouble.since))
		case affirming:
			return netd.ReasonConnecting, "opening the tunnel"
		case r.gate.State == gate.StateUnreachable:
			return cmp.Or(r.gate.Reason, netd.ReasonVerifier), "verifier unreachable since " + at(r.gate.Since)
		}
		return cmp.Or(r.gate.Reason, netd.ReasonAttestation), cmp.Or(r.gate.Detail, "attestation is "+r.gate.State)
	}
	return "", ""
}
