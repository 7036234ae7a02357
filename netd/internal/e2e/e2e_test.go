//go:build linux

package e2e

import (
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"sekisho/attest/gate"
	"sekisho/netd"
	"sekisho/netd/internal/nstest"
)

// tunnelVision is what TunnelVision's DHCP server adds (CVE-2024-3661), and
// other options that must not be obeyed.
func tunnelVision() []string {
	return []string{
		"--dhcp-option-force=121,0.0.0.0/1,192.168.50.1,128.0.0.0/1,192.168.50.1,10.1.0.80/32,192.168.50.1",
		"--dhcp-option-force=249,0.0.0.0/1,192.168.50.1", "--dhcp-option-force=252,http://192.168.50.1/wpad.dat",
		"--dhcp-option-force=114,http://192.168.50.1/portal", "--dhcp-option-force=6,192.168.50.1",
	}
}

func TestPageThroughTheTunnel(t *testing.T) {
	w := newWorld(t, tunnelVision()...)
	w.startGateway()
	w.startNetd()
	w.waitState(20*time.Second, netd.Attesting, netd.ReasonAttestation)
	if _, err := w.fetch(page, time.Second); err == nil {
		t.Error("page read without a credential")
	}
	w.attestd.set(gate.StateAffirming, time.Hour)
	s := w.waitState(20*time.Second, netd.Tunnel, "")
	if s.Line() != "Tunnel inner 10.80.0.2 gateway 203.0.113.20:443" {
		t.Errorf("status line %q", s.Line())
	}
	w.readPage(10 * time.Second)
	if r := w.laptop.Run("ip", "route", "show", "table", "all"); contains(r, "default") || contains(r, "0.0.0.0/1") || contains(r, "10.1.0.80") {
		t.Errorf("routes outside obey the DHCP server:\n%s", r)
	}
	w.checkUplink()
}

// TestGatewayIsNoRouterIntoLGWAN: the gateway switches forwarding on, and still
// nothing but the tunnel leads through its server, in either direction.
func TestGatewayIsNoRouterIntoLGWAN(t *testing.T) {
	w := open(t, time.Hour)
	w.home.Run("ip", "route", "add", "10.1.0.0/24", "via", "203.0.113.20")
	w.web.Run("ip", "route", "add", "203.0.113.0/24", "via", "10.1.0.1")
	if f := w.site.Run("sysctl", "-n", "net.ipv4.ip_forward"); strings.TrimSpace(f) != "1" {
		t.Fatalf("ip_forward at the gateway is %q: this test would prove nothing", f)
	}
	dial := func(from *nstest.NS, to string) error {
		return from.Do(func() error {
			c, err := net.DialTimeout("tcp", to, 2*time.Second)
			if err == nil {
				c.Close()
			}
			return err
		})
	}
	outer := w.home.Listen("203.0.113.1:8080")
	defer outer.Close()
	if err := dial(w.site, "203.0.113.1:8080"); err != nil {
		t.Fatalf("the home's server cannot be reached at all: %v", err)
	}
	if err := dial(w.home, "10.1.0.80:80"); err == nil {
		t.Error("LGWAN can be reached through the gateway's server without a tunnel")
	}
	if err := dial(w.web, "203.0.113.1:8080"); err == nil {
		t.Error("LGWAN reaches out through the gateway's server")
	}
	w.readPage(10 * time.Second)
}

func contains(s, sub string) bool { return strings.Contains(s, sub) }

// open starts everything and waits for the page.
func open(t *testing.T, life time.Duration) *world {
	t.Helper()
	w := newWorld(t, tunnelVision()...)
	w.startGateway()
	w.attestd.set(gate.StateAffirming, life)
	w.startNetd()
	w.waitState(30*time.Second, netd.Tunnel, "")
	w.readPage(10 * time.Second)
	return w
}

func TestGatewayKilledAndRestarted(t *testing.T) {
	w := open(t, time.Hour)
	defer w.pester()()
	w.kill(w.gateway)
	s := w.waitState(5*time.Second, netd.Attesting, netd.ReasonGateway)
	if !contains(s.Detail, "gateway 203.0.113.20:443 unreachable since ") {
		t.Errorf("detail %q", s.Detail)
	}
	if r := w.inside.Run("ip", "route"); contains(r, "default") {
		t.Errorf("a default route without a tunnel: %s", r)
	}
	w.startGateway()
	w.readPage(20 * time.Second)
	if s := w.waitState(time.Second, netd.Tunnel, ""); s.Tunnel.Inner.String() != "10.80.0.2" {
		t.Errorf("inner address after the restart: %s", s.Tunnel.Inner)
	}
	w.checkUplink()
}

// TestGatewaySilent stops the gateway without ending its connections, as a
// dead path does.
func TestGatewaySilent(t *testing.T) {
	t.Parallel() // it mostly waits
	w := open(t, time.Hour)
	w.gateway.Process.Signal(syscall.SIGSTOP)
	start := time.Now()
	w.waitState(15*time.Second, netd.Attesting, "")
	t.Logf("found after %v", time.Since(start).Round(100*time.Millisecond))
	w.gateway.Process.Signal(syscall.SIGCONT)
	w.readPage(45 * time.Second)
	w.checkUplink()
}

func TestNetdKilled(t *testing.T) {
	w := open(t, time.Hour)
	stop := w.pester()
	w.kill(w.netd)
	if _, err := w.fetch(page, 500*time.Millisecond); err == nil {
		t.Error("page read while netd is dead")
	}
	if r := w.inside.Run("ip", "route"); contains(r, "default") {
		t.Errorf("a default route while netd is dead: %s", r)
	}
	w.startNetd()
	w.waitState(30*time.Second, netd.Tunnel, "")
	w.readPage(10 * time.Second)
	stop()
	w.checkUplink()
}

func TestLapseClosesOnTime(t *testing.T) {
	const life = 6 * time.Second
	start := time.Now()
	w := open(t, life)
	lapse := w.attestd.notAfter() // attestd says nothing more: the verifier is away
	w.waitState(life+5*time.Second, netd.Attesting, netd.ReasonLapsed)
	if late := time.Since(lapse); late < 0 || late > 2*time.Second {
		t.Errorf("closed %v after the certificate's end", late)
	}
	if _, err := w.fetch(page, 500*time.Millisecond); err == nil {
		t.Error("page read with a lapsed certificate")
	}
	t.Logf("certificate of %v: closed after %v", life, time.Since(start).Round(100*time.Millisecond))
	w.attestd.set(gate.StateAffirming, time.Hour)
	w.readPage(20 * time.Second)
	w.checkUplink()
}

func TestRefusalClosesAtOnce(t *testing.T) {
	w := open(t, time.Hour)
	w.attestd.set(gate.StateRefused, 0)
	w.waitState(3*time.Second, netd.Attesting, "")
	if _, err := w.fetch(page, 500*time.Millisecond); err == nil {
		t.Error("page read after a refusal")
	}
	w.checkUplink()
}

// TestRenewalLosesNothing renews the credential during a transfer.
func TestRenewalLosesNothing(t *testing.T) {
	w := open(t, time.Hour)
	before, err := w.status()
	if err != nil {
		t.Fatal(err)
	}
	const size = 64 << 20
	read := make(chan error, 1)
	go func() {
		text, err := w.fetch(page+"?bytes="+strconv.Itoa(size), time.Minute)
		if err == nil && len(text) != size {
			err = fmt.Errorf("%d bytes read, want %d", len(text), size)
		}
		read <- err
	}()
	for range 3 {
		w.attestd.set(gate.StateAffirming, 2*time.Hour)
		until := w.attestd.notAfter()
		nstest.Eventually(t, 10*time.Second, func() error {
			s, err := w.status()
			if err == nil && (s.State != netd.Tunnel || !s.Tunnel.Until.Equal(until)) {
				err = fmt.Errorf("still %+v", s.Tunnel)
			}
			return err
		})
	}
	if err := <-read; err != nil {
		t.Error(err)
	}
	after, err := w.status()
	if err != nil {
		t.Fatal(err)
	}
	if !after.Since.Equal(before.Since) || after.Tunnel.Inner != before.Tunnel.Inner {
		t.Errorf("the tunnel closed on the way: %+v", after.History)
	}
	w.checkUplink()
}

func TestSpoofedSourceIsDropped(t *testing.T) {
	w := open(t, time.Hour)
	w.work.Run("ip", "address", "add", "10.80.9.9/32", "dev", "guest0")
	w.work.Run("ip", "address", "add", "192.168.50.77/32", "dev", "guest0")
	seen := make(chan string, 100)
	var l net.PacketConn
	if err := w.web.Do(func() (err error) { l, err = net.ListenPacket("udp", "10.1.0.80:9"); return err }); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for b := make([]byte, 100); ; {
			_, from, err := l.ReadFrom(b)
			if err != nil {
				return
			}
			seen <- from.String()
		}
	}()
	for _, source := range []string{"10.80.9.9", "192.168.50.77", "10.80.0.2"} { // the honest one last
		if err := w.work.Do(func() error {
			c, err := net.DialUDP("udp", &net.UDPAddr{IP: net.ParseIP(source)}, &net.UDPAddr{IP: net.IPv4(10, 1, 0, 80), Port: 9})
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = c.Write([]byte("x"))
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case from := <-seen:
		if !strings.HasPrefix(from, "10.80.0.2:") {
			t.Errorf("a packet from %s arrived", from)
		}
	case <-time.After(5 * time.Second):
		t.Error("the honest packet did not arrive")
	}
	w.checkUplink()
}

// TestCarrierAndEvilLease pulls the cable, and puts an absurd DHCP server at
// its end.
func TestCarrierAndEvilLease(t *testing.T) {
	t.Parallel() // it mostly waits
	w := newWorld(t, "--dhcp-option-force=3,192.168.99.1", "--dhcp-option-force=26,68")
	w.startNetd()
	s := w.waitState(30*time.Second, netd.Dark, netd.ReasonBadLease)
	if !contains(s.Detail, "router 192.168.99.1") {
		t.Errorf("detail %q", s.Detail)
	}
	if a := w.laptop.Run("ip", "-o", "-4", "address", "show", "dev", "eth0"); a != "" {
		t.Errorf("an absurd address was taken: %s", a)
	}
	w.home.Run("ip", "link", "set", "lan0", "down")
	w.waitState(5*time.Second, netd.Dark, netd.ReasonNoCarrier)
	w.laptop.Run("ip", "link", "delete", "eth0")
	w.waitState(5*time.Second, netd.Dark, netd.ReasonNoLink)
}

func TestAttestdAway(t *testing.T) {
	w := newWorld(t)
	if err := os.Remove(w.path("attestd.sock")); err != nil {
		t.Fatal(err)
	}
	w.startNetd()
	s := w.waitState(30*time.Second, netd.Linked, netd.ReasonAttestd)
	if !contains(s.Line(), "Linked eth0 192.168.50.") {
		t.Errorf("line %q", s.Line())
	}
}
