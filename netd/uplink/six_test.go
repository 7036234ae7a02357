package uplink

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"sekisho/netd"
	"sekisho/netd/uplink/ndp"
)

var hardware = net.HardwareAddr{2, 0x50, 0, 0, 0, 0x23}

// sixRig drives a slaac with a clock of its own.
type sixRig struct {
	*slaac
	t    *testing.T
	now  time.Time
	sent [][]byte
}

func newSixRig(t *testing.T) *sixRig {
	r := &sixRig{slaac: newSlaac(ndp.Secret{1}, hardware), t: t, now: time.Unix(1e9, 0)}
	r.pass(0)
	return r
}

// pass lets time go by, in the steps that the machine asks for.
func (r *sixRig) pass(d time.Duration) {
	end := r.now.Add(d)
	for {
		send, next := r.step(r.now)
		r.sent = append(r.sent, send...)
		if !next.After(r.now) {
			r.t.Fatalf("next step at %v, it is %v", next, r.now)
		}
		if next.After(end) {
			break
		}
		r.now = next
	}
	r.now = end
	r.step(r.now)
}

func (r *sixRig) say(router string, a ndp.Advertisement, prefixes ...ndp.Prefix) {
	a.Router, a.Prefixes = netip.MustParseAddr(router), prefixes
	if a.Lifetime == 0 {
		a.Lifetime = 30 * time.Minute
	}
	r.hear(ndp.Message{Advertisement: &a}, r.now)
	r.pass(0)
}

func prefix6(p string, valid, preferred time.Duration) ndp.Prefix {
	return ndp.Prefix{Prefix: netip.MustParsePrefix(p), Autonomous: true, Valid: valid, Preferred: preferred}
}

const (
	routerA, routerB = "fe80::a", "fe80::b"
	netA, netB       = "2001:db8:a::/64", "2001:db8:b::/64"
)

func (r *sixRig) want(router, prefix string) Six {
	r.t.Helper()
	s := r.six(r.now)
	if prefix == "" {
		if s.Address.IsValid() {
			r.t.Fatalf("has %+v, want nothing", s)
		}
		return s
	}
	if !netip.MustParsePrefix(prefix).Contains(s.Address) || s.Router.String() != router || !s.Local.IsLinkLocalUnicast() {
		r.t.Fatalf("has %+v, want an address in %s by %s; why %q", s, prefix, router, r.why)
	}
	return s
}

func TestSlaac(t *testing.T) {
	r := newSixRig(t)
	r.want("", "")
	r.pass(500 * time.Millisecond)
	r.say(routerA, ndp.Advertisement{MTU: 1480}, prefix6(netA, time.Hour, time.Hour))
	r.want("", "") // somebody may object yet
	r.pass(time.Second)
	s := r.want(routerA, netA)
	if s.MTU != 1480 || !s.Expires.Equal(r.now.Add(-time.Second).Add(30*time.Minute)) {
		t.Errorf("%+v", s)
	}
	if len(r.sent) != 3 { // two probes and a solicitation
		t.Errorf("sent %d packets: %x", len(r.sent), r.sent)
	}
	// Another router and prefix change nothing while the first is good.
	r.say(routerB, ndp.Advertisement{}, prefix6(netB, time.Hour, time.Hour))
	r.pass(20 * time.Minute)
	if again := r.want(routerA, netA); again.Address != s.Address {
		t.Errorf("%s, then %s", s.Address, again.Address)
	}
	// It goes; the other stays for another ten minutes.
	r.say(routerB, ndp.Advertisement{}, prefix6(netB, time.Hour, time.Hour))
	r.pass(11 * time.Minute)
	r.want(routerB, netB)
	r.pass(20 * time.Minute)
	r.want("", "")
	// The same network again: the same address.
	r.say(routerA, ndp.Advertisement{}, prefix6(netA, time.Hour, time.Hour))
	r.pass(time.Second)
	if again := r.want(routerA, netA); again.Address != s.Address {
		t.Errorf("%s, then %s", s.Address, again.Address)
	}
	r.hear(ndp.Message{Advertisement: &ndp.Advertisement{Router: netip.MustParseAddr(routerA)}}, r.now) // it says that it is none any more
	r.pass(0)
	r.want("", "")
}

// TestSolicitations: a link without a router is asked ever less often.
func TestSolicitations(t *testing.T) {
	r := newSixRig(t)
	r.pass(time.Hour)
	if n := len(r.sent) - 1; n < 25 || n > 45 { // but for the probe
		t.Errorf("%d solicitations in an hour", n)
	}
}

// TestLives: one advertisement neither ends an address soon (RFC 4862, section
// 5.5.3 e) nor makes it eternal, and what is deprecated is left when there is
// something else.
func TestLives(t *testing.T) {
	r := newSixRig(t)
	r.say(routerA, ndp.Advertisement{Lifetime: 9000 * time.Second}, prefix6(netA, 24*time.Hour, 12*time.Hour))
	r.pass(time.Second)
	s := r.want(routerA, netA)
	r.say(routerA, ndp.Advertisement{Lifetime: 9000 * time.Second}, prefix6(netA, 0, 0))
	r.pass(119 * time.Minute)
	if again := r.want(routerA, netA); again.Address != s.Address {
		t.Errorf("%s, then %s", s.Address, again.Address)
	}
	r.pass(2 * time.Minute)
	r.want("", "")

	r = newSixRig(t)
	r.say(routerA, ndp.Advertisement{}, prefix6(netA, 100*365*24*time.Hour, 100*365*24*time.Hour))
	for range 60 { // the router goes on, without the prefix
		r.say(routerA, ndp.Advertisement{})
		r.pass(25 * time.Minute)
	}
	r.want("", "")

	r = newSixRig(t)
	r.say(routerA, ndp.Advertisement{}, prefix6(netA, time.Hour, time.Minute))
	r.pass(2 * time.Minute)
	r.want(routerA, netA)
	r.say(routerA, ndp.Advertisement{}, prefix6(netB, time.Hour, time.Hour))
	r.pass(time.Second)
	r.want(routerA, netB)
}

// TestSuspend: a life ends while the monotonic clock stands still.
func TestSuspend(t *testing.T) {
	now := time.Now()
	if t0 := now.Add(time.Minute); past(t0, now) || !past(t0, now.Add(time.Hour)) || !past(t0, now.Add(time.Hour).Round(0)) {
		t.Error("past")
	}
}

func TestConflicts(t *testing.T) {
	r := newSixRig(t)
	r.say(routerA, ndp.Advertisement{}, prefix6(netA, time.Hour, time.Hour))
	first := r.global.address
	r.hear(ndp.Message{Claimed: first}, r.now)
	r.pass(time.Second)
	s := r.want(routerA, netA)
	if s.Address == first {
		t.Error("an address that somebody else has is used")
	}
	r.hear(ndp.Message{Claimed: s.Address}, r.now) // too late: it is defended
	r.pass(0)
	r.want(routerA, netA)

	r = newSixRig(t)
	r.say(routerA, ndp.Advertisement{}, prefix6(netA, time.Hour, time.Hour))
	for range 20 {
		r.hear(ndp.Message{Claimed: r.global.address}, r.now)
		r.pass(500 * time.Millisecond)
	}
	if s := r.want("", ""); !strings.Contains(s.Detail, "in use by somebody else") {
		t.Errorf("%+v", s)
	}
}

func TestAbsurd(t *testing.T) {
	for name, say := range map[string]func(*sixRig){
		"mtu 1279": func(r *sixRig) { r.say(routerA, ndp.Advertisement{MTU: 1279}, prefix6(netA, time.Hour, time.Hour)) },
		"mtu 0 said": func(r *sixRig) {
			r.say(routerA, ndp.Advertisement{MTU: 1}, prefix6(netA, time.Hour, time.Hour))
		},
		"router for 9 s": func(r *sixRig) {
			r.say(routerA, ndp.Advertisement{Lifetime: 9 * time.Second}, prefix6(netA, time.Hour, time.Hour))
		},
		"prefix for 19 s":       func(r *sixRig) { r.say(routerA, ndp.Advertisement{}, prefix6(netA, 19*time.Second, time.Second)) },
		"prefix of 48 bits":     func(r *sixRig) { r.say(routerA, ndp.Advertisement{}, prefix6("2001:db8::/48", time.Hour, time.Hour)) },
		"prefix of 65 bits":     func(r *sixRig) { r.say(routerA, ndp.Advertisement{}, prefix6("2001:db8::/65", time.Hour, time.Hour)) },
		"multicast prefix":      func(r *sixRig) { r.say(routerA, ndp.Advertisement{}, prefix6("ff02::/64", time.Hour, time.Hour)) },
		"link-local prefix":     func(r *sixRig) { r.say(routerA, ndp.Advertisement{}, prefix6("fe80::/64", time.Hour, time.Hour)) },
		"loopback prefix":       func(r *sixRig) { r.say(routerA, ndp.Advertisement{}, prefix6("::/64", time.Hour, time.Hour)) },
		"preferred after valid": func(r *sixRig) { r.say(routerA, ndp.Advertisement{}, prefix6(netA, time.Hour, 2*time.Hour)) },
		"not autonomous": func(r *sixRig) {
			r.say(routerA, ndp.Advertisement{}, ndp.Prefix{Prefix: netip.MustParsePrefix(netA), Valid: time.Hour, Preferred: time.Hour})
		},
	} {
		r := newSixRig(t)
		say(r)
		r.pass(5 * time.Second)
		if s := r.want("", ""); s.Detail == "" {
			t.Errorf("%s: nothing said", name)
		}
		// A sound router beside it is used.
		r.say(routerB, ndp.Advertisement{}, prefix6(netB, time.Hour, time.Hour))
		r.pass(time.Second)
		r.want(routerB, netB)
	}
}

// TestFloods: neither routers nor prefixes pile up, and what is in use stays.
func TestFloods(t *testing.T) {
	r := newSixRig(t)
	r.say(routerA, ndp.Advertisement{}, prefix6(netA, time.Hour, time.Hour))
	r.pass(time.Second)
	s := r.want(routerA, netA)
	for i := range 10000 {
		r.say(fmt.Sprintf("fe80::1:%x", i), ndp.Advertisement{}, prefix6(fmt.Sprintf("2001:db8:1:%x::/64", i), time.Hour, time.Hour))
		r.say(routerA, ndp.Advertisement{}, prefix6(fmt.Sprintf("2001:db8:2:%x::/64", i), time.Hour, time.Hour))
	}
	n := 0
	for _, k := range r.routers {
		n += len(k.prefixes)
	}
	if len(r.routers) > maxRouters || n > maxRouters*maxPrefixes {
		t.Errorf("%d routers with %d prefixes", len(r.routers), n)
	}
	if again := r.want(routerA, netA); again.Address != s.Address {
		t.Errorf("%s, then %s", s.Address, again.Address)
	}
}

// TestDoubt: a router that is silent when asked is left for one that answers,
// and kept if none does.
func TestDoubt(t *testing.T) {
	r := newSixRig(t)
	r.say(routerA, ndp.Advertisement{}, prefix6(netA, time.Hour, time.Hour))
	r.say(routerB, ndp.Advertisement{}, prefix6(netB, time.Hour, time.Hour))
	r.pass(time.Second)
	r.want(routerA, netA)
	for _, answers := range []bool{false, true} {
		r.sent = nil
		r.doubt(r.now)
		r.pass(time.Second)
		if len(r.sent) != 1 || r.sent[0][40] != ndp.TypeRouterSolicitation {
			t.Errorf("sent %x, want one solicitation", r.sent)
		}
		if answers {
			r.say(routerB, ndp.Advertisement{}, prefix6(netB, time.Hour, time.Hour))
		}
		r.want(routerA, netA)
		r.pass(5 * time.Second)
	}
	r.want(routerB, netB)
}

// TestGlobalFirst: a local prefix is used only where there is no other.
func TestGlobalFirst(t *testing.T) {
	r := newSixRig(t)
	r.say(routerA, ndp.Advertisement{}, prefix6("fd00:1::/64", time.Hour, time.Hour))
	r.pass(time.Second)
	r.want(routerA, "fd00:1::/64")
	r.say(routerB, ndp.Advertisement{}, prefix6(netB, time.Hour, time.Hour))
	r.pass(time.Second)
	r.want(routerB, netB)
}

func TestBoth(t *testing.T) {
	four := netd.Uplink{Name: "eth0", Carrier: true, Address: netip.MustParsePrefix("192.168.50.23/24"), Router: netip.MustParseAddr("192.168.50.1"), MTU: 1500}
	none := netd.Uplink{Name: "eth0", Carrier: true, Reason: netd.ReasonNoLease, Detail: "no DHCP server answers on eth0"}
	six := Six{Address: netip.MustParseAddr("2001:db8::1"), Local: netip.MustParseAddr("fe80::1"), Router: netip.MustParseAddr("fe80::2"), MTU: 1400}
	if u := both(four, six); !u.Usable() || u.Address != four.Address || u.Address6 != six.Address || u.MTU6 != 1400 {
		t.Errorf("%+v", u)
	}
	if u := both(none, six); !u.Usable() || u.Address.IsValid() || u.Address6 != six.Address || u.MTU != maxMTU || u.Reason != "" {
		t.Errorf("%+v", u)
	}
	if u := both(none, Six{Detail: "bad"}); u.Usable() || u.IPv6 != "bad" || u.Reason != netd.ReasonNoLease {
		t.Errorf("%+v", u)
	}
	four.MTU = 1279 // IPv6 would be no better than a broken plan
	if u := both(four, six); !u.Usable() || u.Address6.IsValid() || u.IPv6 == "" {
		t.Errorf("%+v", u)
	}
}

// TestBothFamilies: what an uplink gains leaves its health as it is unless it is
// dead, what it loses has it probed anew, and a server's address claimed by one
// family does not take the other away.
func TestBothFamilies(t *testing.T) {
	server := netip.MustParseAddr("2001:db8:f::20")
	runManager(t, []netip.Addr{server}, func(ctx context.Context, r *rig) {
		six := make(chan Six)
		r.lease6 = func(ctx context.Context, _ Link, _ <-chan struct{}, report func(Six)) {
			for {
				select {
				case s := <-six:
					report(s)
				case <-ctx.Done():
					return
				}
			}
		}
		good := Six{Address: netip.MustParseAddr("2001:db8:a::1"), Prefix: netip.MustParsePrefix(netA), Local: netip.MustParseAddr("fe80::1"), Router: netip.MustParseAddr(routerA)}
		r.links <- []Link{{Index: 2, Name: "eth0", Kind: netd.KindWired, Carrier: true}}
		r.want("eth0", netd.HealthGood, true, 0)
		six <- good
		if c := r.want("eth0", netd.HealthGood, true, 0); c.Address6 != good.Address || !c.Address.IsValid() || r.tried["eth0"] != 1 {
			t.Errorf("%+v, tried %d times", c, r.tried["eth0"])
		}
		six <- Six{Detail: "gone"}
		if c := r.want("eth0", netd.HealthGood, true, 0); c.Address6.IsValid() || c.IPv6 != "gone" || r.tried["eth0"] < 2 {
			t.Errorf("%+v, tried %d times", c, r.tried["eth0"])
		}
		claims := good
		claims.Prefix = netip.MustParsePrefix("2001:db8:f::/64")
		six <- claims
		if c := r.want("eth0", netd.HealthGood, true, 0); c.Address6.IsValid() || !strings.Contains(c.IPv6, server.String()) {
			t.Errorf("%+v", c)
		}
		r.lose("eth0", true)
		r.Doubt(ctx, "eth0")
		r.want("eth0", netd.HealthDead, true, 1)
		r.lose("eth0", false)
		six <- good // another way: it is tried at once
		r.want("eth0", netd.HealthGood, true, 1)
	})
}
