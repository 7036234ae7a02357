//go:build linux

package e2e

import (
	"bufio"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/attest/gate"
	"sekisho/netd"
	"sekisho/netd/internal/nstest"
)

// The office's LAN, 10.20.0.0/24, behind a router of its own:
//
//	laptop eth0 ── lan0 ─ br0 10.20.0.1 ─ router ── 198.51.100.0/24 ── site
//	                       └─ servers: beacon 10.20.0.9, assets 10.20.0.77
const (
	beaconAddr = "10.20.0.9:8443"
	assetsAddr = "10.20.0.77:8080"
	// sessions of the work domain's own servers, as WinRM has
	manageable = "10.80.0.2:5985"
)

// desk is an office of the world's organisation, or one that looks like it.
type desk struct {
	w               *world
	router, servers *nstest.NS
	officeCA        *authority
	beacon          *exec.Cmd
}

// newDesk builds the office and puts it into the organisation's configuration.
// netd must not run yet.
func (w *world) newDesk() *desk {
	d := w.lookalike("desk")
	w.desk = d
	d.officeCA = newAuthority(w.t, "Office CA")
	w.organization.Office = &attest.Office{
		CA:      d.officeCA.pem(),
		Beacons: []attest.Beacon{{Endpoint: attest.Endpoint{Address: netip.MustParseAddrPort(beaconAddr), ServerName: "beacon.test"}, Site: "hq"}},
		// A loaded test machine is slower than any office.
		MaxRoundTripMS: 20,
	}
	d.connect("10.20.0", 100)
	return d
}

// connect gives the LAN a way to the site, over 198.51.NUMBER.0/24.
func (d *desk) connect(net24 string, number int) {
	wan := fmt.Sprintf("198.51.%d.", number)
	nstest.Pair(d.router, "wan0", wan+"1/24", d.w.site, fmt.Sprintf("wan%d", number), wan+"20/24")
	d.router.Run("ip", "route", "add", "203.0.113.0/24", "via", wan+"20")
	d.w.site.Run("ip", "route", "add", net24+".0/24", "via", wan+"1")
}

// lookalike builds a LAN with the office's addresses, hardware addresses and
// domain, without a beacon and a way to the site.
func (w *world) lookalike(name string) *desk { return w.lan(name, "10.20.0") }

// lan builds a LAN of a /24 that begins so, with DHCP by dnsmasq and its arguments.
func (w *world) lan(name, net24 string, dhcp ...string) *desk {
	d := &desk{w: w, router: nstest.New(w.t, name), servers: nstest.New(w.t, name+"-servers")}
	w.lans = append(w.lans, netip.MustParsePrefix(net24+".0/24"))
	d.router.Run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.default.disable_ipv6=1")
	d.servers.Run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.default.disable_ipv6=1")
	d.router.Run("ip", "link", "add", "br0", "address", "02:20:00:00:00:01", "up", "type", "bridge", "forward_delay", "0")
	d.router.Run("ip", "address", "add", net24+".1/24", "dev", "br0")
	d.router.Run("ip", "link", "add", "srv0", "type", "veth", "peer", "name", "eth0", "address", "02:20:00:00:00:09", "netns", d.servers.Path)
	d.router.Run("ip", "link", "set", "srv0", "up", "master", "br0")
	for _, a := range []string{".9/24", ".77/24", ".80/24"} {
		d.servers.Run("ip", "address", "add", net24+a, "dev", "eth0")
	}
	d.servers.Run("ip", "link", "set", "eth0", "up")
	d.router.Start("dnsmasq", append([]string{"--keep-in-foreground", "--log-facility=-", "--conf-file=/dev/null", "--port=0", "--interface=br0", "--bind-dynamic", "--leasefile-ro",
		"--dhcp-range=" + net24 + ".100," + net24 + ".200,255.255.255.0,2m", "--dhcp-authoritative", "--no-ping", "--domain=city.example", "--pid-file=" + w.path(name+".pid")}, dhcp...)...)
	return d
}

// startBeacon starts a beacon with a certificate of ca in the LAN's servers.
func (d *desk) startBeacon(ca *authority) {
	name := filepath.Base(d.router.Path)
	chain, key := ca.beacon(d.w.t, "beacon.test", "hq")
	d.w.writeBytes(name+"-beacon.crt", chain)
	d.w.writeBytes(name+"-beacon.key", key)
	d.w.write(name+"-beacon.json", map[string]any{
		"site": "hq", "interface": "eth0", "listen": beaconAddr, "networks": []string{"10.20.0.0/24"},
		"certificate": d.w.path(name + "-beacon.crt"), "key": d.w.path(name + "-beacon.key"), "client_ca": d.w.path("verifier-ca.crt"),
	})
	d.beacon = d.servers.Start(filepath.Join(programs, "beacon"), "serve", "-config", d.w.path(name+"-beacon.json"))
}

// beacon issues a certificate for a beacon of a site.
func (a *authority) beacon(t testing.TB, name, site string) (chain, key []byte) {
	k := newKey(t)
	uri, err := url.Parse(attest.SiteURI(site))
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(7), DNSNames: []string{name}, URIs: []*url.URL{uri},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	der, err := x509.MarshalECPrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return []byte(certPEM(issue(t, template, a.cert, k.Public(), a.key))), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})
}

// plug moves the laptop's cable into another LAN: out of from, where its far
// end is lan0, into to, on the bridge br0 if that has one. The new LAN is
// captured from its first frame on.
func (w *world) plug(from, to *nstest.NS) {
	w.t.Helper()
	from.Run("ip", "link", "set", "lan0", "down")
	from.Run("ip", "link", "set", "lan0", "netns", to.Path)
	w.tap(to)
	if _, err := to.Try("ip", "link", "show", "br0"); err == nil {
		to.Run("ip", "link", "set", "lan0", "master", "br0")
	} else {
		to.Run("ip", "address", "add", "192.168.50.1/24", "dev", "lan0")
	}
	to.Run("ip", "link", "set", "lan0", "up")
	if to == w.home {
		w.startDHCP()
	}
}

// line is an open connection on which the far end answers every line.
type line struct {
	c net.Conn
	r *bufio.Reader
}

// echoServer answers every line on address.
func echoServer(ns *nstest.NS, address string) {
	l := ns.Listen(address)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); io.Copy(c, c) }()
		}
	}()
}

// call opens a line from one namespace to an echo server.
func call(from *nstest.NS, address string, limit time.Duration) (*line, error) {
	var c net.Conn
	err := from.Do(func() (err error) { c, err = net.DialTimeout("tcp", address, limit); return err })
	if err != nil {
		return nil, err
	}
	return &line{c, bufio.NewReader(c)}, nil
}

// say sends a line and waits for it to come back.
func (l *line) say(text string, limit time.Duration) error {
	l.c.SetDeadline(time.Now().Add(limit))
	if _, err := fmt.Fprintln(l.c, text); err != nil {
		return err
	}
	got, err := l.r.ReadString('\n')
	if err == nil && strings.TrimSpace(got) != text {
		err = fmt.Errorf("heard %q, said %q", got, text)
	}
	return err
}

// TestOfficeAndBack takes the laptop from home to the office and home again
// with a connection to LGWAN open all the time.
func TestOfficeAndBack(t *testing.T) {
	w := newWorld(t)
	d := w.newDesk()
	d.startBeacon(d.officeCA)
	w.startGateway()
	w.attestd.set(gate.StateAffirming, time.Hour)
	w.startNetd()
	w.waitState(30*time.Second, netd.Tunnel, "")
	w.readPage(10 * time.Second)
	echoServer(w.web, "10.1.0.80:7")
	lgwan, err := call(w.work, "10.1.0.80:7", 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer lgwan.c.Close()
	if err := lgwan.say("at home", 5*time.Second); err != nil {
		t.Fatal(err)
	}
	// Servers that say who called.
	who := func(l net.Listener) {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			io.WriteString(c, c.RemoteAddr().String()+"\n")
			c.Close()
		}
	}
	go who(d.servers.Listen(assetsAddr))
	go who(w.work.Listen(manageable))
	stop := w.pester()
	defer stop()

	for round := range 2 {
		start := time.Now()
		w.plug(w.home, d.router)
		s := w.waitState(20*time.Second, netd.Office, "")
		arrived := time.Since(start)
		lan := s.Uplink.Address.Addr()
		if !strings.HasPrefix(s.Line(), "Office hq eth0 10.20.0.") || s.Office == nil || s.Office.Site != "hq" {
			t.Errorf("status %q %+v", s.Line(), s.Office)
		}
		// Out: the LAN's server sees the laptop's own address in the LAN.
		seen := ask(t, w.work, assetsAddr)
		if seen.Addr() != lan {
			t.Errorf("the LAN's server saw %s, the laptop has %s", seen, lan)
		}
		// In: the asset-management server reaches the work domain there.
		if seen := ask(t, d.servers, netip.AddrPortFrom(lan, 5985).String()); seen.Addr().String() != "10.20.0.9" && seen.Addr().String() != "10.20.0.77" {
			t.Errorf("the work domain saw %s", seen)
		}
		if err := lgwan.say(fmt.Sprintf("in the office %d", round), 20*time.Second); err != nil {
			t.Fatalf("connection to LGWAN, home to office: %v", err)
		}
		through := time.Since(start)

		start = time.Now()
		w.plug(d.router, w.home)
		w.waitState(20*time.Second, netd.Tunnel, "")
		left := time.Since(start)
		if err := lgwan.say(fmt.Sprintf("at home again %d", round), 20*time.Second); err != nil {
			t.Fatalf("connection to LGWAN, office to home: %v", err)
		}
		if c, err := call(w.work, assetsAddr, 500*time.Millisecond); err == nil {
			c.c.Close()
			t.Error("the office's server is reached from home")
		}
		t.Logf("round %d: Office %v after the cable, LGWAN connection through %v; Tunnel %v after the cable", round, arrived.Round(time.Millisecond), through.Round(time.Millisecond), left.Round(time.Millisecond))
	}
	stop()
	w.judge()
}

// ask calls a server that says who called.
func ask(t testing.TB, from *nstest.NS, address string) (who netip.AddrPort) {
	t.Helper()
	nstest.Eventually(t, 10*time.Second, func() error {
		l, err := call(from, address, 2*time.Second)
		if err != nil {
			return err
		}
		defer l.c.Close()
		l.c.SetDeadline(time.Now().Add(2 * time.Second))
		text, err := l.r.ReadString('\n')
		if err == nil {
			who, err = netip.ParseAddrPort(strings.TrimSpace(text))
		}
		return err
	})
	return who
}

// TestOfficeStayInTunnel: the office is proven, and the work domain stays where
// the organisation wants it.
func TestOfficeStayInTunnel(t *testing.T) {
	w := newWorld(t)
	d := w.newDesk()
	w.organization.Office.StayInTunnel = true
	d.startBeacon(d.officeCA)
	w.startGateway()
	w.attestd.set(gate.StateAffirming, time.Hour)
	w.startNetd()
	w.waitState(30*time.Second, netd.Tunnel, "")
	w.plug(w.home, d.router)
	nstest.Eventually(t, 20*time.Second, func() error {
		s, err := w.status()
		if err == nil && (s.State != netd.Tunnel || s.Office == nil || !s.Office.StayInTunnel) {
			err = fmt.Errorf("%s, office %+v", s.Line(), s.Office)
		}
		return err
	})
	w.readPage(10 * time.Second)
	if r := w.inside.Run("ip", "route"); strings.Contains(r, "office0") {
		t.Errorf("a way to the LAN: %s", r)
	}
	w.tapped.taps[1].offices = nil // nothing of the work domain may be seen here either
	w.judge()
}

// TestOfficeWithoutGateway: the LAN is reached while LGWAN is not, and the
// status says so.
func TestOfficeWithoutGateway(t *testing.T) {
	w := newWorld(t)
	d := w.newDesk()
	d.startBeacon(d.officeCA)
	echoServer(d.servers, assetsAddr)
	w.startGateway()
	w.attestd.set(gate.StateAffirming, time.Hour)
	w.startNetd()
	w.waitState(30*time.Second, netd.Tunnel, "")
	w.readPage(10 * time.Second)
	w.plug(w.home, d.router)
	w.waitState(20*time.Second, netd.Office, "")
	l, err := call(w.work, assetsAddr, 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer l.c.Close()
	w.kill(w.gateway)
	nstest.Eventually(t, 30*time.Second, func() error {
		s, err := w.status()
		if err == nil && (s.State != netd.Office || !strings.Contains(s.Words.EN, "LGWAN is not reachable")) {
			err = fmt.Errorf("%s, %q", s.Line(), s.Words.EN)
		}
		return err
	})
	if err := l.say("still here", 5*time.Second); err != nil {
		t.Errorf("the LAN's server, without a gateway: %v", err)
	}
	// The help desk reads what happened, in words, out of a file.
	saved := w.path("journal.txt")
	if out, err := exec.Command(filepath.Join(programs, "netd"), "journal", "-socket", w.path("netd.sock"), "--save", saved).CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("netd journal --save: %v, %q", err, out)
	}
	if text, err := os.ReadFile(saved); err != nil || !strings.Contains(string(text), "site hq proven by 10.20.0.9:8443 / 拠点 hq を確認") {
		t.Errorf("saved journal: %v\n%s", err, text)
	}
	if out, err := exec.Command(filepath.Join(programs, "netd"), "status", "-socket", w.path("netd.sock")).Output(); err != nil || !strings.HasPrefix(string(out), "Office hq; LGWAN is not reachable at the moment\n庁内ネットワーク（hq）に接続中") {
		t.Errorf("netd status: %v\n%s", err, out)
	}
	// A credential that ends closes the office too.
	w.attestd.set(gate.StateRefused, 0)
	w.waitState(5*time.Second, netd.Attesting, "")
	if err := l.say("closed", time.Second); err == nil {
		t.Error("the LAN's server answers after a refusal")
	}
	w.judge()
}
