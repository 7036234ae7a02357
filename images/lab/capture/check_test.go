package capture

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"math/big"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"
)

var (
	laptop = net.HardwareAddr{0x52, 0x54, 0, 0, 0, 2}
	router = net.HardwareAddr{0x52, 0x54, 0, 0, 0, 1}
	server = netip.MustParseAddrPort("203.0.113.20:443")
	client = netip.MustParseAddrPort("192.168.50.23:40000")
	allow  = AllowList{Servers: []netip.AddrPort{server}, Links: []netip.Prefix{netip.MustParsePrefix("192.168.50.0/24")}}
)

// ether returns a frame from the laptop, or from the router if reply.
func ether(t testing.TB, reply bool, kind layers.EthernetType, rest ...gopacket.SerializableLayer) []byte {
	t.Helper()
	e := &layers.Ethernet{SrcMAC: laptop, DstMAC: router, EthernetType: kind}
	if reply {
		e.SrcMAC, e.DstMAC = router, laptop
	}
	buf := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true}, append([]gopacket.SerializableLayer{e}, rest...)...); err != nil {
		t.Fatal(err)
	}
	return slices.Clone(buf.Bytes())
}

func ipv4(src, dst string, p layers.IPProtocol) *layers.IPv4 {
	return &layers.IPv4{Version: 4, TTL: 64, Protocol: p, SrcIP: net.ParseIP(src), DstIP: net.ParseIP(dst)}
}

func udp4(t testing.TB, src, dst string, payload []byte) []byte {
	s, d := netip.MustParseAddrPort(src), netip.MustParseAddrPort(dst)
	return ether(t, false, layers.EthernetTypeIPv4, ipv4(s.Addr().String(), d.Addr().String(), layers.IPProtocolUDP),
		&layers.UDP{SrcPort: layers.UDPPort(s.Port()), DstPort: layers.UDPPort(d.Port())}, gopacket.Payload(payload))
}

func tcp4(t testing.TB, src, dst netip.AddrPort, seq uint32, flags string, payload []byte) []byte {
	has := func(f string) bool { return strings.Contains(flags, f) }
	return ether(t, src == server, layers.EthernetTypeIPv4, ipv4(src.Addr().String(), dst.Addr().String(), layers.IPProtocolTCP),
		&layers.TCP{SrcPort: layers.TCPPort(src.Port()), DstPort: layers.TCPPort(dst.Port()), Seq: seq, DataOffset: 5,
			SYN: has("S"), ACK: has("A"), FIN: has("F"), RST: has("R")}, gopacket.Payload(payload))
}

func dhcp(op byte) []byte {
	b := make([]byte, 300)
	b[0] = op
	copy(b[236:], []byte{0x63, 0x82, 0x53, 0x63})
	return b
}

func file(t testing.TB, frames ...[]byte) *bytes.Buffer {
	t.Helper()
	var b bytes.Buffer
	w := pcapgo.NewWriterNanos(&b)
	if err := w.WriteFileHeader(65536, layers.LinkTypeEthernet); err != nil {
		t.Fatal(err)
	}
	for i, f := range frames {
		if err := w.WritePacket(gopacket.CaptureInfo{Timestamp: time.Unix(int64(i), 0), CaptureLength: len(f), Length: len(f)}, f); err != nil {
			t.Fatal(err)
		}
	}
	return &b
}

// recordedConn keeps what was written to it.
type recordedConn struct {
	net.Conn
	mu      sync.Mutex
	written []byte
}

func (c *recordedConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	c.written = append(c.written, p...)
	c.mu.Unlock()
	return c.Conn.Write(p)
}

// session returns both directions of a real TLS connection with the highest
// version given, in which the client sends secret.
func session(t testing.TB, version uint16, secret []byte) (up, down []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "gateway"}, DNSNames: []string{"gateway"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	a, b := net.Pipe()
	ca, cb := &recordedConn{Conn: a}, &recordedConn{Conn: b}
	done := make(chan error, 1)
	go func() {
		s := tls.Server(cb, &tls.Config{MaxVersion: version, SessionTicketsDisabled: true, Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}})
		_, err := io.ReadFull(s, make([]byte, len(secret)))
		done <- err
	}()
	c := tls.Client(ca, &tls.Config{MaxVersion: version, InsecureSkipVerify: true})
	if _, err := c.Write(secret); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	a.Close()
	b.Close()
	return ca.written, cb.written
}

// conversation cuts both directions into segments of n bytes.
func conversation(t testing.TB, up, down []byte, n int) [][]byte {
	const isn, peerISN = 0xffffff00, 7000 // the first wraps around
	frames := [][]byte{tcp4(t, client, server, isn, "S", nil), tcp4(t, server, client, peerISN, "SA", nil)}
	for _, d := range []struct {
		from, to netip.AddrPort
		isn      uint32
		data     []byte
	}{{client, server, isn, up}, {server, client, peerISN, down}} {
		seq := d.isn + 1
		for part := range slices.Chunk(d.data, n) {
			frames = append(frames, tcp4(t, d.from, d.to, seq, "A", part))
			seq += uint32(len(part))
		}
	}
	return frames
}

func check(t *testing.T, allow AllowList, frames ...[]byte) Report {
	t.Helper()
	r, err := Check(file(t, frames...), allow)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestAllowed(t *testing.T) {
	up, down := session(t, tls.VersionTLS13, []byte("a packet of the work domain"))
	frames := [][]byte{
		ether(t, false, layers.EthernetTypeARP, gopacket.Payload(make([]byte, 28))),
		udp4(t, "0.0.0.0:68", "255.255.255.255:67", dhcp(1)),
		udp4(t, "192.168.50.1:67", "192.168.50.23:68", dhcp(2)),
		ether(t, false, layers.EthernetTypeIPv6, &layers.IPv6{Version: 6, HopLimit: 255, NextHeader: layers.IPProtocolICMPv6,
			SrcIP: net.ParseIP("fe80::1"), DstIP: net.ParseIP("ff02::2")}, gopacket.Payload{133, 0, 0, 0, 0, 0, 0, 0}),
	}
	for _, n := range []int{1, 700, 1400, 60000} {
		conv := conversation(t, up, down, n)
		out := slices.Clone(conv)
		slices.Reverse(out[2:])        // every segment out of order
		out = append(out, conv[2:]...) // and sent once more
		for _, c := range [][][]byte{conv, out} {
			r := check(t, allow, append(slices.Clone(frames), c...)...)
			if !r.Clean() || r.Counts["arp"] != 1 || r.Counts["dhcp"] != 2 || r.Counts["nd"] != 1 || r.Flows[server.String()] != 1 {
				t.Errorf("segments of %d bytes: %s\n%v", n, &r, r.Leaks)
			}
			if total(r.Suites) != 1 {
				t.Errorf("suites %v", r.Suites)
			}
		}
	}
	if r := check(t, allow); r.Clean() {
		t.Error("an empty capture is called clean")
	}
}

func TestLeaks(t *testing.T) {
	up, down := session(t, tls.VersionTLS13, []byte("secret"))
	up12, down12 := session(t, tls.VersionTLS12, []byte("secret"))
	other := netip.MustParseAddrPort("198.51.100.7:443")
	ip6 := func(next layers.IPProtocol, hops uint8, payload ...byte) []byte {
		return ether(t, false, layers.EthernetTypeIPv6, &layers.IPv6{Version: 6, HopLimit: hops, NextHeader: next,
			SrcIP: net.ParseIP("fe80::1"), DstIP: net.ParseIP("ff02::16")}, gopacket.Payload(payload))
	}
	fragment := ipv4("192.168.50.23", "203.0.113.20", layers.IPProtocolTCP)
	fragment.FragOffset = 185
	open := func(payload string) [][]byte {
		return [][]byte{tcp4(t, client, server, 10, "S", nil), tcp4(t, client, server, 11, "A", []byte(payload))}
	}
	for name, tc := range map[string]struct {
		frames [][]byte
		why    string
	}{
		"name server":         {[][]byte{udp4(t, "192.168.50.23:5353", "8.8.8.8:53", []byte("query"))}, "UDP that is not DHCP"},
		"dhcp port, far away": {[][]byte{udp4(t, "192.168.50.23:68", "8.8.8.8:67", dhcp(1))}, "UDP that is not DHCP"},
		"dhcp port, no dhcp":  {[][]byte{udp4(t, "192.168.50.23:68", "255.255.255.255:67", make([]byte, 300))}, "UDP that is not DHCP"},
		"udp 443 to server":   {[][]byte{udp4(t, "192.168.50.23:4433", "203.0.113.20:443", []byte("x"))}, "UDP that is not DHCP"},
		"ping": {[][]byte{ether(t, false, layers.EthernetTypeIPv4, ipv4("192.168.50.23", "203.0.113.20", layers.IPProtocolICMPv4),
			gopacket.Payload(make([]byte, 16)))}, "neither TCP nor UDP"},
		"fragment":          {[][]byte{ether(t, false, layers.EthernetTypeIPv4, fragment, gopacket.Payload(make([]byte, 16)))}, "fragment"},
		"other server":      {[][]byte{tcp4(t, client, other, 1, "S", nil)}, "not the organisation's"},
		"other port":        {[][]byte{tcp4(t, client, netip.AddrPortFrom(server.Addr(), 80), 1, "S", nil)}, "not the organisation's"},
		"multicast report":  {[][]byte{ip6(layers.IPProtocolICMPv6, 1, 143, 0, 0, 0, 0, 0, 0, 0)}, "not neighbour discovery"},
		"nd from afar":      {[][]byte{ip6(layers.IPProtocolICMPv6, 64, 135, 0, 0, 0, 0, 0, 0, 0)}, "not neighbour discovery"},
		"extension header":  {[][]byte{ip6(layers.IPProtocolIPv6HopByHop, 255, 58, 0, 5, 2, 0, 0, 1, 0)}, "neither TCP nor UDP"},
		"vlan":              {[][]byte{ether(t, false, layers.EthernetTypeDot1Q, gopacket.Payload(make([]byte, 50)))}, "neither ARP nor IP"},
		"short frame":       {[][]byte{{1, 2, 3}}, "not an Ethernet frame"},
		"plain http":        {open("GET / HTTP/1.1\r\n\r\n"), "not TLS"},
		"data first":        {open("\x17\x03\x03\x00\x05hello"), "not a hello"},
		"hello of noise":    {open("\x16\x03\x01\x00\x05hello"), "not a TLS 1.3 hello"},
		"tls 1.2":           {conversation(t, up12, down12, 1400), "TLS 1.3"},
		"clear after hello": {conversation(t, append(slices.Clone(up), "plain text"...), down, 1400), "not TLS"},
		"no beginning":      {conversation(t, up, down, 1400)[2:], "beginning was not seen"},
		"gap":               {slices.Delete(conversation(t, up, down, 1), 20, 21), "gap"},
	} {
		t.Run(name, func(t *testing.T) {
			r := check(t, allow, tc.frames...)
			if r.Clean() || len(r.Leaks) == 0 || !strings.Contains(r.Leaks[0].Why, tc.why) {
				t.Errorf("got %v, want a leak because %q", r.Leaks, tc.why)
			}
		})
	}
}

// TestFirmwareJoins: the firmware may report the group of its own card, from
// its own address, and nothing else so.
func TestFirmwareJoins(t *testing.T) {
	group := net.ParseIP("ff02::1:ff5e:c150")
	frame := func(src, dst net.IP, hops, kind byte, reported net.IP) []byte {
		alert := []byte{58, 0, 5, 2, 0, 0, 1, 0}
		return ether(t, false, layers.EthernetTypeIPv6, &layers.IPv6{Version: 6, HopLimit: hops, NextHeader: layers.IPProtocolIPv6HopByHop, SrcIP: src, DstIP: dst, Length: 32},
			gopacket.Payload(slices.Concat(alert, []byte{kind, 0, 0, 0, 0, 0, 0, 0}, reported)))
	}
	own, other := net.ParseIP("fe80::5054:ff:fe5e:c150"), net.ParseIP("ff02::fb")
	allow := AllowList{Firmware: net.HardwareAddr{0x52, 0x54, 0, 0x5e, 0xc1, 0x50}}
	if r := check(t, allow, frame(own, group, 1, 131, group), frame(net.IPv6unspecified, group, 1, 131, group)); !r.Clean() || r.Counts["firmware"] != 2 {
		t.Errorf("%s %v", &r, r.Leaks)
	}
	for name, data := range map[string][]byte{
		"another source": frame(net.ParseIP("fe80::1"), group, 1, 131, group), "another group": frame(own, other, 1, 131, other),
		"reports another": frame(own, group, 1, 131, other), "from afar": frame(own, group, 64, 131, group), "another type": frame(own, group, 1, 132, group),
	} {
		if r := check(t, allow, data); r.Clean() {
			t.Errorf("%s: no leak", name)
		}
	}
	if r := check(t, AllowList{}, frame(own, group, 1, 131, group)); r.Clean() {
		t.Error("allowed to everybody")
	}
}

// TestPortAccess: of 802.1X only EAP, start and logoff pass, with nothing hidden
// behind them, and only where switches ask for it.
func TestPortAccess(t *testing.T) {
	frame := func(p ...byte) []byte {
		return ether(t, false, layers.EthernetTypeEAPOL, gopacket.Payload(p))
	}
	for name, c := range map[string]struct {
		frame []byte
		clean bool
	}{
		"start":               {frame(1, 1, 0, 0), true},
		"EAP":                 {frame(2, 0, 0, 5, 2, 1, 0, 5, 13), true},
		"padded":              {frame(1, 1, 0, 0, 0, 0, 0), true},
		"something behind it": {frame(1, 1, 0, 0, 's'), false},
		"start with content":  {frame(1, 1, 0, 1, 's'), false},
		"a key":               {frame(2, 3, 0, 0), false},
		"longer than it is":   {frame(2, 0, 0, 99, 1), false},
	} {
		if r := check(t, AllowList{PortAccess: true}, c.frame); r.Clean() != c.clean {
			t.Errorf("%s: %s", name, &r)
		}
		if r := check(t, AllowList{}, c.frame); r.Clean() {
			t.Errorf("%s: passes where nobody asks for it", name)
		}
	}
}

func TestCaptureThatBeganMidway(t *testing.T) {
	client, server, allow := netip.MustParseAddrPort("192.168.50.23:4433"), netip.MustParseAddrPort("203.0.113.20:443"), AllowList{
		Servers: []netip.AddrPort{netip.MustParseAddrPort("203.0.113.20:443")}, Midway: true}
	r := check(t, allow, tcp4(t, client, server, 10, "A", []byte("\x17\x03\x03\x00\x05hello")))
	if !r.Clean() || r.Counts["midway"] != 1 {
		t.Errorf("an open connection to the gateway: %+v", r)
	}
	other := netip.MustParseAddrPort("198.51.100.1:443")
	if r := check(t, allow, tcp4(t, client, other, 10, "A", []byte("\x17\x03\x03\x00\x05hello"))); r.Clean() {
		t.Error("an open connection to another address was let pass")
	}
}

func TestSurroundingsAreNotJudged(t *testing.T) {
	noise := ether(t, true, layers.EthernetTypeIPv4, ipv4("192.168.50.1", "192.168.50.23", layers.IPProtocolICMPv4), gopacket.Payload(make([]byte, 16)))
	if r := check(t, allow, noise); r.Leaked != 1 {
		t.Errorf("without surroundings: %s", &r)
	}
	a := allow
	a.Surroundings = []net.HardwareAddr{router}
	if r := check(t, a, noise); r.Leaked != 0 || r.Counts["surroundings"] != 1 {
		t.Errorf("with surroundings: %s", &r)
	}
}

func TestLeaksAreBounded(t *testing.T) {
	frames := slices.Repeat([][]byte{udp4(t, "192.168.50.23:5353", "8.8.8.8:53", nil)}, maxLeaks+5)
	if r := check(t, allow, frames...); r.Leaked != maxLeaks+5 || len(r.Leaks) != maxLeaks {
		t.Errorf("leaked %d, listed %d", r.Leaked, len(r.Leaks))
	}
}

func TestUnreadable(t *testing.T) {
	whole := file(t, udp4(t, "0.0.0.0:68", "255.255.255.255:67", dhcp(1))).Bytes()
	if _, err := Check(bytes.NewReader(whole[:10]), allow); err == nil {
		t.Error("a file without header was judged")
	}
	r, err := Check(bytes.NewReader(whole[:len(whole)-4]), allow)
	if err != nil || !r.Cut || r.Clean() {
		t.Errorf("cut file: %v, %+v", err, r)
	}
}

func FuzzCheck(f *testing.F) {
	up, down := session(f, tls.VersionTLS13, []byte("secret"))
	f.Add(file(f, conversation(f, up, down, 900)...).Bytes())
	f.Add(file(f, udp4(f, "0.0.0.0:68", "255.255.255.255:67", dhcp(1))).Bytes())
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := Check(bytes.NewReader(data), allow)
		if n := total(r.Counts); err == nil && n < r.Frames {
			t.Errorf("%d frames, %d judged", r.Frames, n)
		}
	})
}
