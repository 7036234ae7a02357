//go:build linux

package e2e

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"sekisho/attest/gate"
	"sekisho/netd"
	"sekisho/netd/internal/nstest"
	"sekisho/netd/tunnel/connectip"
)

// secondUplink gives the laptop another way out: eth1, to a LAN of its own
// behind the same home router, with its own DHCP server and capture.
func (w *world) secondUplink() {
	w.home.Run("ip", "link", "add", "lan1", "type", "veth", "peer", "name", "eth1")
	w.home.Run("ip", "address", "add", "192.168.60.1/24", "dev", "lan1")
	w.home.Run("ip", "link", "set", "lan1", "up")
	w.site.Run("ip", "route", "add", "192.168.60.0/24", "via", "203.0.113.1")
	w.home.Start("tcpdump", "-i", "lan1", "--immediate-mode", "-U", "-n", "-s", "200", "-B", "16384", "-w", w.path("uplink1.pcap"))
	nstest.Eventually(w.t, 10*time.Second, func() error {
		st, err := os.Stat(w.path("uplink1.pcap"))
		if err == nil && st.Size() < 24 {
			err = errors.New("no capture yet")
		}
		return err
	})
	w.home.Start("dnsmasq", "--keep-in-foreground", "--log-facility=-", "--conf-file=/dev/null", "--port=0", "--interface=lan1", "--bind-interfaces", "--leasefile-ro",
		"--dhcp-range=192.168.60.100,192.168.60.200,255.255.255.0,2m", "--dhcp-authoritative", "--no-ping", "--pid-file="+w.path("dnsmasq1.pid"))
	w.home.Run("ip", "link", "set", "eth1", "netns", w.laptop.Path)
}

// cleanSecond fails the test if anything was on eth1 that is not allowed.
func (w *world) cleanSecond() {
	w.t.Helper()
	out, err := exec.Command("tcpdump", "-n", "-r", w.path("uplink1.pcap"), "not ("+allowed+")").Output()
	if err != nil || len(out) > 0 {
		w.t.Errorf("eth1: %v, leaked:\n%s", err, out)
	}
	seen, err := exec.Command("tcpdump", "-n", "-r", w.path("uplink1.pcap"), "tcp port 443").Output()
	if err != nil || len(seen) == 0 {
		w.t.Errorf("eth1 carried nothing: %v", err)
	}
}

// echo is a stream of numbered datagrams from the work domain through the
// tunnel to a server that sends each of them back.
type echo struct {
	conn net.Conn
	stop chan struct{}
	all  sync.WaitGroup

	mu      sync.Mutex
	sent    int
	arrived []time.Time
	numbers map[uint64]bool // that came back
}

func (w *world) startEcho(every time.Duration) *echo {
	w.t.Helper()
	e := &echo{stop: make(chan struct{}), numbers: map[uint64]bool{}}
	var server net.PacketConn
	if err := w.web.Do(func() (err error) { server, err = net.ListenPacket("udp", "10.1.0.80:7007"); return err }); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { server.Close() })
	go func() {
		b := make([]byte, 64)
		for {
			n, from, err := server.ReadFrom(b)
			if err != nil {
				return
			}
			server.WriteTo(b[:n], from)
		}
	}()
	nstest.Eventually(w.t, 10*time.Second, func() error { // the work domain may not know its address yet
		return w.work.Do(func() (err error) { e.conn, err = net.Dial("udp", "10.1.0.80:7007"); return err })
	})
	e.all.Go(func() {
		b := make([]byte, 64)
		for {
			if n, err := e.conn.Read(b); errors.Is(err, net.ErrClosed) {
				return
			} else if err == nil && n == 8 {
				e.mu.Lock()
				e.arrived = append(e.arrived, time.Now())
				e.numbers[binary.BigEndian.Uint64(b)] = true
				e.mu.Unlock()
			}
		}
	})
	e.all.Go(func() {
		tick := time.NewTicker(every)
		defer tick.Stop()
		for {
			e.mu.Lock()
			e.conn.Write(binary.BigEndian.AppendUint64(nil, uint64(e.sent)))
			e.sent++
			e.mu.Unlock()
			select {
			case <-e.stop:
				return
			case <-tick.C:
			}
		}
	})
	return e
}

// since returns the longest silence after t, and up to when answers came.
func (e *echo) since(t time.Time) (gap time.Duration, last time.Time) {
	e.mu.Lock()
	defer e.mu.Unlock()
	last = t
	for _, a := range e.arrived {
		if a.After(t) {
			gap, last = max(gap, a.Sub(last)), a
		}
	}
	return gap, last
}

// mark returns the number of the next packet.
func (e *echo) mark() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.sent
}

// end stops the stream and returns what was sent from number first on, and how
// much of it was lost.
func (e *echo) end(first int) (sent, lost int) {
	close(e.stop)
	count := func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		sent, lost = e.sent-first, 0
		for n := first; n < e.sent; n++ {
			if !e.numbers[uint64(n)] {
				lost++
			}
		}
	}
	// What is under way arrives late on a busy machine; what is lost, never.
	for end := time.Now().Add(10 * time.Second); ; <-time.After(50 * time.Millisecond) {
		if count(); lost == 0 || time.Now().After(end) {
			break
		}
	}
	e.conn.Close()
	e.all.Wait()
	return sent, lost
}

// waitUplink waits until the session runs over the named uplink.
func (w *world) waitUplink(name string) netd.Status {
	w.t.Helper()
	var s netd.Status
	nstest.Eventually(w.t, 30*time.Second, func() (err error) {
		if s, err = w.status(); err == nil && (s.Uplink.Name != name || s.State != netd.Tunnel) {
			err = fmt.Errorf("%s over %q, want %s; uplinks %+v", s.Line(), s.Uplink.Name, name, s.Uplinks)
		}
		return err
	})
	return s
}

// answering waits until packets come back through the tunnel.
func (w *world) answering(e *echo) {
	w.t.Helper()
	now := time.Now()
	nstest.Eventually(w.t, 20*time.Second, func() error {
		if _, last := e.since(now); last.Sub(now) < 200*time.Millisecond {
			return errors.New("no answers through the tunnel")
		}
		return nil
	})
}

// onlyHTTP3 makes the home swallow the flight of a TLS handshake with a
// certificate in it, so that HTTP/3 carries the tunnel. netd's probes, which
// show none, pass.
func (w *world) onlyHTTP3() {
	w.home.Run("nft", "add table ip http3; add chain ip http3 f { type filter hook forward priority 0; }; "+
		"add rule ip http3 f ip daddr 203.0.113.20 tcp dport 443 meta length 600-1400 drop")
}

// TestTwoUplinks: the cable is pulled, the session goes on over the other
// uplink; it is put in again, and the session goes back without a loss.
func TestTwoUplinks(t *testing.T) {
	t.Run("tls", func(t *testing.T) { twoUplinks(t, connectip.TLS) })
	t.Run("http3", func(t *testing.T) { twoUplinks(t, connectip.HTTP3) })
}

func twoUplinks(t *testing.T, by connectip.Carriage) {
	w := newWorld(t, tunnelVision()...)
	w.secondUplink()
	if by == connectip.HTTP3 {
		w.onlyHTTP3()
	}
	w.startGateway()
	w.attestd.set(gate.StateAffirming, time.Hour)
	w.startNetd()
	w.waitState(30*time.Second, netd.Tunnel, "")
	w.readPage(10 * time.Second)
	s := w.bothGood()
	stop := w.pester()
	e := w.startEcho(5 * time.Millisecond)
	w.answering(e)
	before := s.Since

	pulled := time.Now()
	w.home.Run("ip", "link", "set", "lan0", "down")
	w.waitUplink("eth1")
	w.answering(e)
	gap, _ := e.since(pulled)
	t.Logf("carrier lost: %.0f ms without an answer", gap.Seconds()*1000)
	if gap > 2*time.Second {
		t.Errorf("carrier lost: silence of %v", gap)
	}

	again, first := time.Now(), e.mark()
	w.home.Run("ip", "link", "set", "lan0", "up")
	w.waitUplink("eth0")
	w.answering(e)
	if s, err := w.status(); err != nil || s.Tunnel.Carriage != by.String() {
		t.Errorf("carried by %s, want %s: %v", s.Tunnel.Carriage, by, err)
	}
	gap, _ = e.since(again)
	sent, lost := e.end(first)
	t.Logf("planned change: %d of %d packets lost, longest silence %.0f ms, %v after the cable was back", lost, sent, gap.Seconds()*1000, time.Since(again).Round(time.Millisecond))
	if lost > 0 {
		t.Errorf("planned change: %d of %d packets lost", lost, sent)
	}
	if s, err := w.status(); err != nil || !s.Since.Equal(before) {
		t.Errorf("state since %v, want %v: Tunnel all the time; %+v", s.Since, before, s.History)
	}
	if r := w.laptop.Run("ip", "route"); strings.Count(r, "203.0.113.20 via") != 2 || !strings.Contains(r, "metric 1") {
		t.Errorf("routes outside:\n%s", r)
	}
	stop()
	w.checkUplink()
	w.cleanSecond()
}

// TestSilentBlackHole: the preferred uplink keeps its carrier and its lease, but
// no packet leaves the home any more.
func TestSilentBlackHole(t *testing.T) {
	w := newWorld(t)
	w.secondUplink()
	w.startGateway()
	w.attestd.set(gate.StateAffirming, time.Hour)
	w.startNetd()
	w.waitState(30*time.Second, netd.Tunnel, "")
	w.waitUplink("eth0")
	stop := w.pester()
	e := w.startEcho(10 * time.Millisecond)
	w.answering(e)
	w.home.Run("nft", "add table ip hole; add chain ip hole f { type filter hook forward priority 0; }; add rule ip hole f iifname lan0 drop; add rule ip hole f oifname lan0 drop")
	start := time.Now()
	w.waitUplink("eth1")
	w.answering(e)
	gap, _ := e.since(start)
	t.Logf("silent black hole: %.1f s without an answer", gap.Seconds())
	s := w.waitUplink("eth1")
	for _, u := range s.Uplinks {
		if u.Name == "eth0" && u.Health != netd.HealthDead {
			t.Errorf("eth0 is not said to be dead: %+v", u)
		}
	}
	w.home.Run("nft", "delete table ip hole")
	w.waitUplink("eth0")
	e.end(0)
	stop()
	w.checkUplink()
	w.cleanSecond()
	v := w.judge()
	fmt.Printf("scenario %-58s sent %7d  delivered %6d  leaked %d\n", "silent black hole on the preferred uplink", w.tapped.sent.Load(), v.delivered, v.leaked)
}
