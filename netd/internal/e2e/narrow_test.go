//go:build linux

package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"sekisho/attest/gate"
	"sekisho/netd"
	"sekisho/netd/internal/nstest"
	"sekisho/netd/tunnel"
	"sekisho/netd/tunnel/connectip"
)

// TestNarrowPath: the way swallows long packets without an ICMP error. Both
// carriages pass: TLS when it is told the width that netd's probe finds, HTTP/3
// by QUIC's own discovery, with inner packets of full size either way.
func TestNarrowPath(t *testing.T) {
	nstest.Require(t)
	for _, only := range []connectip.Carriage{connectip.TLS, connectip.HTTP3} {
		t.Run(strings.ReplaceAll(only.String(), "/", ""), func(t *testing.T) {
			near, far := nstest.New(t, "near"), nstest.New(t, "far")
			link := impair(t, "eth0", near, outerNear, far, outerFar, time.Millisecond)
			link.narrow.Store(1300)
			p := newPaper(t)
			newGateway(t, p, far, roleConfig{Tun: "tun0", Listen: outerFar + ":443"})
			l := newLaptop(t, p, near, roleConfig{Tun: "tun0", Gateway: outerFar + ":443", Only: only})
			path := tunnel.Path{Link: "eth0", Source: netip.MustParseAddr(outerNear)}
			if only == connectip.TLS {
				path.MTU = 1280
			}
			if _, err := l.tell(order{Up: &path}); err != nil {
				t.Fatal(err)
			}
			inner(near, far, "tun0", "10.80.0.2", "10.80.0.1", connectip.DefaultMTU)
			var received atomic.Int64
			serveFar(t, far, &received)
			up := rate(t, near, "10.80.0.1", 1, 0, &received, time.Second)
			down := rate(t, near, "10.80.0.1", 0, 1, &received, time.Second)
			t.Logf("up %.3f, down %.3f Gbit/s", up, down)
			if up == 0 || down == 0 {
				t.Error("nothing came through in one direction")
			}
		})
	}
}

// TestHTTP3BecomesNarrow: long packets are swallowed from some moment on, while
// short ones pass all the time. The session is suspected all the same, and the
// next one finds the width.
func TestHTTP3BecomesNarrow(t *testing.T) {
	nstest.Require(t)
	near, far := nstest.New(t, "near"), nstest.New(t, "far")
	link := impair(t, "eth0", near, outerNear, far, outerFar, time.Millisecond)
	p := newPaper(t)
	newGateway(t, p, far, roleConfig{Tun: "tun0", Listen: outerFar + ":443"})
	l := newLaptop(t, p, near, roleConfig{Tun: "tun0", Gateway: outerFar + ":443", Only: connectip.HTTP3})
	path := tunnel.Path{Link: "eth0", Source: netip.MustParseAddr(outerNear)}
	if _, err := l.tell(order{Up: &path}); err != nil {
		t.Fatal(err)
	}
	inner(near, far, "tun0", "10.80.0.2", "10.80.0.1", connectip.DefaultMTU)
	var received atomic.Int64
	serveFar(t, far, &received)
	rate(t, near, "10.80.0.1", 1, 1, &received, time.Second) // QUIC finds out how long packets may be
	calls := make(chan struct{})
	go func() { defer close(calls); pings(t, near, "10.80.0.1", 10*time.Second) }()
	still, at := uint64(0), time.Now() // nothing long is on its way any more
	nstest.Eventually(t, 20*time.Second, func() error {
		r, err := l.tell(order{})
		if n := r.Counters.SentBytes + r.Counters.ReceivedBytes; n > still+100_000 {
			still, at = n, time.Now()
		}
		if err == nil && time.Since(at) < 2*time.Second {
			err = errors.New("still carrying")
		}
		return err
	})

	link.narrow.Store(1300)
	start := time.Now()
	nstest.Eventually(t, 15*time.Second, func() error {
		if r, err := l.tell(order{}); err != nil || !r.Suspect {
			return fmt.Errorf("not suspected, %v", err)
		}
		return nil
	})
	found := time.Since(start)
	if _, err := l.tell(order{Rebind: &path}); err != nil {
		t.Fatal(err)
	}
	moved := time.Since(start)
	t.Logf("found after %v, moved after %v", found.Round(10*time.Millisecond), moved.Round(10*time.Millisecond))
	if moved > 13*time.Second {
		t.Errorf("moved after %v, want some 3 s", moved)
	}
	up := rate(t, near, "10.80.0.1", 1, 0, &received, time.Second)
	down := rate(t, near, "10.80.0.1", 0, 1, &received, time.Second)
	t.Logf("then up %.3f, down %.3f Gbit/s", up, down)
	if up == 0 || down == 0 {
		t.Error("nothing comes through in one direction")
	}
	if r, err := l.tell(order{}); err != nil || r.Suspect {
		t.Errorf("the new session is suspected: %v", err)
	}
	<-calls
}

// TestPathBecomesNarrow: a network drops what is longer than 1300 bytes and says
// nothing, first from the beginning, then after a time in the middle of a
// transfer. UDP does not pass at all. netd finds the width, the user's
// connection goes on, and with the width the full size comes back.
func TestPathBecomesNarrow(t *testing.T) {
	w := newWorld(t)
	w.home.Run("nft", "add table inet wall; add chain inet wall out { type filter hook forward priority 0; policy accept; }; "+
		"add chain inet wall long { type filter hook forward priority 1; policy accept; }; add rule inet wall out meta l4proto udp drop")
	// The lengths that the filter sees are those on the wire.
	w.laptop.Run("ip", "link", "set", "eth0", "gso_max_segs", "1")
	w.site.Run("ip", "link", "set", "wan0", "gso_max_segs", "1")
	narrow := func(on bool) {
		w.home.Run("nft", "flush", "chain", "inet", "wall", "long")
		if on {
			w.home.Run("nft", "add rule inet wall long meta length > 1300 drop")
		}
	}
	narrow(true)
	w.startGateway()
	w.attestd.set(gate.StateAffirming, time.Hour)
	start := time.Now()
	w.startNetd()
	s := w.waitState(40*time.Second, netd.Tunnel, "")
	w.readPage(10 * time.Second)
	t.Logf("narrow from the beginning: a page after %v, width %d", time.Since(start).Round(100*time.Millisecond), s.Uplink.PathMTU)
	size := func(n int, limit time.Duration) {
		t.Helper()
		text, err := w.fetch(page+"?bytes="+strconv.Itoa(n), limit)
		if err != nil || len(text) != n {
			t.Errorf("%d of %d bytes read: %v", len(text), n, err)
		}
	}
	size(1<<20, 20*time.Second)
	if r := w.laptop.Run("ip", "route", "show", "203.0.113.20"); !contains(r, "mtu 1280") {
		t.Errorf("the route to the gateway: %s", r)
	}

	// A new lease's network is wide again until found otherwise.
	narrow(false)
	w.home.Run("ip", "link", "set", "lan0", "down")
	w.waitState(10*time.Second, netd.Dark, netd.ReasonNoCarrier)
	w.home.Run("ip", "link", "set", "lan0", "up")
	w.home.Run("ip", "address", "replace", "192.168.50.1/24", "dev", "lan0")
	w.startDHCP()
	nstest.Eventually(t, 40*time.Second, func() error {
		s, err := w.status()
		if err == nil && (s.State != netd.Tunnel || s.Uplink.Health != netd.HealthGood || s.Uplink.PathMTU != 0) {
			err = fmt.Errorf("still %s, %+v", s.State, s.Uplink)
		}
		return err
	})
	w.readPage(10 * time.Second)

	const total = 256 << 20
	read := make(chan error, 1)
	go func() {
		text, err := w.fetch(page+"?bytes="+strconv.Itoa(total), 2*time.Minute)
		if err == nil && len(text) != total {
			err = fmt.Errorf("%d bytes of %d", len(text), total)
		}
		read <- err
	}()
	nstest.Eventually(t, 20*time.Second, func() error { // it is under way
		s, err := w.status()
		if err == nil && (s.Tunnel == nil || s.Tunnel.Counters.ReceivedBytes < 8<<20) {
			err = fmt.Errorf("not yet: %+v", s.Tunnel)
		}
		return err
	})
	narrow(true)
	start = time.Now()
	nstest.Eventually(t, 30*time.Second, func() error {
		s, err := w.status()
		if err == nil && (s.State != netd.Tunnel || s.Uplink.PathMTU != 1280) {
			err = fmt.Errorf("still %s, %+v", s.Line(), s.Uplink)
		}
		return err
	})
	t.Logf("narrow in the middle: found after %v", time.Since(start).Round(100*time.Millisecond))
	if err := <-read; err != nil {
		t.Error(err)
	}
	w.judge()
}
