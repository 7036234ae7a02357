//go:build linux

package e2e

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/attest/gate"
	"sekisho/guestlink"
	"sekisho/netd"
	"sekisho/netd/internal/nstest"
	"sekisho/netd/kernel"
	"sekisho/netd/tunnel"
)

// The addresses of the world:
//
//	work ── guest0 ═ work0 ── inside ── tun0 ═ netd ═ eth0 ── home router
//	                                                             │ 203.0.113.0/24
//	                      web 10.1.0.80 ── lgwan0 ── site: gateway .20, verifier .10
//	                       fd00:1::80
const (
	gatewayAddr  = "203.0.113.20:443"
	verifierAddr = "203.0.113.10:443"
	page         = "http://10.1.0.80/"
	page6        = "http://[fd00:1::80]/"
	inner6       = "fd00:80::2" // beside 10.80.0.2
	pageText     = "a page on LGWAN"
)

// programs holds the built commands; TestMain fills it.
var programs string

func TestMain(m *testing.M) {
	if role := os.Getenv(roleVariable); role != "" {
		os.Exit(playRole(role))
	}
	code := func() int {
		if os.Geteuid() == 0 && os.Getenv("SEKISHO_TEST") == "all" {
			var err error
			if programs, err = os.MkdirTemp("", "netd-e2e-"); err != nil {
				fmt.Println(err)
				return 1
			}
			defer os.RemoveAll(programs)
			if err := os.Chmod(programs, 0o755); err != nil {
				fmt.Println(err)
				return 1
			}
			build := exec.Command("go", "build", "-o", programs, "sekisho/netd/cmd/netd", "sekisho/netd/cmd/gateway", "sekisho/netd/cmd/beacon")
			if out, err := build.CombinedOutput(); err != nil {
				fmt.Printf("%v: %s\n", err, out)
				return 1
			}
		}
		return m.Run()
	}()
	os.Exit(code)
}

// world is one laptop, its home, a site and LGWAN.
type world struct {
	t                                     testing.TB
	dir                                   string
	laptop, inside, work, home, site, web *nstest.NS
	ca, verifierCA                        *authority
	attestd                               *attestd
	organization                          attest.Organization // written when netd starts
	gateway                               *exec.Cmd
	netd                                  *exec.Cmd
	capture                               *exec.Cmd
	dhcp                                  *exec.Cmd
	dnsmasq                               []string // extra arguments of the home's DHCP server
	gatewayConfig                         map[string]any

	tapped   tapped
	lans     []netip.Prefix // of all LANs
	desk     *desk          // the true office, if there is one
	hardware []byte         // address of the laptop's eth0

	mu     sync.Mutex
	config guestlink.Config // what netd told linkd
	port   *tunnel.Device   // what is written here comes from the work domain, whatever it is
	unlink func()           // ends the stand-in of linkd
}

// inject sends packets as the work domain.
func (w *world) inject(packets [][]byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.port.Write(packets)
}

// newWorld builds everything but starts neither netd nor the gateway.
// dnsmasq gets the extra arguments.
func newWorld(t testing.TB, dnsmasq ...string) *world {
	nstest.Require(t, "dnsmasq", "tcpdump", "sysctl", "setpriv")
	w := &world{t: t, dir: t.TempDir()}
	w.laptop, w.inside, w.work = nstest.New(t, "laptop"), nstest.New(t, "inside"), nstest.New(t, "work")
	w.home, w.site, w.web = nstest.New(t, "home"), nstest.New(t, "site"), nstest.New(t, "web")
	w.lans = []netip.Prefix{netip.MustParsePrefix("192.168.50.0/24")}
	nstest.Pair(w.home, "wan0", "203.0.113.1/24", w.site, "wan0", "203.0.113.20/24")
	w.site.Run("ip", "address", "add", "203.0.113.10/24", "dev", "wan0")
	w.site.Run("ip", "route", "add", "192.168.50.0/24", "via", "203.0.113.1")
	nstest.Pair(w.site, "lgwan0", "10.1.0.1/24", w.web, "eth0", "10.1.0.80/24")
	w.web.Run("ip", "route", "add", "10.80.0.0/16", "via", "10.1.0.1")
	w.site.Run("ip", "address", "add", "fd00:1::1/64", "dev", "lgwan0", "nodad")
	w.web.Run("ip", "address", "add", "fd00:1::80/64", "dev", "eth0", "nodad")
	w.web.Run("ip", "route", "add", "fd00:80::/112", "via", "fd00:1::1")
	w.home.Run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.default.disable_ipv6=1")

	w.ca, w.verifierCA = newAuthority(t, "City CA"), newAuthority(t, "Verifier CA")
	w.attestd = newAttestd(t, filepath.Join(w.dir, "attestd.sock"), w.verifierCA)
	w.organization = attest.Organization{
		Name: "Test City", CA: w.ca.pem(),
		Verifiers:  []attest.Endpoint{{Address: netip.MustParseAddrPort(verifierAddr), ServerName: "verifier.test"}},
		Gateways:   []attest.Endpoint{{Address: netip.MustParseAddrPort(gatewayAddr), ServerName: "gateway.test"}},
		Uplinks:    []attest.UplinkRule{{Name: "eth0"}, {Kind: netd.KindWired}},
		WorkDomain: attest.WorkDomain{MemoryMiB: 256, VCPUs: 1, Firmware: attest.FirmwareUEFI, Disk: attest.DiskPersistent},
	}
	chain, key := w.ca.server(t, "gateway.test")
	w.writeBytes("gateway.crt", chain)
	w.writeBytes("gateway.key", key)
	w.writeBytes("verifier-ca.crt", []byte(w.verifierCA.pem()))
	w.gatewayConfig = map[string]any{
		"listen": gatewayAddr, "certificate": w.path("gateway.crt"), "key": w.path("gateway.key"), "client_ca": w.path("verifier-ca.crt"),
		"pool": "10.80.0.0/16", "pool6": "fd00:80::/112", "leases": w.path("leases.json"), "tun": "sekisho0", "lgwan": "lgwan0",
		"dns": []string{"10.1.0.53"}, "status": w.path("gateway.sock"),
	}
	w.write("gateway.json", w.gatewayConfig)
	w.linkd()
	w.tapped.far = w.startTap(w.web, "eth0", "lgwan.pcap")
	l, l6 := w.web.Listen("10.1.0.80:80"), w.web.Listen("[fd00:1::80]:80")
	server := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if n, err := strconv.Atoi(r.URL.Query().Get("bytes")); err == nil {
			io.CopyN(rw, zeros{}, int64(n))
			return
		}
		io.WriteString(rw, pageText)
	})}
	go server.Serve(l)
	go server.Serve(l6)
	t.Cleanup(func() { server.Close() })

	// The uplink is captured before the laptop's end exists.
	w.hardware = []byte{0x02, 0x50, 0, 0, 0, 0x23}
	w.home.Run("ip", "link", "add", "lan0", "type", "veth", "peer", "name", "eth0", "address", net.HardwareAddr(w.hardware).String())
	w.home.Run("ip", "address", "add", "192.168.50.1/24", "dev", "lan0")
	w.tap(w.home)
	w.home.Run("ip", "link", "set", "lan0", "up")
	w.capture = w.home.Start("tcpdump", "-i", "lan0", "--immediate-mode", "-U", "-n", "-s", "200", "-B", "16384", "-w", w.path("uplink.pcap"))
	nstest.Eventually(t, 10*time.Second, func() error { // the file's header is there: it captures
		st, err := os.Stat(w.path("uplink.pcap"))
		if err == nil && st.Size() < 24 {
			err = fmt.Errorf("no capture yet")
		}
		return err
	})
	if out, err := w.laptop.Try(filepath.Join(programs, "netd"), "close", "-inside", w.inside.Path); err != nil {
		t.Fatal(err, out)
	}
	w.home.Run("ip", "link", "set", "eth0", "netns", w.laptop.Path)
	w.dnsmasq = dnsmasq
	w.startDHCP()
	return w
}

// startDHCP starts the home's DHCP server, anew if its link was away.
func (w *world) startDHCP() {
	if w.dhcp != nil {
		w.kill(w.dhcp)
	}
	w.dhcp = w.home.Start("dnsmasq", append([]string{"--keep-in-foreground", "--log-facility=-", "--conf-file=/dev/null", "--port=0", "--interface=lan0", "--bind-interfaces", "--leasefile-ro",
		"--dhcp-range=192.168.50.100,192.168.50.200,255.255.255.0,2m", "--dhcp-authoritative", "--no-ping", "--pid-file=" + w.path("dnsmasq.pid")}, w.dnsmasq...)...)
}

func (w *world) path(name string) string { return filepath.Join(w.dir, name) }

func (w *world) writeBytes(name string, b []byte) {
	if err := os.WriteFile(w.path(name), b, 0o600); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) write(name string, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		w.t.Fatal(err)
	}
	w.writeBytes(name, b)
}

func (w *world) startGateway() {
	w.gateway = w.site.Start(filepath.Join(programs, "gateway"), "serve", "-config", w.path("gateway.json"))
}

// startNetd starts netd as init does: a user of its own with four capabilities.
func (w *world) startNetd() {
	const caps = "+net_admin,+net_raw,+net_bind_service,+sys_admin"
	for dir := w.dir; dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		os.Chmod(dir, 0o755)
	}
	os.Chmod(w.dir, 0o777) // netd makes its socket here; init passes it one
	os.Chmod(w.path("attestd.sock"), 0o666)
	os.Chmod(w.path("linkd.sock"), 0o666)
	w.write("organization.json", w.organization)
	os.Chmod(w.path("organization.json"), 0o644)
	w.netd = w.laptop.Start("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all,"+caps, "--ambient-caps=-all,"+caps, "--bounding-set=-all,"+caps, "--no-new-privs",
		filepath.Join(programs, "netd"), "run", "-config", w.path("organization.json"), "-attestd", w.path("attestd.sock"),
		"-linkd", w.path("linkd.sock"), "-inside", w.inside.Path, "-socket", w.path("netd.sock"), "-time", w.path("time"))
}

// kill ends a program as the kernel does: at once and without a word.
func (w *world) kill(cmd *exec.Cmd) {
	if err := cmd.Process.Kill(); err != nil {
		w.t.Fatal(err)
	}
	cmd.Wait()
}

// linkd stands in for linkd and the work domain: work0 in the namespace
// inside, guest0 in the namespace work, packets passed between them, and the
// configuration obeyed that netd puts.
func (w *world) linkd() {
	ends, closers := make([]*tunnel.Device, 2), []func() error{}
	for i, end := range []struct {
		ns   *nstest.NS
		name string
	}{{w.inside, netd.WorkLink}, {w.work, "guest0"}} {
		ns, err := kernel.Open(end.ns.Path)
		if err != nil {
			w.t.Fatal(err)
		}
		dev, err := ns.CreateTUN(end.name, 1400)
		ns.Close()
		if err != nil {
			w.t.Fatal(err)
		}
		ends[i] = tunnel.NewDevice(dev)
		closers = append(closers, dev.Close)
	}
	w.mu.Lock()
	w.port, w.config = ends[0], guestlink.Config{}
	w.mu.Unlock()
	pump := func(from, to *tunnel.Device) {
		for {
			f, err := from.Read()
			if err != nil {
				return
			}
			to.WriteFrame(f)
		}
	}
	go pump(ends[0], ends[1])
	go pump(ends[1], ends[0])
	os.Remove(w.path("linkd.sock"))
	l, err := net.Listen("unix", w.path("linkd.sock"))
	if err != nil {
		w.t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		var c guestlink.Config
		if err := json.NewDecoder(r.Body).Decode(&c); err != nil || r.Method != "PUT" || r.URL.Path != "/v1/config" {
			http.Error(rw, "bad", http.StatusBadRequest)
			return
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		if c.Address != w.config.Address {
			w.work.Try("ip", "address", "flush", "dev", "guest0")
			w.work.Try("ip", "link", "set", "guest0", "up", "mtu", strconv.Itoa(c.MTU))
			w.work.Try("ip", "address", "add", c.Address.String(), "dev", "guest0")
			w.work.Try("ip", "route", "add", "default", "dev", "guest0")
			if c.Address6.IsValid() {
				w.work.Try("ip", "address", "add", c.Address6.String(), "dev", "guest0", "nodad")
				w.work.Try("ip", "-6", "route", "add", "default", "dev", "guest0")
			}
		}
		w.config = c
	})}
	go server.Serve(l)
	w.unlink = sync.OnceFunc(func() {
		server.Close()
		w.mu.Lock() // nothing is being written
		defer w.mu.Unlock()
		for _, c := range closers {
			c()
		}
	})
	w.t.Cleanup(w.unlink)
}

// fetch reads a page from the work domain.
func (w *world) fetch(url string, limit time.Duration) (string, error) {
	client := &http.Client{Timeout: limit, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, addr string) (c net.Conn, err error) {
			err = w.work.Do(func() (err error) {
				c, err = (&net.Dialer{Timeout: limit}).DialContext(ctx, network, addr)
				return err
			})
			return c, err
		},
	}}
	resp, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return string(b), err
}

// status asks netd.
func (w *world) status() (s netd.Status, err error) {
	out, err := exec.Command(filepath.Join(programs, "netd"), "status", "-socket", w.path("netd.sock"), "--json").Output()
	if err == nil {
		err = json.Unmarshal(out, &s)
	}
	return s, err
}

// waitState waits for a state, and a reason if that is not empty.
func (w *world) waitState(limit time.Duration, state netd.State, reason string) (s netd.Status) {
	w.t.Helper()
	nstest.Eventually(w.t, limit, func() (err error) {
		if s, err = w.status(); err == nil && (s.State != state || reason != "" && s.Reason != reason) {
			err = fmt.Errorf("state %s, reason %q, want %s %q; uplink %+v; history %+v", s.Line(), s.Reason, state, reason, s.Uplink, s.History)
		}
		return err
	})
	return s
}

// readPage waits until the work domain reads the page.
func (w *world) readPage(limit time.Duration) {
	w.t.Helper()
	nstest.Eventually(w.t, limit, func() error {
		text, err := w.fetch(page, time.Second)
		if err == nil && text != pageText {
			err = fmt.Errorf("page is %q", text)
		}
		return err
	})
}

// allowed is what tcpdump(1) may see of an uplink, of HTTP/3 to the gateway too.
const allowed = "arp or (udp and (port 67 or port 68)) or (tcp port 443 and (host 203.0.113.20 or host 203.0.113.10)) or (udp port 443 and host 203.0.113.20) or (icmp[icmptype] == 3 and src host 203.0.113.20)"

// checkUplink ends the capture and fails the test if it shows anything but
// ARP, DHCP, TCP port 443 to the gateway's and verifier's addresses and UDP port
// 443 to the gateway's with errors that come back, or
// fewer packets than a check can rest on.
func (w *world) checkUplink() {
	w.t.Helper()
	w.capture.Process.Signal(os.Interrupt)
	w.capture.Wait()
	read := func(filter string) []string {
		out, err := exec.Command("tcpdump", "-n", "-r", w.path("uplink.pcap"), filter).Output()
		if err != nil {
			w.t.Fatal(err)
		}
		return strings.FieldsFunc(string(out), func(r rune) bool { return r == '\n' })
	}
	good, bad := read(allowed), read("not ("+allowed+")")
	if len(good) < 4 {
		w.t.Errorf("capture of the uplink has only %d packets", len(good))
	}
	if len(bad) > 0 {
		w.t.Errorf("leaked %d packets to the uplink:\n%s", len(bad), strings.Join(bad[:min(len(bad), 20)], "\n"))
	}
	w.t.Logf("uplink: %d packets allowed, %d leaked", len(good), len(bad))
}

// authority is a self-made certificate authority.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newAuthority(t testing.TB, name string) *authority {
	key := newKey(t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(100, 0, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	return &authority{issue(t, template, template, key.Public(), key), key}
}

func issue(t testing.TB, template, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func (a *authority) pem() string { return certPEM(a.cert) }

func certPEM(c *x509.Certificate) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
}

func (a *authority) server(t testing.TB, name string) (chain, key []byte) {
	k := newKey(t)
	template := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(100, 0, 0), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	der, err := x509.MarshalECPrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return []byte(certPEM(issue(t, template, a.cert, k.Public(), a.key))), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})
}

// attestd stands in for attestd: it grants what the test says.
type attestd struct {
	t   testing.TB
	ca  *authority
	key *ecdsa.PrivateKey

	mu     sync.Mutex
	status gate.Status
	chain  string
	change chan struct{} // closed with every change

	socket string
	mux    *http.ServeMux
	server *http.Server
}

func newAttestd(t testing.TB, socket string, ca *authority) *attestd {
	mux := http.NewServeMux()
	a := &attestd{t: t, ca: ca, key: newKey(t), change: make(chan struct{}), socket: socket, mux: mux}
	a.set(gate.StateAttesting, 0)
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, r *http.Request) {
		after, _ := strconv.ParseUint(r.URL.Query().Get("after"), 10, 64)
		a.mu.Lock()
		change, version := a.change, a.status.Version
		a.mu.Unlock()
		if version <= after {
			select {
			case <-change:
			case <-r.Context().Done():
			case <-time.After(25 * time.Second):
			}
		}
		a.mu.Lock()
		defer a.mu.Unlock()
		json.NewEncoder(w).Encode(a.status)
	})
	mux.HandleFunc("GET /v1/credential", func(w http.ResponseWriter, r *http.Request) {
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.chain == "" {
			http.NotFound(w, r)
			return
		}
		io.WriteString(w, a.chain)
	})
	mux.HandleFunc("POST /v1/sign", func(w http.ResponseWriter, r *http.Request) {
		var req gate.SignRequest
		if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		sig, err := a.key.Sign(rand.Reader, req.Digest, crypto.SHA256)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		json.NewEncoder(w).Encode(gate.SignResponse{Signature: sig})
	})
	a.start()
	t.Cleanup(func() { a.server.Close() })
	return a
}

// start opens the socket, anew after a stop.
func (a *attestd) start() {
	os.Remove(a.socket)
	l, err := net.Listen("unix", a.socket)
	if err != nil {
		a.t.Fatal(err)
	}
	a.server = &http.Server{Handler: a.mux}
	go a.server.Serve(l)
}

// stop is what clients see of attestd when it is killed.
func (a *attestd) stop() { a.server.Close() }

// set enters a state. life is that of the certificate granted with it; 0
// grants none, but leaves an earlier one in force unless the state is refused.
func (a *attestd) set(state string, life time.Duration) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.status.Version++
	a.status.State, a.status.Since = state, time.Now()
	device := attest.Digest(bytes.Repeat([]byte{0xd1}, 32))
	a.status.DeviceID = device.String()
	if state == gate.StateRefused {
		a.chain, a.status.NotAfter = "", time.Time{}
	}
	if life != 0 {
		template := &x509.Certificate{
			SerialNumber: big.NewInt(int64(a.status.Version)), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(life),
			URIs: []*url.URL{{Scheme: "urn", Opaque: "sekisho:device:" + device.String()}}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		}
		cert := issue(a.t, template, a.ca.cert, a.key.Public(), a.ca.key)
		a.chain, a.status.NotAfter = certPEM(cert), cert.NotAfter
	}
	close(a.change)
	a.change = make(chan struct{})
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

// notAfter is the end of the credential granted last.
func (a *attestd) notAfter() time.Time {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.status.NotAfter
}
