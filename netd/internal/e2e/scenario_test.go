//go:build linux

package e2e

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/server4"

	"sekisho/attest/gate"
	"sekisho/netd"
	"sekisho/netd/internal/nstest"
	"sekisho/netd/journal"
	"sekisho/netd/kernel"
	"sekisho/netd/office"
	"sekisho/netd/plan"
	"sekisho/netd/tunnel"
)

// scenario is one thing that must not make a packet go astray. A hostile work
// domain sends all the time, and every LAN that the laptop meets is captured
// from its first frame on.
type scenario struct {
	name string
	dhcp []string // extra arguments of the home's DHCP server
	// before changes the world before netd starts; after it, unless dark, netd
	// has come to the state Tunnel. run then does what the scenario is about.
	before func(*world)
	dark   bool
	waits  bool          // it mostly waits, and is not measured: others may run beside it
	life   time.Duration // of the certificate, an hour if absent
	run    func(*testing.T, *world)
}

// together is how many of the scenarios that only wait run at once.
const together = 4

// TestScenarios runs them all and prints what was sent, delivered and leaked.
func TestScenarios(t *testing.T) {
	nstest.Require(t, "dnsmasq", "nft", "tc")
	var total tally
	var waiting sync.WaitGroup
	places := make(chan struct{}, together)
	all := append(scenarios(), scenarios6()...)
	for _, s := range all {
		if !s.waits {
			t.Run(s.name, func(t *testing.T) { s.play(t, &total) })
		}
	}
	for _, s := range all {
		if s.waits {
			waiting.Go(func() {
				places <- struct{}{}
				defer func() { <-places }()
				t.Run(s.name, func(t *testing.T) { s.play(t, &total) })
			})
		}
	}
	waiting.Wait()
	fmt.Printf("scenario %-58s sent %7d  delivered %6d  leaked %d\n", "TOTAL", total.sent.Load(), total.delivered.Load(), total.leaked.Load())
}

// tally is over all scenarios.
type tally struct{ sent, delivered, leaked atomic.Int64 }

func (s scenario) play(t *testing.T, total *tally) {
	w := newWorld(t, s.dhcp...)
	w.startGateway()
	w.attestd.set(gate.StateAffirming, cmp.Or(s.life, time.Hour))
	w.tapped.quiet = s.dark
	stop := w.pester()
	if s.before != nil {
		s.before(w)
	}
	w.startNetd()
	if !s.dark {
		w.waitState(30*time.Second, netd.Tunnel, "")
		w.readPage(10 * time.Second)
	}
	if s.run != nil {
		s.run(t, w)
	}
	nstest.Eventually(t, time.Minute, func() error { // each of its packets at least once
		if n := int(w.tapped.sent.Load()); n < len(hostile()) {
			return fmt.Errorf("only %d packets sent", n)
		}
		return nil
	})
	stop()
	v := w.judge()
	sent := w.tapped.sent.Load()
	fmt.Printf("scenario %-58s sent %7d  delivered %6d  leaked %d\n", s.name, sent, v.delivered, v.leaked)
	total.sent.Add(sent)
	total.delivered.Add(int64(v.delivered))
	total.leaked.Add(int64(v.leaked))
}

func scenarios() []scenario {
	again := func(t *testing.T, w *world) { w.readPage(30 * time.Second) }
	force := func(options ...string) (out []string) {
		for _, o := range options {
			out = append(out, "--dhcp-option-force="+o)
		}
		return out
	}
	return append([]scenario{
		{name: "TunnelVision 0/1 and 128/1", dhcp: force("121,0.0.0.0/1,192.168.50.1,128.0.0.0/1,192.168.50.1", "249,0.0.0.0/1,192.168.50.1,128.0.0.0/1,192.168.50.1"), run: again},
		{name: "TunnelVision /32 of the server", dhcp: force("121,10.1.0.80/32,192.168.50.1", "33,10.1.0.80,192.168.50.1"), run: again},
		{name: "DHCP names resolvers, proxies and portals", dhcp: force("6,192.168.50.1", "252,http://192.168.50.1/wpad.dat", "114,http://192.168.50.1/portal", "43,01:04:c0:a8:32:01"), run: again},
		{name: "LAN claims the inner server's prefix", run: claimingLAN},
		{name: "IPv6 router advertisements and RDNSS", before: advertise, run: func(t *testing.T, w *world) {
			w.readPage(10 * time.Second)
			for _, ns := range []*nstest.NS{w.laptop, w.inside} {
				if a := ns.Run("ip", "-6", "-o", "address", "show", "scope", "global"); a != "" {
					t.Errorf("an IPv6 address was taken: %s", a)
				}
				if r := ns.Run("ip", "-6", "route", "show", "default"); r != "" && (ns != w.inside || !strings.HasPrefix(r, "default dev tun0") || strings.Count(r, "\n") != 1) {
					t.Errorf("an IPv6 default route was taken: %s", r)
				}
			}
		}},
		{name: "IPv6 in the tunnel", run: func(t *testing.T, w *world) {
			w.readPage6(20 * time.Second)
			if text, err := w.fetch(page6+"?bytes="+strconv.Itoa(4<<20), 30*time.Second); err != nil || len(text) != 4<<20 {
				t.Errorf("%d bytes over IPv6: %v", len(text), err)
			}
			if s := w.waitState(time.Second, netd.Tunnel, ""); s.Tunnel == nil || s.Tunnel.Inner6.String() != inner6 {
				t.Errorf("status shows %+v", s.Tunnel)
			}
			w.attestd.set(gate.StateRefused, 0)
			w.waitState(10*time.Second, netd.Attesting, "")
			if r := w.inside.Run("ip", "-6", "route"); r != "" {
				t.Errorf("IPv6 routes inside while closed: %s", r)
			}
			w.attestd.set(gate.StateAffirming, time.Hour)
			again(t, w)
		}},
		{name: "CVE-2019-14899: probes for the inner address", run: probes},
		{name: "DHCP: MTU 68", waits: true, dhcp: force("26,68"), dark: true, run: absurdThenGood},
		{name: "DHCP: the laptop's own address as router", waits: true, dark: true, before: func(w *world) { w.evilDHCP(dhcpv4.WithRouter(net.IPv4(192, 168, 50, 99))) }, run: absurdThenGood},
		{name: "DHCP: a lease of no time", waits: true, dark: true, before: func(w *world) { w.evilDHCP(dhcpv4.WithLeaseTime(0)) }, run: absurdThenGood},
		{name: "DHCP: malformed options", waits: true, dark: true, before: func(w *world) {
			w.evilDHCP(dhcpv4.WithGeneric(dhcpv4.OptionSubnetMask, []byte{255}), dhcpv4.WithGeneric(dhcpv4.OptionRouter, []byte{1, 2, 3, 4, 5}), dhcpv4.WithGeneric(dhcpv4.OptionIPAddressLeaseTime, []byte{1}))
		}, run: absurdThenGood},
		{name: "UDP blocked", before: func(w *world) { w.firewall("meta l4proto udp drop") }, run: again},
		{name: "MTU black hole of 1280 bytes", before: func(w *world) {
			w.firewall("icmp type destination-unreachable drop")
			w.home.Run("nft", "add chain ip evil out { type filter hook output priority 0; }; add rule ip evil out icmp type destination-unreachable drop")
			w.home.Run("ip", "link", "set", "wan0", "mtu", "1280")
		}, run: func(t *testing.T, w *world) {
			if text, err := w.fetch(page+"?bytes="+strconv.Itoa(1<<20), 60*time.Second); err != nil || len(text) != 1<<20 {
				t.Errorf("%d bytes through the black hole: %v", len(text), err)
			}
		}},
		{name: "carrier flaps ten times a second", run: func(t *testing.T, w *world) {
			for range 20 {
				w.home.Run("ip", "link", "set", "lan0", "down")
				<-time.After(50 * time.Millisecond)
				w.home.Run("ip", "link", "set", "lan0", "up")
				<-time.After(50 * time.Millisecond)
			}
			again(t, w)
		}},
		{name: "uplink swallows everything for a while", waits: true, run: func(t *testing.T, w *world) {
			w.firewall("drop")
			w.waitState(40*time.Second, netd.Attesting, "")
			w.home.Run("nft", "delete table ip evil")
			w.readPage(60 * time.Second)
		}},
		{name: "gateway killed and started again", run: func(t *testing.T, w *world) {
			w.kill(w.gateway)
			w.waitState(10*time.Second, netd.Attesting, "")
			start := time.Now()
			w.startGateway()
			again(t, w)
			t.Logf("data again %v after the start", time.Since(start).Round(time.Millisecond))
		}},
		{name: "verifier away until the certificate lapses", life: 8 * time.Second, run: func(t *testing.T, w *world) {
			s := w.waitState(30*time.Second, netd.Attesting, netd.ReasonLapsed)
			if !strings.HasPrefix(s.Detail, "attestation lapsed at ") || !strings.Contains(s.Words.EN, "attestation lapsed") {
				t.Errorf("said %q, %q", s.Detail, s.Words.EN)
			}
			w.attestd.set(gate.StateUnreachable, 0)
			<-time.After(time.Second)
			if s := w.waitState(time.Second, netd.Attesting, netd.ReasonLapsed); !strings.Contains(s.Detail, "verifier unreachable since ") {
				t.Errorf("said %q", s.Detail)
			}
			w.attestd.set(gate.StateAffirming, time.Hour)
			again(t, w)
		}},
		{name: "certificate lapses in mid-transfer", life: 6 * time.Second, run: func(t *testing.T, w *world) { midTransfer(t, w, func() {}) }},
		{name: "revoked in mid-transfer", run: func(t *testing.T, w *world) {
			midTransfer(t, w, func() { w.attestd.set(gate.StateRefused, 0) })
		}},
		{name: "clock at 1970", before: func(w *world) { w.verifierAt(time.Now().AddDate(50, 0, 0)) }, run: clockSeen},
		{name: "clock ten years ahead", before: func(w *world) { w.verifierAt(time.Now().Add(-30 * time.Minute)) }, run: clockSeen},
		{name: "clock a day behind", before: func(w *world) { w.verifierAt(time.Now().AddDate(0, 0, 1)) }, run: clockSeen},
		{name: "suspended, resumed in another network", run: elsewhere},
		{name: "no network card, then one under another name", run: renamed},
		{name: "captive portal that fakes 204", dark: true, before: func(w *world) { w.portal() }, run: portalThenOpen},
		{name: "captive portal that drops port 443", waits: true, dark: true, dhcp: force("114,http://192.168.50.1/portal"), before: func(w *world) { w.firewall("drop") }, run: func(t *testing.T, w *world) {
			s := w.waitState(60*time.Second, netd.Attesting, netd.ReasonGateway)
			if !s.Uplink.SignIn || s.Words.EN != "Blocked: the gateway does not answer over this network; it says that it has a sign-in page" || !strings.Contains(s.Words.JA, "サインインページ") {
				t.Errorf("words %+v, uplink %+v", s.Words, s.Uplink)
			}
			w.home.Run("nft", "delete table ip evil")
			w.waitState(90*time.Second, netd.Tunnel, "")
		}},
		{name: "true office appears and vanishes", before: func(w *world) { w.newDesk() }, run: comesAndGoes},
		{name: "netd: kill -9 in every state", dark: true, before: func(w *world) { w.newDesk() }, run: inEveryState((*world).killNetd)},
		{name: "attestd: kill -9 in every state", dark: true, before: func(w *world) { w.newDesk() }, run: inEveryState((*world).killAttestd)},
		{name: "linkd: kill -9 in every state", dark: true, before: func(w *world) { w.newDesk() }, run: inEveryState((*world).killLinkd)},
		{name: "all three: kill -9 in every state", dark: true, before: func(w *world) { w.newDesk() }, run: inEveryState((*world).killLinkd, (*world).killAttestd, (*world).killNetd)},
		{name: "flood into an uplink of 1 Mbit/s", run: floodSlow},
		{name: "1,000 ruleset swaps under flood", before: func(w *world) { w.newDesk() }, run: swaps},
		{name: "packets before the rules and before netd", dark: true, before: func(w *world) { <-time.After(2 * time.Second) }, run: func(t *testing.T, w *world) {
			w.waitState(30*time.Second, netd.Tunnel, "")
		}},
	}, attacks()...)
}

// firewall adds a rule to what the home forwards.
func (w *world) firewall(rule string) {
	w.t.Helper()
	w.home.Run("nft", "add table ip evil; add chain ip evil f { type filter hook forward priority 0; }; add rule ip evil f "+rule)
}

// claimingLAN puts the laptop into a LAN with the page's own address in it.
func claimingLAN(t *testing.T, w *world) {
	l := w.lan("claiming", "10.1.0", "--dhcp-option-force=121,10.1.0.0/24,10.1.0.9")
	l.connect("192.0.2", 101) // a way to the site, but not for 10.1.0.0/24, which is LGWAN's there
	l.router.Run("nft", "add table ip n; add chain ip n p { type nat hook postrouting priority 100; }; add rule ip n p oifname wan0 masquerade")
	fake := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) { io.WriteString(rw, "a fake") })}
	go fake.Serve(l.servers.Listen("10.1.0.80:80"))
	defer fake.Close()
	w.plug(w.home, l.router)
	w.waitAddress("10.1.0.")
	w.readPage(20 * time.Second) // fails with the fake's text
}

func advertise(w *world) {
	w.home.Run("sysctl", "-qw", "net.ipv6.conf.lan0.disable_ipv6=0", "net.ipv6.conf.all.forwarding=1")
	w.home.Run("ip", "address", "add", "fd00:50::1/64", "dev", "lan0", "nodad")
	w.home.Start("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--port=0", "--interface=lan0", "--bind-interfaces", "--leasefile-ro", "--enable-ra", "--ra-param=lan0,high,4,1200",
		"--dhcp-range=fd00:50::,ra-stateless,64,2m", "--dhcp-option=option6:dns-server,[fd00:50::1]", "--no-ping", "--pid-file="+w.path("ra.pid"))
}

// probes sends to the inner address from the LAN, as its server and as others.
func probes(t *testing.T, w *world) {
	s := w.waitAddress("192.168.50.")
	w.home.Run("ip", "route", "add", "10.80.0.2/32", "via", s.Uplink.Address.Addr().String(), "dev", "lan0")
	w.home.Run("ip", "address", "add", "10.1.0.80/32", "dev", "lo")
	for _, from := range []string{"192.168.50.1", "10.1.0.80"} {
		for _, port := range []int{7, 22, 80, 135, 445, 3389, 5985, 40000} {
			d := net.Dialer{Timeout: 150 * time.Millisecond, LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
			for _, to := range []string{"10.80.0.2", s.Uplink.Address.Addr().String()} {
				w.home.Do(func() error {
					if c, err := d.Dial("tcp", net.JoinHostPort(to, strconv.Itoa(port))); err == nil {
						c.Close()
						t.Errorf("%s:%d answers the LAN", to, port)
					} else if strings.Contains(err.Error(), "refused") {
						t.Errorf("%s:%d refuses the LAN: it tells that it is there", to, port)
					}
					return nil
				})
			}
		}
	}
	w.readPage(10 * time.Second)
}

// absurdThenGood waits until an absurd lease is refused, and for a sound one.
func absurdThenGood(t *testing.T, w *world) {
	w.waitState(30*time.Second, netd.Dark, netd.ReasonBadLease)
	if a := w.laptop.Run("ip", "-o", "-4", "address", "show", "dev", "eth0"); a != "" {
		t.Errorf("an absurd address was taken: %s", a)
	}
	w.dnsmasq = nil
	w.startDHCP()
	w.waitState(60*time.Second, netd.Tunnel, "")
}

// evilDHCP answers in the place of the home's DHCP server.
func (w *world) evilDHCP(modify ...dhcpv4.Modifier) {
	w.dhcpServer(func(*dhcpv4.DHCPv4) []dhcpv4.Modifier { return modify })
}

// dhcpServer does, with what answer changes of a sound lease.
func (w *world) dhcpServer(answer func(*dhcpv4.DHCPv4) []dhcpv4.Modifier) {
	w.kill(w.dhcp)
	var server *server4.Server
	handler := func(conn net.PacketConn, peer net.Addr, m *dhcpv4.DHCPv4) {
		kind := dhcpv4.MessageTypeOffer
		if m.MessageType() == dhcpv4.MessageTypeRequest {
			kind = dhcpv4.MessageTypeAck
		}
		r, err := dhcpv4.NewReplyFromRequest(m, append([]dhcpv4.Modifier{
			dhcpv4.WithMessageType(kind), dhcpv4.WithYourIP(net.IPv4(192, 168, 50, 99)), dhcpv4.WithServerIP(net.IPv4(192, 168, 50, 1)),
			dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.IPv4(192, 168, 50, 1))), dhcpv4.WithNetmask(net.CIDRMask(24, 32)),
			dhcpv4.WithRouter(net.IPv4(192, 168, 50, 1)), dhcpv4.WithLeaseTime(3600),
		}, answer(m)...)...)
		if err == nil {
			conn.WriteTo(r.ToBytes(), &net.UDPAddr{IP: net.IPv4bcast, Port: 68})
		}
	}
	if err := w.home.Do(func() (err error) {
		server, err = server4.NewServer("lan0", &net.UDPAddr{Port: 67}, handler)
		return err
	}); err != nil {
		w.t.Fatal(err)
	}
	go server.Serve()
	w.dhcp = exec.Command("sleep", "100000") // so that startDHCP ends this one
	if err := w.dhcp.Start(); err != nil {
		w.t.Fatal(err)
	}
	go func() { w.dhcp.Wait(); server.Close() }()
}

// midTransfer downloads, does something, and waits until all is closed.
func midTransfer(t *testing.T, w *world, act func()) {
	ended := make(chan int, 1)
	go func() {
		text, _ := w.fetch(page+"?bytes="+strconv.Itoa(1<<33), 3*time.Second)
		ended <- len(text)
	}()
	// Half a second of it is enough: every frame is judged afterwards.
	<-time.After(min(time.Until(w.attestd.notAfter())-500*time.Millisecond, 500*time.Millisecond))
	start := time.Now()
	act()
	w.waitState(20*time.Second, netd.Attesting, "")
	if notAfter := w.attestd.notAfter(); !notAfter.IsZero() {
		start = notAfter
	}
	t.Logf("closed %v after it", time.Since(start).Round(time.Millisecond))
	if r := w.inside.Run("ip", "route"); strings.Contains(r, "default") {
		t.Errorf("still a route into the tunnel: %s", r)
	}
	if _, err := w.fetch(page, 500*time.Millisecond); err == nil {
		t.Error("the page is read after it")
	}
	w.attestd.set(gate.StateAffirming, time.Hour)
	w.readPage(30 * time.Second)
}

// verifierAt serves a verifier whose clock is right and says at; the laptop's
// is then the wrong one.
func (w *world) verifierAt(at time.Time) {
	chain, key := w.ca.server(w.t, "verifier.test")
	pair, err := tls.X509KeyPair(chain, key)
	if err != nil {
		w.t.Fatal(err)
	}
	off := time.Until(at)
	s := &http.Server{
		Handler: http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
			rw.Header().Set("Date", time.Now().Add(off).UTC().Format(http.TimeFormat))
		}),
		ErrorLog: log.New(io.Discard, "", 0),
	}
	go s.Serve(tls.NewListener(w.site.Listen(verifierAddr), &tls.Config{Certificates: []tls.Certificate{pair}, CurvePreferences: []tls.CurveID{tls.SecP256r1MLKEM768}}))
	w.t.Cleanup(func() { s.Close() })
}

// clockSeen waits until netd has noticed. It may not set this machine's clock:
// netd runs without CAP_SYS_TIME here.
func clockSeen(t *testing.T, w *world) {
	nstest.Eventually(t, 20*time.Second, func() error {
		for _, e := range w.journal().Events {
			if e.Kind == journal.Clock && e.Code == "wrong" && strings.Contains(e.EN, "operation not permitted") {
				return nil
			}
		}
		return fmt.Errorf("no such event in %+v", w.journal().Events)
	})
	w.readPage(10 * time.Second)
}

func (w *world) journal() (r journal.Report) {
	w.t.Helper()
	out, err := exec.Command(filepath.Join(programs, "netd"), "journal", "-socket", w.path("netd.sock"), "--json").Output()
	if err == nil {
		err = json.Unmarshal(out, &r)
	}
	if err != nil {
		w.t.Fatal(err)
	}
	return r
}

// elsewhere stops netd as a suspend does, and lets it wake up in another LAN.
func elsewhere(t *testing.T, w *world) {
	l := w.lan("elsewhere", "172.20.7")
	l.connect("172.20.7", 102)
	w.netd.Process.Signal(syscall.SIGSTOP)
	w.plug(w.home, l.router)
	<-time.After(3 * time.Second)
	w.netd.Process.Signal(syscall.SIGCONT)
	start := time.Now()
	w.waitAddress("172.20.7.")
	w.readPage(40 * time.Second)
	t.Logf("page %v after the resume", time.Since(start).Round(time.Millisecond))
}

// renamed takes the only card away and gives it back under another name.
func renamed(t *testing.T, w *world) {
	w.laptop.Run("ip", "link", "set", "eth0", "netns", w.home.Path)
	w.waitState(10*time.Second, netd.Dark, netd.ReasonNoLink)
	w.home.Run("ip", "link", "set", "eth0", "name", "wwan7")
	w.home.Run("ip", "link", "set", "wwan7", "netns", w.laptop.Path)
	w.readPage(30 * time.Second)
	w.laptop.Run("ip", "link", "set", "wwan7", "down")
	w.laptop.Run("ip", "link", "set", "wwan7", "name", "enp9s9")
	w.laptop.Run("ip", "link", "set", "enp9s9", "up")
	nstest.Eventually(t, 30*time.Second, func() error {
		s, err := w.status()
		if err == nil && (s.State != netd.Tunnel || s.Uplink.Name != "enp9s9") {
			err = fmt.Errorf("%s", s.Line())
		}
		return err
	})
	w.readPage(30 * time.Second)
}

// portal answers every connection in the site's place: HTTP status 204 to
// whatever is asked.
func (w *world) portal() {
	w.home.Run("nft", "add table ip portal; add chain ip portal p { type nat hook prerouting priority -100; }; add rule ip portal p tcp dport { 80, 443 } dnat to 192.168.50.1:8080")
	w.firewall("drop") // and nothing else goes through
	l := w.home.Listen("192.168.50.1:8080")
	go func() {
		for { // it answers 204 whatever it hears, TLS hellos too
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(time.Second))
				c.Read(make([]byte, 1024))
				io.WriteString(c, "HTTP/1.1 204 No Content\r\n\r\n")
			}()
		}
	}()
}

func portalThenOpen(t *testing.T, w *world) {
	s := w.waitState(30*time.Second, netd.Portal, netd.ReasonPortal)
	if s.Words.EN != "Sign in to this network" {
		t.Errorf("words %+v", s.Words)
	}
	if r := w.inside.Run("ip", "route"); r != "" {
		t.Errorf("routes inside behind a portal: %s", r)
	}
	w.home.Run("nft", "delete table ip portal; delete table ip evil")
	w.waitState(60*time.Second, netd.Tunnel, "")
}

// comesAndGoes starts and kills the beacon of the LAN where the laptop is.
func comesAndGoes(t *testing.T, w *world) {
	w.plug(w.home, w.desk.router)
	w.waitAddress("10.20.0.")
	w.waitState(20*time.Second, netd.Tunnel, "")
	w.desk.startBeacon(w.desk.officeCA)
	w.waitState(40*time.Second, netd.Office, "")
	start := time.Now()
	w.kill(w.desk.beacon)
	w.waitState(10*time.Second, netd.Tunnel, "")
	t.Logf("Tunnel %v after the beacon's end", time.Since(start).Round(time.Millisecond))
	w.desk.startBeacon(w.desk.officeCA)
	w.waitState(60*time.Second, netd.Office, "")
	w.desk.beacon.Process.Signal(syscall.SIGSTOP) // silent, as a switch that has moved the port to another LAN
	start = time.Now()
	w.waitState(10*time.Second, netd.Tunnel, "")
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("Tunnel %v after the beacon fell silent", took)
	} else {
		t.Logf("Tunnel %v after the beacon fell silent", took.Round(time.Millisecond))
	}
	w.readPage(20 * time.Second)
}

// floodSlow sends as fast as the work domain can into a slow uplink.
func floodSlow(t *testing.T, w *world) {
	w.home.Run("tc", "qdisc", "add", "dev", "wan0", "root", "tbf", "rate", "1mbit", "burst", "16kb", "latency", "100ms")
	packet := hostile()[0]
	packet = append(packet, make([]byte, 1300)...)
	packet[2], packet[3] = byte(len(packet)>>8), byte(len(packet))
	batch := make([][]byte, 64)
	for i := range batch {
		batch[i] = packet
	}
	bytes := 0
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); {
		if w.inject(batch) == nil {
			bytes += len(batch) * len(packet)
			w.tapped.sent.Add(int64(len(batch)))
		}
	}
	t.Logf("offered %.1f Gbit/s", float64(bytes)*8/5/1e9)
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", w.netd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if kb, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			n, _ := strconv.Atoi(strings.Fields(kb)[0])
			t.Logf("netd holds %d MB", n/1024)
			if n > 200<<10 {
				t.Errorf("netd grew to %d MB", n/1024)
			}
		}
	}
	w.home.Run("tc", "qdisc", "del", "dev", "wan0", "root")
	w.readPage(60 * time.Second)
}

// swaps puts one plan after the other in force, as no netd ever would.
func swaps(t *testing.T, w *world) {
	w.plug(w.home, w.desk.router)
	s := w.waitAddress("10.20.0.")
	w.kill(w.netd)
	var ns [2]*kernel.Namespace
	for i, path := range []string{w.laptop.Path, w.inside.Path} {
		n, err := kernel.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer n.Close()
		ns[i] = n
	}
	device := func(n *kernel.Namespace, name string) *tunnel.Device {
		dev, err := n.CreateTUN(name, 1400)
		if err != nil {
			t.Fatal(err)
		}
		return tunnel.NewDevice(dev)
	}
	tun := device(ns[1], netd.TunnelLink)
	defer tun.Close()
	go func() {
		for {
			if _, err := tun.Read(); err != nil {
				return
			}
		}
	}()
	pipe := office.NewPipe(device(ns[1], netd.OfficeLink), device(ns[0], netd.OfficeOuterLink))
	pipe.Open(time.Now().Add(time.Hour), func() bool { return true })
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- pipe.Run(ctx) }()
	defer func() { cancel(); <-done }()

	situation := plan.Situation{
		Links: []string{"eth0"}, Uplink: s.Uplink, Endpoints: w.allowed(), Inner: netip.MustParseAddr("10.80.0.2"), Inner6: netip.MustParseAddr(inner6), MTU: 1400, Session: true,
		Networks: []netip.Prefix{netip.MustParsePrefix("10.20.0.0/24")}, Work: true, Tun: true, Pipe: true,
	}
	states := []netd.State{netd.Tunnel, netd.Office, netd.Dark, netd.Office, netd.Linked, netd.Tunnel, netd.Attesting}
	start := time.Now()
	for i := range 1000 {
		situation.State = states[i%len(states)]
		p := plan.Make(situation)
		if err := errors.Join(ns[1].Apply(p.Inside), ns[0].Apply(p.Outside)); err != nil {
			t.Fatalf("swap %d to %s: %v", i, situation.State, err)
		}
	}
	t.Logf("1000 swaps in %v", time.Since(start).Round(time.Millisecond))
}
