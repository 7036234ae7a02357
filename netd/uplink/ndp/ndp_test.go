package ndp

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
)

var router = netip.MustParseAddr("fe80::1")

// advertisement makes one with another library's code.
func advertisement(t testing.TB, from string, hops uint8, lifetime uint16, options ...layers.ICMPv6Option) []byte {
	t.Helper()
	ip := &layers.IPv6{Version: 6, HopLimit: hops, NextHeader: layers.IPProtocolICMPv6, SrcIP: net.ParseIP(from), DstIP: net.ParseIP("ff02::1")}
	icmp := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(layers.ICMPv6TypeRouterAdvertisement, 0)}
	icmp.SetNetworkLayerForChecksum(ip)
	ra := &layers.ICMPv6RouterAdvertisement{HopLimit: 64, Flags: 0x80, RouterLifetime: lifetime, Options: options}
	buf := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, ip, icmp, ra); err != nil {
		t.Fatal(err)
	}
	return bytes.Clone(buf.Bytes())
}

func prefixOption(p string, flags byte, valid, preferred uint32) layers.ICMPv6Option {
	prefix := netip.MustParsePrefix(p)
	b := []byte{byte(prefix.Bits()), flags}
	b = binary.BigEndian.AppendUint32(b, valid)
	b = binary.BigEndian.AppendUint32(b, preferred)
	return layers.ICMPv6Option{Type: 3, Data: append(append(b, 0, 0, 0, 0), prefix.Addr().AsSlice()...)}
}

func TestAdvertisement(t *testing.T) {
	b := advertisement(t, "fe80::1", 255, 1800,
		layers.ICMPv6Option{Type: 1, Data: []byte{2, 0, 0, 0, 0, 1}},
		prefixOption("2001:db8:50::/64", 0xc0, 7200, 3600),
		layers.ICMPv6Option{Type: 5, Data: []byte{0, 0, 0, 0, 5, 0xdc}},
		layers.ICMPv6Option{Type: 25, Data: append(make([]byte, 6), make([]byte, 16)...)}, // RDNSS
		layers.ICMPv6Option{Type: 24, Data: append(make([]byte, 6), make([]byte, 16)...)}, // RIO
		prefixOption("fd00:50::/48", 0x80, 1, 2))
	m, err := Parse(b)
	if err != nil || m.Advertisement == nil {
		t.Fatal(m, err)
	}
	a := m.Advertisement
	if a.Router != router || a.Lifetime != 1800*time.Second || !a.Managed || a.MTU != 1500 || len(a.Prefixes) != 2 {
		t.Errorf("%+v", a)
	}
	slices.Reverse(a.Prefixes) // gopacket writes options from the last to the first
	if p := a.Prefixes[0]; p.Prefix != netip.MustParsePrefix("2001:db8:50::/64") || !p.Autonomous || p.Valid != 2*time.Hour || p.Preferred != time.Hour {
		t.Errorf("%+v", p)
	}
	if p := a.Prefixes[1]; p.Autonomous || p.Prefix.Bits() != 48 {
		t.Errorf("%+v", p)
	}
	if _, err := Parse(append(b, 0, 0, 0)); err != nil {
		t.Errorf("a padded frame is refused: %v", err)
	}
}

func TestRefused(t *testing.T) {
	good := advertisement(t, "fe80::1", 255, 1800)
	mend := func(b []byte) []byte { // puts the checksum right
		s, d := netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
		b[42], b[43] = 0, 0
		binary.BigEndian.PutUint16(b[42:], checksum(s, d, icmpv6, b[40:]))
		return b
	}
	change := func(at int, v byte) []byte { b := bytes.Clone(good); b[at] = v; return mend(b) }
	for name, b := range map[string][]byte{
		"forwarded":              change(7, 254),
		"IPv4":                   change(0, 0x45),
		"extension header":       change(6, 0),
		"longer than its frame":  change(5, 200),
		"code":                   change(41, 1),
		"router solicitation":    change(40, 133),
		"redirect":               change(40, 137),
		"checksum":               func() []byte { b := bytes.Clone(good); b[46] ^= 1; return b }(),
		"from a global address":  advertisement(t, "2001:db8::1", 255, 1800),
		"from nobody":            advertisement(t, "::", 255, 1800),
		"option of no length":    mend(append(change(5, 24), 1, 0, 0, 0, 0, 0, 0, 0)),
		"option past the end":    mend(append(change(5, 24), 1, 2, 0, 0, 0, 0, 0, 0)),
		"MTU of two words":       mend(append(change(5, 32), append([]byte{5, 2}, make([]byte, 14)...)...)),
		"prefix of two words":    mend(append(change(5, 32), append([]byte{3, 2}, make([]byte, 14)...)...)),
		"neighbour of all":       Packet(router, AllNodes, 255, icmpv6, append([]byte{136, 0, 0, 0, 0, 0, 0, 0}, AllNodes.AsSlice()...)),
		"neighbour without name": Packet(router, AllNodes, 255, icmpv6, []byte{136, 0, 0, 0, 0, 0, 0, 0}),
		"short":                  good[:44],
		"nothing":                nil,
	} {
		if m, err := Parse(b); err == nil {
			t.Errorf("%s is taken: %+v", name, m)
		}
	}
}

func TestManyPrefixes(t *testing.T) {
	var options []layers.ICMPv6Option
	for range 40 {
		options = append(options, prefixOption("2001:db8:50::/64", 0xc0, 7200, 3600))
	}
	m, err := Parse(advertisement(t, "fe80::1", 255, 1800, options...))
	if err != nil || len(m.Advertisement.Prefixes) != maxPrefix {
		t.Errorf("%+v, %v", m, err)
	}
}

func TestProbe(t *testing.T) {
	a := netip.MustParseAddr("2001:db8::1234:5678")
	b := Probe(a)
	if m, err := Parse(b); err != nil || m.Claimed != a {
		t.Errorf("%+v, %v", m, err)
	}
	p := gopacket.NewPacket(b, layers.LayerTypeIPv6, gopacket.Default)
	if p.ErrorLayer() != nil || p.Layer(layers.LayerTypeICMPv6NeighborSolicitation) == nil {
		t.Errorf("another reader sees %s", p)
	}
	if to := SolicitedNode(a); to != netip.MustParseAddr("ff02::1:ff34:5678") || Hardware(to).String() != "33:33:ff:34:56:78" {
		t.Errorf("asked at %s, %s", to, Hardware(to))
	}
	if m, err := Parse(Packet(router, AllNodes, 255, icmpv6, append([]byte{135, 0, 0, 0, 0, 0, 0, 0}, a.AsSlice()...))); err != nil || m.Asked != a {
		t.Errorf("%+v, %v", m, err)
	}
	if p := gopacket.NewPacket(RouterSolicitation(router), layers.LayerTypeIPv6, gopacket.Default); p.Layer(layers.LayerTypeICMPv6RouterSolicitation) == nil {
		t.Errorf("another reader sees %s", p)
	}
}

func TestAddress(t *testing.T) {
	prefix, mac := netip.MustParsePrefix("2001:db8:50::/64"), net.HardwareAddr{2, 0, 0, 0, 0, 1}
	s := Secret{1}
	a := s.Address(prefix, mac, 0)
	seen := map[netip.Addr]bool{a: true}
	for _, b := range []netip.Addr{s.Address(prefix, mac, 1), s.Address(prefix, net.HardwareAddr{2, 0, 0, 0, 0, 2}, 0), Secret{2}.Address(prefix, mac, 0)} {
		if seen[b] || !prefix.Contains(b) {
			t.Errorf("%s", b)
		}
		seen[b] = true
	}
	if again := s.Address(prefix, mac, 0); again != a {
		t.Errorf("%s, then %s", a, again)
	}
	other, own := s.Address(netip.MustParsePrefix("2001:db8:51::/64"), mac, 0).As16(), a.As16()
	if [8]byte(other[8:]) == [8]byte(own[8:]) {
		t.Error("the same end in two networks")
	}
}

func FuzzParse(f *testing.F) {
	f.Add(advertisement(f, "fe80::1", 255, 1800, prefixOption("2001:db8:50::/64", 0xc0, 7200, 3600)))
	f.Add(Probe(router))
	f.Fuzz(func(t *testing.T, b []byte) {
		// The checksum is put right, or little would ever be read.
		if len(b) >= 48 {
			b = bytes.Clone(b)
			if n := header + int(binary.BigEndian.Uint16(b[4:])); n >= 48 && n <= len(b) {
				s, d := netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
				b[42], b[43] = 0, 0
				binary.BigEndian.PutUint16(b[42:], checksum(s, d, icmpv6, b[40:n]))
			}
		}
		m, err := Parse(b)
		if err != nil {
			return
		}
		n := 0
		for _, is := range []bool{m.Advertisement != nil, m.Claimed.IsValid(), m.Asked.IsValid()} {
			if is {
				n++
			}
		}
		if n != 1 {
			t.Fatalf("%+v", m)
		}
		if a := m.Advertisement; a != nil && (!a.Router.IsLinkLocalUnicast() || len(a.Prefixes) > maxPrefix || a.MTU < 0) {
			t.Fatalf("%+v", a)
		}
	})
}
