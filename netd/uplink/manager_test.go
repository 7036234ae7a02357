package uplink

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"sekisho/netd"
)

// rig is a Manager whose leases come at once and whose probes answer as the test says.
type rig struct {
	*Manager
	t     *testing.T
	links chan []Link
	mu    sync.Mutex
	last  []Candidate
	lost  map[string]bool // uplinks over which nothing comes back
	tried map[string]int
}

func runManager(t *testing.T, claims []netip.Addr, script func(context.Context, *rig)) {
	synctest.Test(t, func(t *testing.T) {
		r := &rig{t: t, links: make(chan []Link), lost: map[string]bool{}, tried: map[string]int{}}
		r.Manager = New(Config{
			Claims: claims,
			Report: func(c []Candidate) { r.mu.Lock(); r.last = c; r.mu.Unlock() },
			Probe: func(_ context.Context, u netd.Uplink) (int, error) {
				r.mu.Lock()
				defer r.mu.Unlock()
				r.tried[u.Name]++
				if r.lost[u.Name] {
					return 0, errors.New("no answer")
				}
				return 0, nil
			},
		})
		r.lease = func(ctx context.Context, l Link, _ netip.Addr, report func(netd.Uplink)) {
			address := netip.AddrFrom4([4]byte{192, 168, byte(l.Index), 23})
			report(netd.Uplink{Name: l.Name, Carrier: true, Address: netip.PrefixFrom(address, 24)})
			<-ctx.Done()
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); r.Run(ctx, r.links) }()
		script(ctx, r)
		cancel()
		<-done
	})
}

// want waits until nothing moves and compares one candidate.
func (r *rig) want(name, health string, usable bool, losses int) Candidate {
	r.t.Helper()
	synctest.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.last {
		if c.Name == name {
			if c.Health != health || c.Usable() != usable || c.Losses != losses || usable && health == netd.HealthGood && c.Since.IsZero() {
				r.t.Errorf("%s: %+v, want health %q, usable %v, %d losses", name, c, health, usable, losses)
			}
			return c
		}
	}
	r.t.Errorf("%s is not reported: %+v", name, r.last)
	return Candidate{}
}

func (r *rig) lose(name string, lost bool) { r.mu.Lock(); r.lost[name] = lost; r.mu.Unlock() }

func TestManager(t *testing.T) {
	eth := Link{Index: 2, Name: "eth0", Kind: netd.KindWired, Carrier: true}
	wifi := Link{Index: 3, Name: "wlan0", Kind: netd.KindWifi, Carrier: true}
	down := eth
	down.Carrier = false
	runManager(t, nil, func(ctx context.Context, r *rig) {
		r.links <- []Link{eth, wifi}
		r.want("eth0", netd.HealthGood, true, 0)
		r.want("wlan0", netd.HealthGood, true, 0)
		r.links <- []Link{down, wifi}
		if c := r.want("eth0", netd.HealthUnknown, false, 1); c.Reason != netd.ReasonNoCarrier {
			t.Errorf("reason %q", c.Reason)
		}
		for range 20 { // ten times a second
			r.links <- []Link{eth, wifi}
			<-time.After(50 * time.Millisecond)
			r.links <- []Link{down, wifi}
			<-time.After(50 * time.Millisecond)
		}
		r.links <- []Link{eth, wifi}
		if c := r.want("eth0", netd.HealthGood, true, 21); c.Settle < time.Minute {
			t.Errorf("after %d losses it has to settle for %v only", c.Losses, c.Settle)
		}

		// Somebody who talks over it hears nothing; the probe confirms it.
		r.lose("eth0", true)
		r.Doubt(ctx, "eth0")
		r.want("eth0", netd.HealthDead, true, 22)
		r.want("wlan0", netd.HealthGood, true, 0)
		r.lose("eth0", false)
		<-time.After(2 * maxPause)
		r.want("eth0", netd.HealthGood, true, 22)
		// A wrong alarm is put right by the next probe.
		r.Doubt(ctx, "eth0")
		r.want("eth0", netd.HealthGood, true, 23)
		// Losses are forgotten.
		<-time.After(forgive)
		r.links <- []Link{down, wifi}
		r.want("eth0", netd.HealthUnknown, false, 1)
		// A stick that is pulled out leaves nothing behind.
		r.links <- []Link{wifi}
		r.want("wlan0", netd.HealthGood, true, 0)
		if len(r.last) != 1 {
			t.Errorf("still reported: %+v", r.last)
		}
	})
}

// TestBlackHole: no answer from the start on.
func TestBlackHole(t *testing.T) {
	runManager(t, nil, func(ctx context.Context, r *rig) {
		r.lose("eth0", true)
		r.links <- []Link{{Index: 2, Name: "eth0", Kind: netd.KindWired, Carrier: true}}
		r.want("eth0", netd.HealthUnknown, true, 0)
		<-time.After(4 * time.Second)
		r.want("eth0", netd.HealthDead, true, 1)
		<-time.After(10 * time.Minute)
		synctest.Wait()
		r.mu.Lock()
		defer r.mu.Unlock()
		if n := r.tried["eth0"]; n < 15 || n > 40 {
			t.Errorf("%d probes in ten minutes of silence", n)
		}
	})
}

// TestLeadsNowhere: a lease without a router. No probe ever leaves the laptop,
// and an uplink behind it in the order has its turn.
func TestLeadsNowhere(t *testing.T) {
	runManager(t, nil, func(ctx context.Context, r *rig) {
		inner := r.Probe
		r.Probe = func(ctx context.Context, u netd.Uplink) (int, error) {
			if _, err := inner(ctx, u); err != nil {
				return 0, &net.OpError{Op: "dial", Err: syscall.ENETUNREACH}
			}
			return 0, nil
		}
		r.lose("eth0", true)
		r.links <- []Link{{Index: 2, Name: "eth0", Kind: netd.KindWired, Carrier: true}}
		<-time.After(2 * time.Second) // the rules may still be on their way
		r.want("eth0", netd.HealthUnknown, true, 0)
		<-time.After(8 * time.Second)
		r.want("eth0", netd.HealthDead, true, 1)
		r.mu.Lock()
		before := r.tried["eth0"]
		r.mu.Unlock()
		<-time.After(10 * time.Minute)
		synctest.Wait()
		r.mu.Lock()
		if n := r.tried["eth0"] - before; n > 40 {
			t.Errorf("%d probes in ten minutes that went nowhere", n)
		}
		r.mu.Unlock()
		r.lose("eth0", false)
		<-time.After(2 * maxPause)
		r.want("eth0", netd.HealthGood, true, 1)
	})
}

// TestClaims: a network that claims to hold the gateway is bad, and says why.
func TestClaims(t *testing.T) {
	runManager(t, []netip.Addr{netip.MustParseAddr("192.168.2.7")}, func(_ context.Context, r *rig) {
		r.links <- []Link{{Index: 2, Name: "eth0", Kind: netd.KindWired, Carrier: true}, {Index: 3, Name: "eth1", Kind: netd.KindWired, Carrier: true}}
		if c := r.want("eth0", netd.HealthUnknown, false, 0); c.Reason != netd.ReasonBadLease || !strings.Contains(c.Detail, "192.168.2.0/24") {
			t.Errorf("%s: %s", c.Reason, c.Detail)
		}
		r.want("eth1", netd.HealthGood, true, 0)
		if r.tried["eth0"] != 0 {
			t.Error("probed although it is bad")
		}
	})
}

// TestWidth: the widest packets that get through count, shorter ones are tried
// only when the path's own are stalled, and a refusal is taken at its word.
func TestWidth(t *testing.T) {
	refused := errors.New("refused")
	for _, c := range []struct {
		name   string
		passes int // the longest packet that gets through
		takes  time.Duration
		err    error
		want   int
		tried  int
	}{
		{name: "wide", passes: 1500, takes: 20 * time.Millisecond, want: 0, tried: 1},
		{name: "wide and slow", passes: 1500, takes: 800 * time.Millisecond, want: 0, tried: 4},
		{name: "1492", passes: 1492, takes: 20 * time.Millisecond, want: 1400, tried: 4},
		{name: "1300", passes: 1300, takes: 20 * time.Millisecond, want: 1280, tried: 4},
		{name: "1000", passes: 1000, takes: 20 * time.Millisecond, want: 1000, tried: 4},
		{name: "black hole", passes: 0, err: context.DeadlineExceeded, tried: 4},
		{name: "refused", passes: 1500, err: refused, tried: 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), probeTimeout)
				defer cancel()
				var tried atomic.Int64
				mtu, err := width(ctx, func(ctx context.Context, mtu int) error {
					tried.Add(1)
					if c.err == refused {
						return refused
					}
					if mtu == 0 {
						mtu = 1500
					}
					if mtu > c.passes {
						<-ctx.Done()
						return ctx.Err()
					}
					select {
					case <-time.After(c.takes):
						return nil
					case <-ctx.Done():
						return ctx.Err()
					}
				})
				if mtu != c.want || !errors.Is(err, c.err) || int(tried.Load()) != c.tried {
					t.Errorf("width %d, %v after %d tries; want %d, %v after %d", mtu, err, tried.Load(), c.want, c.err, c.tried)
				}
			})
		})
	}
}
