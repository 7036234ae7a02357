//go:build linux

package e2e

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"sekisho/attest/gate"
	"sekisho/netd"
	"sekisho/netd/internal/nstest"
)

// BenchmarkMoves is how long the work domain waits when the laptop goes from
// one network to another, in rounds of worlds made anew: the netd and gateway of
// the product, namespaces, a hostile work domain beside. Medians, with the
// longest; what a user's TCP connection to LGWAN did not live through is an error.
func BenchmarkMoves(b *testing.B) {
	nstest.Require(b, "dnsmasq", "nft")
	took := map[string][]float64{} // ms, or MiB
	note := func(what string, v float64) { took[what] = append(took[what], v) }
	for b.Loop() {
		moveOffice(b, note)
		moveUplinks(b, note)
		moveBlackHole(b, note)
	}
	for _, m := range []struct {
		what, unit string
		target     float64
	}{
		{"tunnel to office", "ms", 3000}, {"office to tunnel", "ms", 3000}, {"carrier lost", "ms", 200},
		{"planned change, packets lost", "", 0}, {"silent black hole", "ms", 3000}, {"gateway started again", "ms", 5000}, {"netd under load", "MiB", 60},
	} {
		v := took[m.what]
		most := 0.0
		for _, x := range v {
			most = max(most, x)
		}
		met := "met"
		if median(v) > m.target {
			met = "MISSED"
		}
		fmt.Printf("move %-30s median %6.0f %-3s most %6.0f  target %5.0f  %s\n", m.what, median(v), m.unit, most, m.target, met)
	}
}

// began returns a world in the state Tunnel with a line to LGWAN.
func began(b *testing.B, before func(*world)) (*world, *line) {
	w := newWorld(b)
	before(w)
	w.startGateway()
	w.attestd.set(gate.StateAffirming, time.Hour)
	w.startNetd()
	w.waitState(30*time.Second, netd.Tunnel, "")
	w.readPage(10 * time.Second)
	echoServer(w.web, "10.1.0.80:7")
	l, err := call(w.work, "10.1.0.80:7", 5*time.Second)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { l.c.Close() })
	return w, l
}

// through waits for an answer on a line to LGWAN; it is the same connection as
// before, or the benchmark fails.
func through(b *testing.B, l *line, what string) {
	b.Helper()
	if err := l.say(what, 30*time.Second); err != nil {
		b.Fatalf("the connection to LGWAN did not live: %s: %v", what, err)
	}
}

func ms(since time.Time) float64 { return float64(time.Since(since).Microseconds()) / 1000 }

// moveOffice moves the cable: times are from its plugging in, DHCP among them,
// until the state is there and LGWAN answers on the old connection.
func moveOffice(b *testing.B, note func(string, float64)) {
	var d *desk
	w, l := began(b, func(w *world) { d = w.newDesk(); d.startBeacon(d.officeCA) })
	defer w.pester()()
	w.plug(w.home, d.router)
	start := time.Now()
	w.waitState(30*time.Second, netd.Office, "")
	through(b, l, "in the office")
	note("tunnel to office", ms(start))
	w.plug(d.router, w.home)
	start = time.Now()
	w.waitState(30*time.Second, netd.Tunnel, "")
	through(b, l, "at home")
	note("office to tunnel", ms(start))
	// As much as the tunnel carries, for a while: what netd needs then.
	if text, err := w.fetch(page+"?bytes="+strconv.Itoa(256<<20), time.Minute); err != nil || len(text) != 256<<20 {
		b.Fatalf("%d bytes: %v", len(text), err)
	}
	note("netd under load", mostResident(b, w.netd.Process.Pid))
	w.kill(w.gateway)
	w.waitState(30*time.Second, netd.Attesting, "")
	w.startGateway()
	start = time.Now()
	through(b, l, "after the restart")
	note("gateway started again", ms(start))
}

// moveUplinks pulls the better of two cables, and plugs it in again.
func moveUplinks(b *testing.B, note func(string, float64)) {
	w, l := began(b, (*world).secondUplink)
	w.bothGood()
	e := w.startEcho(5 * time.Millisecond)
	w.answering(e)
	start := time.Now()
	w.home.Run("ip", "link", "set", "lan0", "down")
	w.waitUplink("eth1")
	w.answering(e)
	gap, _ := e.since(start)
	note("carrier lost", gap.Seconds()*1000)
	through(b, l, "over the other")
	first := e.mark()
	w.home.Run("ip", "link", "set", "lan0", "up")
	w.waitUplink("eth0")
	w.answering(e)
	through(b, l, "over the first again")
	_, lost := e.end(first)
	note("planned change, packets lost", float64(lost))
}

// moveBlackHole lets the uplink in use swallow everything.
func moveBlackHole(b *testing.B, note func(string, float64)) {
	w, l := began(b, (*world).secondUplink)
	w.bothGood()
	e := w.startEcho(5 * time.Millisecond)
	w.answering(e)
	start := time.Now()
	w.home.Run("nft", "add table ip hole; add chain ip hole f { type filter hook forward priority 0; }; add rule ip hole f iifname lan0 drop; add rule ip hole f oifname lan0 drop")
	w.waitUplink("eth1")
	w.answering(e)
	gap, _ := e.since(start)
	note("silent black hole", gap.Seconds()*1000)
	through(b, l, "past the hole")
	e.end(e.mark())
}

// bothGood waits until both uplinks are sound and the first is in use.
func (w *world) bothGood() (s netd.Status) {
	w.t.Helper()
	w.waitUplink("eth0")
	nstest.Eventually(w.t, 20*time.Second, func() (err error) {
		if s, err = w.status(); err == nil && (len(s.Uplinks) != 2 || s.Uplinks[0].Health != netd.HealthGood || s.Uplinks[1].Health != netd.HealthGood) {
			err = fmt.Errorf("uplinks %+v, want two that are good", s.Uplinks)
		}
		return err
	})
	return s
}

// mostResident is the most that a process had resident, in MiB (proc_pid_status(5)).
func mostResident(t testing.TB, pid int) float64 {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "VmHWM:")
	kib, err := strconv.Atoi(strings.Fields(rest)[0])
	if err != nil {
		t.Fatal(err)
	}
	return float64(kib) / 1024
}
