package gateway

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/attest/cryptrec"
	"sekisho/netd/tunnel"
)

// wire is a Device in memory.
type wire struct {
	in     chan []byte // towards the laptops
	out    chan []byte // towards LGWAN
	closed chan struct{}
	once   sync.Once
}

func (w *wire) Read() (tunnel.Frame, error) {
	select {
	case p := <-w.in:
		return append(make(tunnel.Frame, tunnel.FrameHeader), p...), nil
	case <-w.closed:
		return nil, os.ErrClosed
	}
}

func (w *wire) Write(packets [][]byte) error {
	for _, p := range packets {
		w.out <- bytes.Clone(p)
	}
	return nil
}

func (w *wire) WriteFrame(f tunnel.Frame) error { w.out <- bytes.Clone(f.Packet()); return nil }

func (w *wire) Close() error { w.once.Do(func() { close(w.closed) }); return nil }

// site is a running gateway on the loopback device.
type site struct {
	t      *testing.T
	addr   string
	udp    net.PacketConn
	wire   *wire
	server *Server
	ca     *x509.Certificate
	key    *ecdsa.PrivateKey
	roots  *x509.CertPool
}

func newSite(t *testing.T, change func(*Config), feed ...Revocations) *site {
	s := &site{t: t, wire: &wire{in: make(chan []byte), out: make(chan []byte, 1000), closed: make(chan struct{})}, roots: x509.NewCertPool()}
	s.key = newKey(t)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	s.ca = sign(t, template, template, s.key, s.key)
	s.roots.AddCert(s.ca)
	serverKey := newKey(t)
	server := sign(t, &x509.Certificate{SerialNumber: big.NewInt(2), DNSNames: []string{"gateway.test"}, NotBefore: template.NotBefore, NotAfter: template.NotAfter}, s.ca, serverKey, s.key)
	config := cryptrec.Config()
	// The handshake lets more pass than the gateway does: its own check counts.
	config.CurvePreferences = append(config.CurvePreferences, tls.CurveP256, tls.CurveP384, tls.X25519MLKEM768)
	config.Certificates = []tls.Certificate{{Certificate: [][]byte{server.Raw}, PrivateKey: serverKey}}
	config.ClientCAs, config.ClientAuth, config.NextProtos = s.roots, tls.RequireAndVerifyClientCert, []string{"http/1.1"}

	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.addr = l.Addr().String()
	if s.udp, err = net.ListenPacket("udp", s.addr); err != nil {
		t.Fatal(err)
	}
	c := &Config{Pool: netip.MustParsePrefix("10.80.0.0/24"), MTU: 1400, MaxSessions: 10, DNS: []netip.Addr{netip.MustParseAddr("10.1.0.53")}}
	if change != nil {
		change(c)
	}
	leases, err := OpenLeases(filepath.Join(t.TempDir(), "leases.json"), c.Pool)
	if err != nil {
		t.Fatal(err)
	}
	s.server = New(c, config, leases, s.wire, slog.New(slog.DiscardHandler))
	for _, f := range feed {
		s.server.Revocations = f
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.server.Serve(ctx, l, s.udp) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Serve: %v", err)
		}
	})
	return s
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func sign(t *testing.T, template, parent *x509.Certificate, subject, issuer *ecdsa.PrivateKey) *x509.Certificate {
	der, err := x509.CreateCertificate(rand.Reader, template, parent, subject.Public(), issuer)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// device makes a laptop's certificate that lives for life.
func (s *site) device(id byte, life time.Duration) tls.Certificate {
	d := attest.Digest(bytes.Repeat([]byte{id}, 32))
	return s.named([]*url.URL{{Scheme: "urn", Opaque: "sekisho:device:" + d.String()}}, life)
}

func (s *site) named(uris []*url.URL, life time.Duration) tls.Certificate {
	k := newKey(s.t)
	c := sign(s.t, &x509.Certificate{SerialNumber: big.NewInt(3), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(life), URIs: uris, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}, s.ca, k, s.key)
	return tls.Certificate{Certificate: [][]byte{c.Raw}, PrivateKey: k}
}

// request sends a raw request and returns the response and the connection.
func (s *site) request(cert *tls.Certificate, request string) (*http.Response, *tls.Conn, *bufio.Reader, error) {
	return s.requestBy(tls.SecP256r1MLKEM768, cert, request)
}

// requestBy is request with a key agreement of one's own.
func (s *site) requestBy(by tls.CurveID, cert *tls.Certificate, request string) (*http.Response, *tls.Conn, *bufio.Reader, error) {
	config := cryptrec.Config()
	config.CurvePreferences = []tls.CurveID{by}
	config.RootCAs, config.ServerName = s.roots, "gateway.test"
	if cert != nil {
		config.Certificates = []tls.Certificate{*cert}
	}
	conn, err := tls.Dial("tcp", s.addr, config)
	if err != nil {
		return nil, nil, nil, err
	}
	s.t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(conn, request); err != nil {
		return nil, nil, nil, err
	}
	br := bufio.NewReader(conn)
	resp, err := http.ReadResponse(br, nil)
	return resp, conn, br, err
}

// TestLesserKeyAgreementIsRefused: where the handshake would let it pass, the
// check after it does not.
func TestLesserKeyAgreementIsRefused(t *testing.T) {
	for _, c := range []struct {
		least cryptrec.KeyAgreement
		by    tls.CurveID
		want  int
	}{
		{cryptrec.P256MLKEM768, tls.CurveP256, http.StatusForbidden},
		{cryptrec.P256MLKEM768, tls.CurveP384, http.StatusForbidden},
		{cryptrec.P256MLKEM768, tls.X25519MLKEM768, http.StatusForbidden},
		{cryptrec.P384MLKEM1024, tls.SecP256r1MLKEM768, http.StatusForbidden},
		{cryptrec.P384MLKEM1024, tls.SecP384r1MLKEM1024, http.StatusSwitchingProtocols},
	} {
		s := newSite(t, func(config *Config) { config.KeyAgreement = c.least })
		cert := s.device(1, time.Hour)
		resp, _, _, err := s.requestBy(c.by, &cert, upgrade)
		if err != nil || resp.StatusCode != c.want {
			t.Errorf("least %s, agreed by %s: %v, %v, want %d", c.least, c.by, resp, err, c.want)
		}
	}
}

const upgrade = "GET /.well-known/masque/ip/*/*/ HTTP/1.1\r\nHost: gateway.test\r\nConnection: Upgrade\r\nUpgrade: connect-ip\r\nCapsule-Protocol: ?1\r\n\r\n"

// client is an open session.
type client struct {
	conn *tls.Conn
	br   *bufio.Reader
}

func (s *site) open(cert tls.Certificate) *client {
	s.t.Helper()
	resp, conn, br, err := s.request(&cert, upgrade)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		s.t.Fatalf("%v, %v", resp, err)
	}
	if got := resp.Header.Get("Sekisho-Inner"); got != `mtu=1400, dns=("10.1.0.53"), trains` {
		s.t.Errorf("Sekisho-Inner: %s", got)
	}
	return &client{conn, br}
}

// expect reads exactly these bytes.
func (l *client) expect(t *testing.T, want string) {
	t.Helper()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(l.br, got); err != nil || string(got) != want {
		t.Errorf("received %x, want %x (%v)", got, want, err)
	}
}

// first is what every session begins with: ADDRESS_ASSIGN of 10.80.0.host/32
// and ROUTE_ADVERTISEMENT of everything.
func first(host byte) string {
	return "\x01\x07\x00\x04\x0a\x50\x00" + string(host) + "\x20" + "\x03\x0a\x04\x00\x00\x00\x00\xff\xff\xff\xff\x00"
}

// packet is an IPv4 packet of 24 bytes.
func packet(source, destination byte) []byte {
	p := make([]byte, 24)
	p[0], p[3], p[8] = 0x45, 24, 64
	copy(p[12:], []byte{10, 80, 0, source, 10, 80, 0, destination})
	sum := 0
	for i := 0; i < 20; i += 2 {
		sum += int(p[i])<<8 | int(p[i+1])
	}
	sum = ^(sum>>16 + sum&0xffff)
	p[10], p[11] = byte(sum>>8), byte(sum)
	return p
}

func capsule(p []byte) string { return "\x00" + string(byte(len(p)+1)) + "\x00" + string(p) }

func TestSession(t *testing.T) {
	s := newSite(t, nil)
	l := s.open(s.device(1, time.Hour))
	l.expect(t, first(2))
	// A request for signs of life is answered with the same address and its id.
	io.WriteString(l.conn, "\x02\x07\x2a\x04\x00\x00\x00\x00\x20")
	l.expect(t, "\x01\x07\x2a\x04\x0a\x50\x00\x02\x20")

	short, long, v6 := packet(2, 99), packet(2, 99), packet(2, 99)
	short[3], long[3], v6[0] = 20, 25, 0x65
	honest := packet(2, 99)
	io.WriteString(l.conn, capsule(packet(3, 99))+capsule(short)+capsule(long)+capsule(v6)+capsule([]byte{0x45})+
		"\x00\x00"+ // no context id
		"\x00\x02\x01\x45"+ // context id 1
		"\x40\x99\x03abc"+ // unknown capsule
		capsule(honest))
	if got := <-s.wire.out; !bytes.Equal(got, honest) {
		t.Errorf("passed %x, want the honest packet only", got)
	}
	// Back to the laptop: its own, nobody's, and a runt.
	for _, p := range [][]byte{packet(99, 3), {0x45}, packet(99, 2)} {
		s.wire.in <- p
	}
	l.expect(t, capsule(packet(99, 2)))
	st := s.server.Status()
	if len(st.Sessions) != 1 || st.Sessions[0].Counters.Dropped != 7 {
		t.Errorf("status %+v, want one session with 7 packets dropped", st.Sessions)
	}
}

func TestRefusals(t *testing.T) {
	s := newSite(t, func(c *Config) { c.MaxSessions = 1 })
	good, other := s.device(1, time.Hour), s.device(2, time.Hour)
	noName := s.named(nil, time.Hour)
	twoNames := s.named([]*url.URL{{Scheme: "urn", Opaque: "sekisho:device:1"}, {Scheme: "urn", Opaque: "sekisho:device:2"}}, time.Hour)
	badName := s.named([]*url.URL{{Scheme: "urn", Opaque: "sekisho:device:xyz"}}, time.Hour)
	lapsed := s.device(1, -time.Second)
	s.open(good)
	for name, c := range map[string]struct {
		cert    *tls.Certificate
		request string
		status  int // 0: the handshake fails
	}{
		"no certificate":     {nil, upgrade, 0},
		"lapsed certificate": {&lapsed, upgrade, 0},
		"no device name":     {&noName, upgrade, 403},
		"two device names":   {&twoNames, upgrade, 403},
		"bad device name":    {&badName, upgrade, 403},
		"other path":         {&good, strings.Replace(upgrade, "/ip/*/*/", "/ip/10.0.0.1/6/", 1), 400},
		"other protocol":     {&good, strings.Replace(upgrade, "Upgrade: connect-ip", "Upgrade: websocket", 1), 400},
		"plain GET":          {&good, "GET / HTTP/1.1\r\nHost: x\r\n\r\n", 400},
		"POST":               {&good, strings.Replace(upgrade, "GET", "POST", 1), 400},
		"huge header":        {&good, "GET / HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", 20<<10) + "\r\n\r\n", 431},
		"full":               {&other, upgrade, 503},
	} {
		resp, _, _, err := s.request(c.cert, c.request)
		switch {
		case c.status == 0 && err == nil:
			t.Errorf("%s: admitted with %s", name, resp.Status)
		case c.status != 0 && (err != nil || resp.StatusCode != c.status):
			t.Errorf("%s: %v, %v, want %d", name, resp, err, c.status)
		case c.status == 503 && resp.Header.Get("Retry-After") == "":
			t.Errorf("%s: no Retry-After", name)
		}
	}
	s.open(good) // the same device again takes its own place
}

// TestPlacesAtOnce: of laptops that come in one moment, as many are admitted as
// there are places.
func TestPlacesAtOnce(t *testing.T) {
	const places, laptops = 3, 12
	s := newSite(t, func(c *Config) { c.MaxSessions = places })
	var wg sync.WaitGroup
	var admitted atomic.Int32
	for id := range byte(laptops) {
		cert := s.device(id+1, time.Hour)
		wg.Go(func() {
			resp, _, _, err := s.request(&cert, upgrade)
			switch {
			case err != nil:
				t.Error(err)
			case resp.StatusCode == http.StatusSwitchingProtocols:
				admitted.Add(1)
			case resp.StatusCode != http.StatusServiceUnavailable:
				t.Errorf("status %d, want 101 or 503", resp.StatusCode)
			}
		})
	}
	wg.Wait()
	if n := admitted.Load(); n != places {
		t.Errorf("%d laptops admitted, want %d", n, places)
	}
}

func TestNewConnectionReplacesTheOld(t *testing.T) {
	s := newSite(t, nil)
	cert := s.device(1, time.Hour)
	old := s.open(cert)
	old.expect(t, first(2))
	renewed := s.open(s.device(1, time.Hour))
	renewed.expect(t, first(2))
	s.wire.in <- packet(99, 2)
	old.expect(t, capsule(packet(99, 2))) // until the laptop uses the new one
	io.WriteString(renewed.conn, capsule(packet(2, 76)))
	if got := <-s.wire.out; !bytes.Equal(got, packet(2, 76)) {
		t.Errorf("passed %x", got)
	}
	if _, err := old.br.ReadByte(); err != io.EOF {
		t.Errorf("old connection: %v, want an orderly end", err)
	}
	// What the old one still sends is passed on: nothing is lost in the move.
	io.WriteString(old.conn, capsule(packet(2, 77)))
	if got := <-s.wire.out; !bytes.Equal(got, packet(2, 77)) {
		t.Errorf("passed %x", got)
	}
	s.wire.in <- packet(99, 2)
	renewed.expect(t, capsule(packet(99, 2)))
}

func TestSessionEndsWithTheCertificate(t *testing.T) {
	s := newSite(t, nil)
	start := time.Now()
	l := s.open(s.device(1, 2*time.Second))
	l.expect(t, first(2))
	_, err := l.br.ReadByte()
	if took := time.Since(start); err == nil || took > 3*time.Second {
		t.Errorf("closed after %v with %v, want 2 s", took, err)
	}
}

func TestMalformedCapsulesEndTheSession(t *testing.T) {
	s := newSite(t, nil)
	for name, bytes := range map[string]string{
		"oversized datagram":   "\x00\x80\x00\x30\x00",
		"oversized unknown":    "\x40\x99\x80\x20\x00\x00",
		"2^62-1":               "\x00\xff\xff\xff\xff\xff\xff\xff\xff",
		"truncated request":    "\x02\x03\x01\x04\x00",
		"request without any":  "\x02\x00",
		"version 9 in request": "\x02\x07\x01\x09\x00\x00\x00\x00\x20",
	} {
		l := s.open(s.device(1, time.Hour))
		l.expect(t, first(2))
		io.WriteString(l.conn, bytes)
		if b, err := l.br.ReadByte(); err == nil {
			t.Errorf("%s: answered with %#x", name, b)
		}
	}
	s.open(s.device(1, time.Hour)).expect(t, first(2)) // and the gateway lives
}

// TestStuckLaptopDoesNotStallTheOthers floods one that reads nothing.
func TestStuckLaptopDoesNotStallTheOthers(t *testing.T) {
	s := newSite(t, nil)
	stuck, lively := s.open(s.device(1, time.Hour)), s.open(s.device(2, time.Hour))
	_ = stuck
	lively.expect(t, first(3))
	big := make([]byte, 1400)
	copy(big, packet(99, 2))
	for range 25600 { // 36 MB: more than any socket buffer holds
		s.wire.in <- big
	}
	s.wire.in <- packet(99, 3)
	lively.expect(t, capsule(packet(99, 3)))
	for _, sess := range s.server.Status().Sessions {
		if (sess.Counters.Dropped > 0) != (sess.Inner == netip.MustParseAddr("10.80.0.2")) {
			t.Errorf("%s: %+v", sess.Inner, sess.Counters)
		}
	}
}

func TestLeases(t *testing.T) {
	file := filepath.Join(t.TempDir(), "leases.json")
	pool := netip.MustParsePrefix("10.80.0.0/29") // room for 5 devices
	open := func() *Leases {
		l, err := OpenLeases(file, pool)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	l := open()
	given := map[byte]netip.Addr{}
	for id := range byte(5) {
		a, err := l.Get(attest.Digest{id})
		if err != nil {
			t.Fatal(err)
		}
		given[id] = a
	}
	if _, err := l.Get(attest.Digest{9}); !errors.Is(err, ErrPoolExhausted) {
		t.Errorf("sixth device: %v", err)
	}
	l = open() // a restart
	for id, want := range given {
		if a, err := l.Get(attest.Digest{id}); err != nil || a != want {
			t.Errorf("device %d: %s, %v, want %s", id, a, err, want)
		}
	}
	for name, text := range map[string]string{
		"twice":     `{"leases":{"%064x":"10.80.0.2","%063x1":"10.80.0.2"}}`,
		"outside":   `{"leases":{"%064x":"10.81.0.2","%063x1":"10.80.0.2"}}`,
		"gateway's": `{"leases":{"%064x":"10.80.0.1","%063x1":"10.80.0.2"}}`,
		"broadcast": `{"leases":{"%064x":"10.80.0.7","%063x1":"10.80.0.2"}}`,
		"id":        `{"leases":{"%04x":"10.80.0.3","%063x1":"10.80.0.2"}}`,
	} {
		if err := os.WriteFile(file, fmt.Appendf(nil, text, 0, 0), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenLeases(file, pool); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// TestLeasesStayReadable: what OpenLeases would refuse is never written.
func TestLeasesStayReadable(t *testing.T) {
	l, err := OpenLeases(filepath.Join(t.TempDir(), "leases.json"), netip.MustParsePrefix("10.0.0.0/8"))
	if err != nil {
		t.Fatal(err)
	}
	for n := range uint32(200_000) { // 84 bytes each, and more
		a := netip.AddrFrom4([4]byte{10, byte(n>>16) + 1, byte(n >> 8), byte(n)})
		l.device[attest.Digest{1, byte(n >> 16), byte(n >> 8), byte(n)}], l.used[a] = a, true
	}
	if _, err := l.Get(attest.Digest{2}); err == nil {
		t.Error("a lease file was written that cannot be read")
	}
	if _, known := l.device[attest.Digest{2}]; known || l.Len() != 200_000 {
		t.Error("the refused device keeps an address")
	}
}

func TestParseConfig(t *testing.T) {
	good := `{"listen":"203.0.113.20:443","certificate":"c","key":"k","client_ca":"a","pool":"10.80.0.0/16","leases":"l","tun":"t0","lgwan":"l0"%s}`
	c, err := ParseConfig(fmt.Appendf(nil, good, ""))
	if err != nil || c.MTU != 1400 || c.MaxSessions != 10000 || c.Status != DefaultStatus || c.Self() != netip.MustParseAddr("10.80.0.1") {
		t.Errorf("%+v, %v", c, err)
	}
	for _, more := range []string{`,"mtu":100`, `,"pool":"10.80.0.5/16"`, `,"pool":"fd00::/64"`, `,"unknown":1`, `,"max_sessions":0`, `,"lgwan":"t0"`, `,"listen":"x"`, `}{`} {
		if _, err := ParseConfig(fmt.Appendf(nil, good, more)); err == nil {
			t.Errorf("%s: accepted", more)
		}
	}
}

func FuzzLeases(f *testing.F) {
	f.Add([]byte(`{"leases":{}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		l := &Leases{pool: netip.MustParsePrefix("10.80.0.0/16"), device: map[attest.Digest]netip.Addr{}, used: map[netip.Addr]bool{}}
		if l.parse(b) == nil && len(l.device) != len(l.used) {
			t.Errorf("%d devices share %d addresses", len(l.device), len(l.used))
		}
	})
}
