//go:build linux

package daemon

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io/fs"
	"log/slog"
	"math/big"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"sekisho/attest"
	"sekisho/attest/gate"
	"sekisho/guestlink"
	"sekisho/netd"
	"sekisho/netd/kernel"
	"sekisho/netd/path"
	"sekisho/netd/plan"
	"sekisho/netd/tunnel"
	"sekisho/netd/uplink"
)

// fakeNS is a kernel in memory.
type fakeNS struct {
	mu    *sync.Mutex
	links []kernel.Link
	held  plan.Namespace
	fail  func(plan.Namespace) error
}

func (n *fakeNS) Apply(p plan.Namespace) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.fail != nil {
		if err := n.fail(p); err != nil {
			return err
		}
	}
	n.held = p
	return nil
}
func (n *fakeNS) Links() ([]kernel.Link, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.links), nil
}
func (n *fakeNS) Watch(ctx context.Context) (<-chan struct{}, error) {
	c := make(chan struct{})
	context.AfterFunc(ctx, func() { close(c) })
	return c, nil
}

// fakeDriver opens at once, or fails.
type fakeDriver struct {
	mu     *sync.Mutex
	status tunnel.Status
	ended  chan struct{}
	ups    []tunnel.Target
	err    error
}

func (f *fakeDriver) Up(_ context.Context, to tunnel.Target) (tunnel.Assignment, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ups = append(f.ups, to)
	if f.err != nil {
		return tunnel.Assignment{}, f.err
	}
	a := tunnel.Assignment{Inner: netip.MustParseAddr("10.80.0.2"), MTU: 1400}
	f.ended = make(chan struct{})
	f.status = tunnel.Status{Open: true, Gateway: to.Gateway.Address, Assignment: a, Until: to.Until, Changed: f.ended}
	return a, nil
}
func (f *fakeDriver) Rebind(ctx context.Context, path tunnel.Path) error {
	f.mu.Lock()
	to := f.ups[len(f.ups)-1]
	f.mu.Unlock()
	to.Path = path
	_, err := f.Up(ctx, to)
	return err
}
func (f *fakeDriver) Status() tunnel.Status {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.status
}
func (f *fakeDriver) Down() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.status.Open {
		f.status.Open, f.status.Err = false, errors.New("closed")
		close(f.ended)
	}
}

// fakeAttestd answers with what the test puts in.
type fakeAttestd struct{ answers chan any }

func (f *fakeAttestd) Wait(ctx context.Context, _ uint64) (gate.Status, error) {
	select {
	case <-ctx.Done():
		return gate.Status{}, ctx.Err()
	case a := <-f.answers:
		if err, ok := a.(error); ok {
			return gate.Status{}, err
		}
		return a.(gate.Status), nil
	}
}
func (f *fakeAttestd) Credential(context.Context) (*tls.Certificate, error) {
	return &tls.Certificate{Leaf: &x509.Certificate{NotAfter: time.Now().Add(24 * time.Hour)}}, nil
}

// rig is a daemon over fakes. mu guards what it shares with the daemon.
type rig struct {
	mu              sync.Mutex
	t               *testing.T
	outside, inside *fakeNS
	driver          *fakeDriver
	attestd         *fakeAttestd
	d               *Daemon
	lines           []string
	answer          path.Answer // of every server
	signed          time.Time   // what the verifier signs
	clock           []time.Time // to which the clock was set
	doubted         []string    // uplinks that were said to be dead
}

func runRig(t *testing.T, script func(*rig)) {
	synctest.Test(t, func(t *testing.T) {
		r := &rig{
			t: t, attestd: &fakeAttestd{make(chan any, 1)},
			outside: &fakeNS{links: []kernel.Link{{Index: 2, Name: "eth0", Ethernet: true, Hardware: net.HardwareAddr{2, 0, 0, 0, 0, 1}}}},
			inside:  &fakeNS{links: []kernel.Link{{Index: 2, Name: netd.TunnelLink}, {Index: 3, Name: netd.WorkLink}}},
		}
		r.outside.mu, r.inside.mu, r.driver = &r.mu, &r.mu, &fakeDriver{mu: &r.mu}
		e := attest.Endpoint{Address: netip.MustParseAddrPort("203.0.113.20:443"), ServerName: "gateway.test"}
		r.d = New(Config{
			Organization: &attest.Organization{CA: newCA(t), Verifiers: []attest.Endpoint{e}, Gateways: []attest.Endpoint{e}},
			Outside:      r.outside, Inside: r.inside, Driver: r.driver, Attestation: r.attestd,
			Configure: func(context.Context, guestlink.Config) error { return nil },
			SetClock:  func(at time.Time) error { r.set(func() { r.clock = append(r.clock, at) }); return nil },
			Notify:    func(s string) { r.set(func() { r.lines = append(r.lines, s) }) },
			Log:       slog.New(slog.DiscardHandler),
		})
		r.d.uplinks = r
		r.report(netd.Uplink{Name: "eth0", Reason: netd.ReasonNoCarrier, Detail: "no carrier on eth0"})
		r.d.probe = func(_ context.Context, _ path.Prober, e attest.Endpoint, clock bool) path.Result {
			r.mu.Lock()
			defer r.mu.Unlock()
			a := path.Result{Endpoint: e.Address, Answer: r.answer, What: "certificate of \x1b[2J\nhotel"}
			if clock {
				a.Time = r.signed
			}
			return a
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- r.d.Run(ctx) }()
		synctest.Wait()
		script(r)
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run: %v", err)
		}
		if len(r.inside.held.Routes) != 0 || len(r.outside.held.Addresses) != 0 {
			t.Errorf("not closed at the end: %s", plan.Plan{Outside: r.outside.held, Inside: r.inside.held})
		}
	})
}

// set changes what the daemon sees, or looks at what it did.
func (r *rig) set(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f()
}

// sessions is how many were opened so far.
func (r *rig) sessions() (n int) {
	r.set(func() { n = len(r.driver.ups) })
	return n
}

// lease plugs the cable in and reports a lease, as the uplink's manager would.
func (r *rig) lease(address string) {
	r.set(func() { r.outside.links[0].Carrier = true })
	r.report(netd.Uplink{Name: "eth0", Carrier: true, Address: netip.MustParsePrefix(address), Router: netip.MustParseAddr("192.168.50.1"), MTU: 1500})
}

// report reports uplinks in the organisation's order, as their keeper would.
func (r *rig) report(list ...netd.Uplink) {
	var candidates []uplink.Candidate
	for i, u := range list {
		candidates = append(candidates, uplink.Candidate{Uplink: u, Index: 2 + i, Place: i})
	}
	r.d.reportUplinks(candidates)
}

// The rig stands in for the keeper of the uplinks too.
func (r *rig) Run(ctx context.Context, _ <-chan []uplink.Link) { <-ctx.Done() }
func (r *rig) Doubt(_ context.Context, name string) {
	r.set(func() { r.doubted = append(r.doubted, name) })
}
func (r *rig) SetDevice(context.Context, string) {}

// newCA makes a certificate authority in PEM.
func newCA(t *testing.T) string {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().AddDate(0, -1, 0), NotAfter: time.Now().AddDate(1, 0, 0), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

func (r *rig) want(state netd.State, reason string) {
	r.t.Helper()
	synctest.Wait()
	if s := r.d.Status(); s.State != state || s.Reason != reason {
		r.t.Fatalf("%s, reason %q, want %s %q; history %+v", s.Line(), s.Reason, state, reason, s.History)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if open := len(r.inside.held.Routes) > 0; open != (state == netd.Tunnel) {
		r.t.Fatalf("inside in state %s:\n%s", state, r.inside.held)
	}
}

func affirming(life time.Duration) gate.Status {
	return gate.Status{State: gate.StateAffirming, NotAfter: time.Now().Add(life), DeviceID: "d1"}
}

func sleep(d time.Duration) { <-time.After(d) } // virtual time

func TestExplain(t *testing.T) {
	at := time.Date(2026, 11, 21, 10, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		state     netd.State
		in        reports
		fault     error
		affirming bool
		reason    string
		detail    string
	}{
		{state: netd.Dark, fault: errors.New("no nftables"), reason: netd.ReasonKernel, detail: "no nftables"},
		{state: netd.Dark, in: reports{uplink: netd.Uplink{Reason: netd.ReasonNoCarrier, Detail: "no carrier on eth0"}}, reason: netd.ReasonNoCarrier, detail: "no carrier on eth0"},
		{state: netd.Linked, in: reports{silent: at}, reason: netd.ReasonAttestd, detail: "attestd does not answer since 2026-11-21T10:00:00Z"},
		{state: netd.Attesting, in: reports{gate: gate.Status{State: gate.StateUnreachable, Since: at}}, reason: netd.ReasonVerifier, detail: "verifier unreachable since 2026-11-21T10:00:00Z"},
		{state: netd.Attesting, in: reports{gate: gate.Status{State: gate.StateRefused, Reason: "pcr-mismatch", Detail: "kernel differs"}}, reason: "pcr-mismatch", detail: "kernel differs"},
		{state: netd.Attesting, in: reports{gate: gate.Status{State: gate.StateAffirming, NotAfter: at}, granted: at}, reason: netd.ReasonLapsed, detail: "attestation lapsed at 2026-11-21T10:00:00Z"},
		{state: netd.Attesting, in: reports{gate: gate.Status{State: gate.StateUnreachable, Since: at}, granted: at, asked: true}, reason: netd.ReasonLapsed, detail: "attestation lapsed at 2026-11-21T10:00:00Z, verifier unreachable since 2026-11-21T10:00:00Z"},
		{state: netd.Portal, in: reports{path: pathFinding{who: netip.MustParseAddrPort("203.0.113.10:443"), what: "not TLS"}}, reason: netd.ReasonPortal, detail: "203.0.113.10:443 is answered by somebody else: not TLS"},
		{state: netd.Attesting, affirming: true, reason: netd.ReasonConnecting, detail: "opening the tunnel"},
		{state: netd.Attesting, affirming: true, in: reports{trouble: trouble{netd.ReasonGateway, "gateway 203.0.113.20:443 unreachable", at}}, reason: netd.ReasonGateway, detail: "gateway 203.0.113.20:443 unreachable since 2026-11-21T10:00:00Z"},
		{state: netd.Tunnel},
	} {
		if reason, detail := explain(c.state, c.in, c.in.uplink, c.fault, c.affirming); reason != c.reason || detail != c.detail {
			t.Errorf("%s: %q, %q, want %q, %q", c.state, reason, detail, c.reason, c.detail)
		}
	}
}

func TestFromDarkToTunnelAndBack(t *testing.T) {
	runRig(t, func(r *rig) {
		r.want(netd.Dark, netd.ReasonNoCarrier)
		r.set(func() {
			if !slices.Contains(r.lines, "READY=1") {
				t.Errorf("not ready although closed and read back: %q", r.lines)
			}
		})
		r.lease("192.168.50.23/24")
		r.want(netd.Linked, netd.ReasonAttestd)
		r.set(func() {
			if got := r.outside.held.Addresses; len(got) != 1 || got[0].Link != "eth0" {
				t.Errorf("addresses outside: %v", got)
			}
		})
		r.attestd.answers <- gate.Status{State: gate.StateAttesting}
		r.want(netd.Attesting, netd.ReasonAttestation)

		r.set(func() { r.driver.err = errors.New("connection refused") })
		r.attestd.answers <- affirming(time.Hour)
		r.want(netd.Attesting, netd.ReasonGateway)
		r.set(func() { r.driver.err = nil })
		sleep(2 * time.Second)
		r.want(netd.Tunnel, "")
		r.set(func() {
			if line := r.lines[len(r.lines)-1]; line != "STATUS=Tunnel inner 10.80.0.2 gateway 203.0.113.20:443 / LGWAN に接続中" {
				t.Errorf("last line %q", line)
			}
		})

		// The gateway dies; back-off brings the tunnel back.
		r.driver.Down()
		sleep(2 * time.Second)
		r.want(netd.Tunnel, "")

		// attestd dies: what it granted stands. It comes back with a renewed
		// credential: a new session is opened while the old one stands.
		r.attestd.answers <- errors.New("connection refused")
		sleep(5 * time.Second)
		r.want(netd.Tunnel, "")
		before := r.sessions()
		r.attestd.answers <- affirming(2 * time.Hour)
		r.want(netd.Tunnel, "")
		if n := r.sessions() - before; n != 1 {
			t.Errorf("%d sessions opened for the renewed credential, want 1", n)
		}

		// The verifier is away for an hour, the certificate still good.
		sleep(time.Hour)
		r.want(netd.Tunnel, "")

		// A refusal closes at once, the same device may come back.
		r.attestd.answers <- gate.Status{State: gate.StateRefused, Reason: "pcr-mismatch", Detail: "kernel differs"}
		r.want(netd.Attesting, "pcr-mismatch")
		if r.driver.Status().Open {
			t.Error("session open after a refusal")
		}
		r.attestd.answers <- affirming(time.Minute)
		r.want(netd.Tunnel, "")

		// Another address: the session moves.
		r.lease("192.168.50.99/24")
		r.want(netd.Tunnel, "")
		r.set(func() {
			if got := r.driver.ups[len(r.driver.ups)-1].Path.Source.String(); got != "192.168.50.99" {
				t.Errorf("session from %s, want the new address", got)
			}
		})

		// The credential lapses with nobody there to renew it.
		sleep(time.Minute + 2*time.Second)
		r.want(netd.Attesting, netd.ReasonLapsed)
		r.attestd.answers <- affirming(time.Hour)
		r.want(netd.Tunnel, "")

		// The cable goes, before the DHCP client has noticed.
		r.set(func() { r.outside.links[0].Carrier = false })
		sleep(2 * time.Second)
		r.want(netd.Dark, netd.ReasonNoCarrier)
		if r.driver.Status().Open {
			t.Error("session open without an uplink")
		}
	})
}

func TestKernelThatRefusesStaysClosed(t *testing.T) {
	runRig(t, func(r *rig) {
		r.set(func() {
			r.inside.fail = func(p plan.Namespace) error {
				if len(p.Routes) > 0 {
					return errors.New("no such device")
				}
				return nil
			}
		})
		r.lease("192.168.50.23/24")
		r.attestd.answers <- affirming(time.Hour)
		r.want(netd.Dark, netd.ReasonKernel)
		r.set(func() { r.inside.fail = nil })
		sleep(5 * time.Second)
		r.want(netd.Tunnel, "")
	})
}

func TestWork0ComesLate(t *testing.T) {
	runRig(t, func(r *rig) {
		r.set(func() { r.inside.links = r.inside.links[:1] })
		r.lease("192.168.50.23/24")
		r.attestd.answers <- affirming(time.Hour)
		synctest.Wait()
		s := r.d.Status()
		r.set(func() {
			if s.State != netd.Tunnel || len(r.inside.held.Routes) > 0 {
				t.Errorf("%s, routes %v: want none before work0 is there", s.Line(), r.inside.held.Routes)
			}
			r.inside.links = append(r.inside.links, kernel.Link{Index: 3, Name: netd.WorkLink})
		})
		sleep(2 * time.Second)
		r.want(netd.Tunnel, "")
	})
}

// TestUplinkIsLostAndAnotherTaken: the state stays Tunnel all the time, and the
// session moves at once.
func TestUplinkIsLostAndAnotherTaken(t *testing.T) {
	runRig(t, func(r *rig) {
		eth := netd.Uplink{Name: "eth0", Kind: netd.KindWired, Carrier: true, Address: netip.MustParsePrefix("192.168.50.23/24"), Router: netip.MustParseAddr("192.168.50.1"), MTU: 1500, Health: netd.HealthGood}
		stick := netd.Uplink{Name: "usb0", Kind: netd.KindUSB, Carrier: true, Address: netip.MustParsePrefix("192.168.8.100/24"), Router: netip.MustParseAddr("192.168.8.1"), MTU: 1500, Health: netd.HealthGood}
		r.set(func() {
			r.outside.links = append(r.outside.links, kernel.Link{Index: 3, Name: "usb0", Ethernet: true, Carrier: true})
			r.outside.links[0].Carrier = true
		})
		r.report(eth, stick)
		r.attestd.answers <- affirming(time.Hour)
		r.want(netd.Tunnel, "")
		last := func() (to tunnel.Target) { r.set(func() { to = r.driver.ups[len(r.driver.ups)-1] }); return to }
		if to := last(); to.Path.Link != "eth0" || to.Path.Source.String() != "192.168.50.23" {
			t.Errorf("session over %s from %s", to.Path.Link, to.Path.Source)
		}
		r.set(func() {
			if n := len(r.outside.held.Addresses); n != 2 {
				t.Errorf("%d addresses outside, want those of both uplinks: %s", n, r.outside.held)
			}
			r.outside.links[0].Carrier = false // and the keeper has not noticed
		})
		before := r.d.Status().Since
		signal(r.d.wake)
		r.want(netd.Tunnel, "")
		if to := last(); to.Path.Link != "usb0" || to.Path.Source.String() != "192.168.8.100" {
			t.Errorf("session over %s from %s after the cable was pulled", to.Path.Link, to.Path.Source)
		}
		if s := r.d.Status(); !s.Since.Equal(before) || s.Uplink.Name != "usb0" || len(s.Uplinks) != 2 {
			t.Errorf("status %+v, want Tunnel all the time", s)
		}

		// It comes back: not at once, but when it has settled.
		r.set(func() { r.outside.links[0].Carrier = true })
		eth.Since = time.Now()
		stick.Since = eth.Since
		list := []uplink.Candidate{{Uplink: eth, Index: 2, Settle: 3 * time.Second}, {Uplink: stick, Index: 3, Place: 1}}
		r.d.reportUplinks(list)
		r.want(netd.Tunnel, "")
		if to := last(); to.Path.Link != "usb0" {
			t.Error("moved to an uplink that has just come back")
		}
		sleep(4 * time.Second)
		r.want(netd.Tunnel, "")
		if to := last(); to.Path.Link != "eth0" {
			t.Errorf("session over %s, want the preferred uplink", to.Path.Link)
		}

		// Silence on the present one is told to the keeper.
		r.set(func() { r.driver.err = context.DeadlineExceeded })
		r.driver.Down()
		sleep(2 * time.Second)
		r.set(func() {
			if !slices.Contains(r.doubted, "eth0") {
				t.Errorf("doubted %q", r.doubted)
			}
		})
	})
}

// TestPortal: somebody else answers in place of every server; then the user has
// signed in.
func TestPortal(t *testing.T) {
	runRig(t, func(r *rig) {
		r.set(func() { r.answer, r.driver.err = path.Foreign, errors.New("certificate of a hotel") })
		r.attestd.answers <- affirming(time.Hour)
		r.lease("192.168.50.23/24")
		sleep(askEvery)
		r.want(netd.Portal, netd.ReasonPortal)
		if s := r.d.Status(); s.Words.EN != "Sign in to this network" || !strings.HasSuffix(s.Detail, "certificate of ?[2J?hotel") {
			t.Errorf("words %+v, detail %q", s.Words, s.Detail)
		}
		sleep(time.Hour - time.Minute) // a portal stays one for as long as it answers
		r.want(netd.Portal, netd.ReasonPortal)
		r.set(func() { r.answer, r.driver.err = path.Ours, nil })
		r.attestd.answers <- affirming(time.Hour)
		sleep(maxPause)
		r.want(netd.Tunnel, "")
		// What the portal was is forgotten.
		r.set(func() { r.answer, r.driver.err = path.Silent, errors.New("no answer") })
		r.driver.Down()
		sleep(time.Second)
		r.want(netd.Attesting, netd.ReasonGateway)
		r.set(func() { r.answer, r.driver.err = path.Ours, nil })
		sleep(maxPause)
		r.want(netd.Tunnel, "")
		// Another network is not that portal.
		r.set(func() { r.answer, r.driver.err = path.Foreign, errors.New("certificate of a hotel") })
		r.driver.Down()
		sleep(2 * askEvery)
		r.want(netd.Portal, netd.ReasonPortal)
		r.set(func() { r.answer = path.Silent })
		r.lease("192.168.60.23/24")
		r.want(netd.Attesting, netd.ReasonGateway)
	})
}

// TestClock: a signed time sets a wrong clock, once, and one from before what
// is known to be past does not.
func TestClock(t *testing.T) {
	runRig(t, func(r *rig) {
		r.set(func() { r.answer, r.signed = path.Ours, time.Now().AddDate(1, 0, 0) })
		r.lease("192.168.50.23/24")
		sleep(askEvery)
		r.set(func() {
			if len(r.clock) == 0 || r.clock[0].Sub(r.signed).Abs() > path.Tolerance {
				t.Fatalf("clock set to %v, signed %v", r.clock, r.signed)
			}
			r.clock, r.signed = nil, time.Now().AddDate(0, 6, 0) // later than now, but before what was signed
		})
		sleep(3 * askEvery)
		r.set(func() {
			if len(r.clock) != 0 {
				t.Errorf("clock set back to %v", r.clock)
			}
		})
	})
}

// kept is a Times.
type kept struct {
	at  time.Time
	err error
}

func (k *kept) Load() (time.Time, error) { return k.at, k.err }
func (k *kept) Store(at time.Time) error { k.at, k.err = at, nil; return nil }

// TestRecall: what was signed before a restart is past after it. A clock from
// before it is put there; a floor that cannot be is not used.
func TestRecall(t *testing.T) {
	roots := certificates(newCA(t))
	begin, end, now := roots[0].NotBefore, roots[0].NotAfter, time.Now()
	for name, c := range map[string]struct {
		times Times
		floor time.Time
		set   bool // the clock
	}{
		"nobody keeps it":     {nil, begin, false},
		"a new laptop":        {&kept{err: fs.ErrNotExist}, begin, false},
		"damaged":             {&kept{at: now, err: errors.New("damaged")}, begin, false},
		"from before the CA":  {&kept{at: begin.Add(-time.Hour)}, begin, false},
		"of a minute ago":     {&kept{at: now.Add(-time.Minute)}, now.Add(-time.Minute), false},
		"the clock went back": {&kept{at: now.Add(time.Minute)}, now.Add(time.Minute), true},
		"from after the CA":   {&kept{at: end.Add(time.Hour)}, begin, false},
	} {
		var set []time.Time
		d := New(Config{Organization: &attest.Organization{}, Times: c.times, Log: slog.New(slog.DiscardHandler),
			SetClock: func(at time.Time) error { set = append(set, at); return nil }})
		if got := d.recall(roots); !got.Equal(c.floor) || len(set) == 1 != c.set || c.set && !set[0].Equal(c.floor) {
			t.Errorf("%s: floor %s, want %s; clock set to %v", name, got, c.floor, set)
		}
	}
}

// TestVerifierAwayForAnHour: with two hours of certificate left the verifier goes
// away for one. LGWAN stays open over the same session; had it stayed away, the
// second hour's end would have closed it on time.
func TestVerifierAwayForAnHour(t *testing.T) {
	runRig(t, func(r *rig) {
		r.lease("192.168.50.23/24")
		granted := affirming(2 * time.Hour)
		r.attestd.answers <- granted
		r.want(netd.Tunnel, "")
		since, sessions := r.d.Status().Since, r.sessions()
		away := granted
		away.Detail = "no answer" // as attestd says while what was granted holds
		for range 60 {
			sleep(time.Minute)
			r.attestd.answers <- away
			r.want(netd.Tunnel, "")
		}
		if s := r.d.Status(); !s.Since.Equal(since) || r.sessions() != sessions {
			t.Errorf("%s since %s, %d sessions: want one since %s", s.Line(), s.Since, r.sessions(), since)
		}
		granted = affirming(2 * time.Hour) // it is back, and what it grants counts from now
		r.attestd.answers <- granted
		sleep(90 * time.Minute)
		r.want(netd.Tunnel, "")
		away.NotAfter = granted.NotAfter
		r.attestd.answers <- away
		sleep(31 * time.Minute)
		r.want(netd.Attesting, netd.ReasonLapsed)
	})
}

// TestLeap: a signed time far ahead is kept only when it has stood for a while.
func TestLeap(t *testing.T) {
	runRig(t, func(r *rig) {
		k := &kept{}
		r.set(func() { r.d.Times, r.answer, r.signed = k, path.Ours, time.Now() })
		r.lease("192.168.50.23/24")
		sleep(2 * askEvery)
		synctest.Wait()
		before := k.at
		if before.IsZero() {
			t.Fatal("the right time is not kept")
		}
		ahead := time.Now().AddDate(0, 0, 1)
		r.set(func() { r.signed = ahead })
		sleep(2 * askEvery)
		synctest.Wait()
		if k.at.After(ahead.Add(-time.Minute)) {
			t.Errorf("kept %s at once", k.at)
		}
		if r.d.leapt.IsZero() {
			t.Error("the leap was not noted")
		}
	})
}
