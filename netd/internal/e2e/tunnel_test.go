//go:build linux

package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"sekisho/attest/cryptrec"
	"sekisho/netd/internal/nstest"
	"sekisho/netd/tunnel"
	"sekisho/netd/tunnel/connectip"
)

// TestCarriages: whichever of TCP and UDP a network lets through carries the
// tunnel, and both with the same algorithms.
func TestCarriages(t *testing.T) {
	nstest.Require(t)
	for _, c := range []struct {
		name            string
		noTCP, noUDP    bool
		agreement       cryptrec.KeyAgreement
		want, otherwise string
	}{
		{name: "clean", want: "TLS on TCP", otherwise: "HTTP/3"}, // a busy machine may be late by the head start
		{name: "no UDP", noUDP: true, want: "TLS on TCP"},
		{name: "no TCP", noTCP: true, want: "HTTP/3"},
		{name: "no UDP, P-384", noUDP: true, want: "TLS on TCP", agreement: cryptrec.P384MLKEM1024},
		{name: "no TCP, P-384", noTCP: true, want: "HTTP/3", agreement: cryptrec.P384MLKEM1024},
	} {
		t.Run(c.name, func(t *testing.T) {
			near, far := nstest.New(t, "near"), nstest.New(t, "far")
			link := impair(t, "eth0", near, outerNear, far, outerFar, time.Millisecond)
			link.noTCP.Store(c.noTCP)
			link.noUDP.Store(c.noUDP)
			p := newPaper(t)
			newGateway(t, p, far, roleConfig{Tun: "tun0", Agreement: c.agreement, Listen: outerFar + ":443", Pool6: netip.MustParsePrefix("fd00:80::/112"), DNS: []netip.Addr{netip.MustParseAddr("10.1.0.53")}})
			l := newLaptop(t, p, near, roleConfig{Tun: "tun0", Agreement: c.agreement, Gateway: outerFar + ":443"})
			r, err := l.tell(order{Up: &tunnel.Path{}})
			if err != nil {
				t.Fatal(err)
			}
			if r.Carriage != c.want && (c.otherwise == "" || r.Carriage != c.otherwise) {
				t.Errorf("carried by %s, want %s", r.Carriage, c.want)
			}
			if r.Cipher != "TLS_AES_256_GCM_SHA384 "+c.agreement.Curves()[0].String() {
				t.Errorf("cipher %s", r.Cipher)
			}
			if a := r.Assignment; a.Inner.String() != "10.80.0.2" || a.Inner6.String() != "fd00:80::2" || len(a.DNS) != 1 {
				t.Errorf("assigned %+v", a)
			}
			inner(near, far, "tun0", "10.80.0.2", "10.80.0.1", connectip.DefaultMTU)
			var received atomic.Int64
			serveFar(t, far, &received)
			if got := rate(t, near, "10.80.0.1", 1, 1, &received, time.Second); got == 0 {
				t.Error("nothing came through")
			}
		})
	}
}

// TestBlackHole: the path in use swallows everything without a word. The
// laptop's own questions find it; the session moves to another uplink, and back
// without a loss; the user's connection outlives both.
func TestBlackHole(t *testing.T) {
	nstest.Require(t)
	for _, only := range []connectip.Carriage{connectip.TLS, connectip.HTTP3} {
		t.Run(strings.ReplaceAll(only.String(), "/", ""), func(t *testing.T) {
			near, far := nstest.New(t, "near"), nstest.New(t, "far")
			var links []*impairment
			var paths []tunnel.Path
			for i := range 2 {
				dev, own := fmt.Sprintf("eth%d", i), fmt.Sprintf("192.168.%d.2", i)
				links = append(links, impair(t, dev, near, own, far, fmt.Sprintf("192.168.%d.1", i), 2*time.Millisecond))
				paths = append(paths, tunnel.Path{Link: dev, Source: netip.MustParseAddr(own)})
				near.Run("ip", "route", "add", outerFar+"/32", "dev", dev, "metric", fmt.Sprint(i+1))
			}
			far.Run("ip", "address", "add", outerFar+"/32", "dev", "lo")
			p := newPaper(t)
			newGateway(t, p, far, roleConfig{Tun: "tun0", Listen: outerFar + ":443"})
			l := newLaptop(t, p, near, roleConfig{Tun: "tun0", Gateway: outerFar + ":443", Only: only})
			if _, err := l.tell(order{Up: &paths[0]}); err != nil {
				t.Fatal(err)
			}
			inner(near, far, "tun0", "10.80.0.2", "10.80.0.1", connectip.DefaultMTU)
			var received atomic.Int64
			serveFar(t, far, &received)
			user, err := dialFrom(near, "tcp", fmt.Sprintf("10.80.0.1:%d", sinkPort))
			if err != nil {
				t.Fatal(err)
			}
			defer user.Close()
			arrives := func() { // what the user sends
				t.Helper()
				from := received.Load()
				if _, err := user.Write(make([]byte, 1000)); err != nil {
					t.Fatal(err)
				}
				nstest.Eventually(t, 10*time.Second, func() error {
					if received.Load() < from+1000 {
						return fmt.Errorf("%d bytes of 1000 arrived", received.Load()-from)
					}
					return nil
				})
			}
			arrives()
			links[0].blocked.Store(true)
			start := time.Now()
			user.Write(make([]byte, 1000))
			nstest.Eventually(t, 10*time.Second, func() error {
				if r, err := l.tell(order{}); err != nil || !r.Suspect {
					return fmt.Errorf("not suspected, %v", err)
				}
				return nil
			})
			found := time.Since(start)
			if _, err := l.tell(order{Rebind: &paths[1]}); err != nil {
				t.Fatal(err)
			}
			arrives()
			t.Logf("black hole found after %v, data again after %v", found.Round(10*time.Millisecond), time.Since(start).Round(10*time.Millisecond))
			if found > 3*time.Second {
				t.Errorf("found after %v, want 3 s at most", found)
			}
			links[0].blocked.Store(false)
			sent, lost := streamAcross(t, near, func() {
				if r, err := l.tell(order{Rebind: &paths[0]}); err != nil || r.Assignment.Inner.String() != "10.80.0.2" {
					t.Error(r, err)
				}
			})
			t.Logf("planned change: %d of %d packets lost", lost, sent)
			if lost > 0 {
				t.Errorf("planned change: %d of %d packets lost", lost, sent)
			}
			arrives()
		})
	}
}

// streamAcross sends a packet every 2 ms to the far end's echo before, during
// and after change, and counts what did not come back.
func streamAcross(t *testing.T, near *nstest.NS, change func()) (sent, lost int) {
	c, err := dialFrom(near, "udp", fmt.Sprintf("10.80.0.1:%d", echoPort))
	if err != nil {
		t.Fatal(err)
	}
	back := make(chan int)
	go func() {
		n := 0
		for b := make([]byte, 100); ; n++ {
			if _, err := c.Read(b); err != nil {
				back <- n
				return
			}
		}
	}()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	changed := make(chan struct{})
	for sent < 200 {
		<-tick.C
		c.Write([]byte("x"))
		sent++
	}
	go func() { change(); close(changed) }()
	for more := 200; more > 0; {
		<-tick.C
		c.Write([]byte("x"))
		sent++
		select {
		case <-changed:
			more--
		default:
		}
	}
	c.SetReadDeadline(time.Now().Add(2 * time.Second))
	n := <-back
	c.Close()
	return sent, sent - n
}
