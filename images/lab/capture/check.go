// Package capture records the frames of a laptop's uplink and judges them: a
// host domain may send nothing but ARP, neighbour discovery, DHCP, TLS 1.3 to
// the organisation's servers and QUIC to its gateways, and everything else is a
// leak.
package capture

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"
)

// maxLeaks bounds Report.Leaks; Report.Leaked counts them all.
const maxLeaks = 100

// maxFrame is the most bytes of one record that Check reads: a 64 KiB packet
// that segmentation offload left in one piece, and its Ethernet header.
const maxFrame = 65535 + 18

// AllowList is what may be seen on an uplink besides ARP and neighbour
// discovery. The zero value allows only these two and DHCP by broadcast.
type AllowList struct {
	// Servers are the verifiers' and gateways' endpoints: TLS 1.3 over TCP,
	// opened by the laptop.
	Servers []netip.AddrPort
	// QUIC are the gateways' endpoints that speak QUIC over UDP, which the
	// laptop opens too.
	QUIC []netip.AddrPort
	// Links are the uplink's own prefixes, where a DHCP server may be spoken
	// to by unicast (RFC 2131 section 4.3.2, RENEWING).
	Links []netip.Prefix
	// Offices are LANs of the organisation's, in which the work domain is let
	// into the open once they are proven: what stays in one of them is not
	// judged, but for streams to Servers.
	Offices []netip.Prefix
	// Surroundings are the hardware addresses of the others on the uplink.
	// Frames that they send are counted and not judged, except that the TLS
	// streams of allowed servers are followed in both directions. Empty means
	// that every frame is judged, whoever sent it.
	Surroundings []net.HardwareAddr
	// Midway says that the capture began while connections were open: content
	// of a connection to an allowed server whose beginning was not seen is
	// counted as "midway" and not judged. A capture from the first frame on
	// leaves it false.
	Midway bool
	// Firmware is the hardware address of a laptop whose firmware brings its
	// network cards up before it starts the host domain: edk2 connects every
	// device when it looks for the partition of a boot entry the first time
	// (BmBoot.c, BmExpandPartitionDevicePath). The report by which IPv6 joins the
	// multicast group of that card's own link-local address is counted as
	// "firmware"; the host domain derives no address from a hardware address.
	Firmware net.HardwareAddr
	// PortAccess says that the laptop answers switches that ask for 802.1X.
	PortAccess bool
	// Wireless says that the capture is behind an access point, which tells the
	// bridges there in a station's name that it has come (layer2Update).
	Wireless bool
}

// layer2Update is the content of that frame: an 802.2 XID with nothing in it
// (IEEE 802.11F-2003 section 6.2; cfg80211_send_layer2_update, net/wireless/util.c).
var layer2Update = []byte{0x00, 0x01, 0xaf, 0x81, 0x01, 0x00}

// Leak is a frame that should not be there.
type Leak struct {
	Time        time.Time `json:"time"`
	Protocol    string    `json:"protocol"`
	Source      string    `json:"source"`
	Destination string    `json:"destination"`
	Length      int       `json:"length"` // bytes on the wire
	Why         string    `json:"why"`
}

func (l Leak) String() string {
	return fmt.Sprintf("%s %s %s -> %s, %d bytes: %s", l.Time.UTC().Format("15:04:05.000"), l.Protocol, l.Source, l.Destination, l.Length, l.Why)
}

// Report is the outcome of Check.
type Report struct {
	Frames int   `json:"frames"`
	Bytes  int64 `json:"bytes"`
	// Counts holds the frames of each kind: "arp", "nd", "802.1x", "dhcp", "tls",
	// "quic", "icmp", "firmware", "surroundings", "leak".
	Counts map[string]int `json:"counts"`
	// Flows counts the TLS connections to each server, and the QUIC ones under
	// "udp " and its address.
	Flows map[string]int `json:"flows"`
	// Suites counts the TLS cipher suites that the servers selected.
	Suites map[string]int `json:"suites"`
	Leaked int            `json:"leaked"`
	Leaks  []Leak         `json:"leaks,omitempty"` // the first hundred
	// Cut is true when the file ends inside a record, as one does that is
	// still being written.
	Cut bool `json:"cut,omitempty"`
}

// Clean reports whether there were frames and none of them was a leak. A
// capture without a single frame proves nothing.
func (r *Report) Clean() bool { return r.Frames > 0 && r.Leaked == 0 }

func (r *Report) String() string {
	s := fmt.Sprintf("%d frames: arp %d, nd %d, dhcp %d, tls %d and quic %d in %d connections, leaked %d",
		r.Frames, r.Counts["arp"], r.Counts["nd"], r.Counts["dhcp"], r.Counts["tls"], r.Counts["quic"], total(r.Flows), r.Leaked)
	if n := r.Counts["midway"]; n > 0 {
		s += fmt.Sprintf(", not judged %d of connections begun before the capture", n)
	}
	return s
}

func total(m map[string]int) (n int) {
	for _, v := range m {
		n += v
	}
	return n
}

// Check reads a pcap file of Ethernet frames, from the first frame of the
// uplink on, and judges every one of them by allow. An error means that the
// capture could not be judged, which is not a clean report either.
func Check(pcap io.Reader, allow AllowList) (Report, error) {
	c := checker{allow: allow, flows: map[flowKey]*flow{}, talks: map[flowKey]bool{}, report: Report{
		Counts: map[string]int{}, Flows: map[string]int{}, Suites: map[string]int{},
	}}
	r, err := pcapgo.NewReader(pcap)
	if err != nil {
		return c.report, fmt.Errorf("capture: %w", err)
	}
	if r.LinkType() != layers.LinkTypeEthernet {
		return c.report, fmt.Errorf("capture: link type %s, want Ethernet", r.LinkType())
	}
	if r.Snaplen() > 1<<20 {
		return c.report, fmt.Errorf("capture: snap length %d, at most %d", r.Snaplen(), 1<<20)
	}
	for {
		data, info, err := r.ReadPacketData()
		switch {
		case errors.Is(err, io.EOF):
			c.finish()
			return c.report, nil
		case errors.Is(err, io.ErrUnexpectedEOF):
			c.report.Cut = true
			c.finish()
			return c.report, nil
		case err != nil:
			return c.report, fmt.Errorf("capture: frame %d: %w", c.report.Frames, err)
		case len(data) > maxFrame:
			return c.report, fmt.Errorf("capture: frame %d of %d bytes, at most %d", c.report.Frames, len(data), maxFrame)
		}
		c.report.Frames++
		c.report.Bytes += int64(info.Length)
		c.frame(data, frame{time: info.Timestamp, length: info.Length, whole: info.Length == len(data)})
	}
}

// frame is what is known of the frame under judgement.
type frame struct {
	time        time.Time
	length      int
	whole       bool // nothing was cut off by the snap length
	foreign     bool // sent by the surroundings
	protocol    string
	source, dst string
}

type checker struct {
	allow  AllowList
	report Report
	flows  map[flowKey]*flow
	talks  map[flowKey]bool // QUIC
}

// leak files f, unless the surroundings sent it.
func (c *checker) leak(f frame, why string) {
	if f.foreign {
		c.report.Counts["surroundings"]++
		return
	}
	c.report.Counts["leak"]++
	c.report.Leaked++
	if len(c.report.Leaks) < maxLeaks {
		c.report.Leaks = append(c.report.Leaks, Leak{Time: f.time, Protocol: f.protocol, Source: f.source, Destination: f.dst, Length: f.length, Why: why})
	}
}

func (c *checker) allowed(kind string) { c.report.Counts[kind]++ }

// feedback satisfies gopacket's decoders; a cut frame is noticed by its length.
type feedback struct{}

func (feedback) SetTruncated() {}

func (c *checker) frame(data []byte, f frame) {
	f.protocol = "ethernet"
	var eth layers.Ethernet
	if err := eth.DecodeFromBytes(data, feedback{}); err != nil {
		c.leak(f, "not an Ethernet frame")
		return
	}
	f.source, f.dst = eth.SrcMAC.String(), eth.DstMAC.String()
	f.foreign = slices.ContainsFunc(c.allow.Surroundings, func(a net.HardwareAddr) bool { return slices.Equal(a, eth.SrcMAC) })
	switch eth.EthernetType {
	case layers.EthernetTypeARP:
		c.allowed("arp")
	case layers.EthernetTypeIPv4:
		var ip layers.IPv4
		f.protocol = "ipv4"
		if err := ip.DecodeFromBytes(eth.Payload, feedback{}); err != nil {
			c.leak(f, "malformed IPv4 header")
			return
		}
		src, _ := netip.AddrFromSlice(ip.SrcIP.To4())
		dst, _ := netip.AddrFromSlice(ip.DstIP.To4())
		f.source, f.dst, f.protocol = src.String(), dst.String(), ip.Protocol.String()
		if ip.Flags&layers.IPv4MoreFragments != 0 || ip.FragOffset != 0 {
			c.leak(f, "fragment")
			return
		}
		c.transport(ip.Protocol, ip.Payload, src, dst, f)
	case layers.EthernetTypeIPv6:
		var ip layers.IPv6
		f.protocol = "ipv6"
		if err := ip.DecodeFromBytes(eth.Payload, feedback{}); err != nil {
			c.leak(f, "malformed IPv6 header")
			return
		}
		src, _ := netip.AddrFromSlice(ip.SrcIP)
		dst, _ := netip.AddrFromSlice(ip.DstIP)
		f.source, f.dst, f.protocol = src.String(), dst.String(), ip.NextHeader.String()
		if ip.NextHeader == layers.IPProtocolICMPv6 {
			c.neighbour(ip, f)
			return
		}
		if ip.NextHeader == layers.IPProtocolIPv6HopByHop && c.joins(ip.HopLimit, eth.Payload[ip6Header:], src, dst) {
			c.allowed("firmware")
			return
		}
		c.transport(ip.NextHeader, ip.Payload, src, dst, f)
	case layers.EthernetTypeEAPOL:
		f.protocol = "802.1x"
		if c.allow.PortAccess && eapol(eth.Payload) {
			c.allowed("802.1x")
			return
		}
		c.leak(f, "802.1X that is neither EAP, nor its beginning or end")
	case layers.EthernetTypeLLC:
		f.protocol = "llc"
		if c.allow.Wireless && bytes.HasPrefix(eth.Payload, layer2Update) {
			c.allowed("llc")
			return
		}
		c.leak(f, "neither ARP nor IP")
	default:
		f.protocol = fmt.Sprintf("ethertype 0x%04x", uint16(eth.EthernetType))
		c.leak(f, "neither ARP nor IP")
	}
}

// ip6Header is the size of an IPv6 header (RFC 8200, section 3), which stands
// before the extension headers.
const ip6Header = 40

// joins reports whether the firmware joins its solicited-node group (RFC 2710,
// section 3: type 131, hop limit 1, behind a router alert; RFC 4291, sections
// 2.5.6 and 2.7.1 and appendix A: the addresses).
func (c *checker) joins(hops uint8, b []byte, src, dst netip.Addr) bool {
	m := c.allow.Firmware
	if len(m) != 6 || hops != 1 || len(b) != 8+24 || b[0] != byte(layers.IPProtocolICMPv6) || b[1] != 0 || b[8] != 131 {
		return false
	}
	own := netip.AddrFrom16([16]byte{0xfe, 0x80, 8: m[0] ^ 2, m[1], m[2], 0xff, 0xfe, m[3], m[4], m[5]})
	group := netip.AddrFrom16([16]byte{0xff, 2, 11: 1, 0xff, m[3], m[4], m[5]})
	return (src == own || src.IsUnspecified()) && dst == group && netip.AddrFrom16([16]byte(b[16:])) == group
}

// eapol reports whether p is an EAP packet, a start or a logoff of 802.1X with
// nothing behind it but an Ethernet frame's padding (IEEE 802.1X-2010, section 11.3).
func eapol(p []byte) bool {
	if len(p) < 4 || p[0] < 1 || p[0] > 3 || p[1] > 2 {
		return false
	}
	n := int(binary.BigEndian.Uint16(p[2:]))
	return n <= len(p)-4 && (p[1] == 0 || n == 0) && len(bytes.Trim(p[4+n:], "\x00")) == 0
}

// neighbour allows neighbour discovery: types 133 to 137, hop limit 255 (RFC
// 4861, sections 4 and 6.1).
func (c *checker) neighbour(ip layers.IPv6, f frame) {
	if len(ip.Payload) >= 8 && ip.Payload[0] >= 133 && ip.Payload[0] <= 137 && ip.HopLimit == 255 {
		c.allowed("nd")
		return
	}
	if c.unreachable(ip.Payload, netip.AddrFrom16([16]byte(ip.DstIP.To16()))) {
		c.allowed("icmp")
		return
	}
	c.leak(f, "ICMPv6 that is not neighbour discovery, nor an error about a server")
}

func (c *checker) transport(protocol layers.IPProtocol, payload []byte, src, dst netip.Addr, f frame) {
	server := func(a netip.Addr) bool {
		return slices.ContainsFunc(c.allow.Servers, func(s netip.AddrPort) bool { return s.Addr() == a })
	}
	if !server(src) && !server(dst) && slices.ContainsFunc(c.allow.Offices, func(o netip.Prefix) bool { return o.Contains(src) && o.Contains(dst) }) {
		c.allowed("office")
		return
	}
	switch protocol {
	case layers.IPProtocolTCP:
		c.tcp(payload, src, dst, f)
	case layers.IPProtocolUDP:
		var udp layers.UDP
		if err := udp.DecodeFromBytes(payload, feedback{}); err != nil {
			c.leak(f, "malformed UDP header")
			return
		}
		f.source = netip.AddrPortFrom(src, uint16(udp.SrcPort)).String()
		f.dst = netip.AddrPortFrom(dst, uint16(udp.DstPort)).String()
		if c.dhcp(udp, src, dst) {
			c.allowed("dhcp")
			return
		}
		if why := c.quic(udp.Payload, netip.AddrPortFrom(src, uint16(udp.SrcPort)), netip.AddrPortFrom(dst, uint16(udp.DstPort)), f); why != "" {
			c.leak(f, why)
		}
	case layers.IPProtocolICMPv4:
		if !c.unreachable(payload, dst) {
			c.leak(f, "neither TCP nor UDP, nor an error about a server")
			return
		}
		c.allowed("icmp")
	default:
		c.leak(f, "neither TCP nor UDP")
	}
}

// dhcp reports whether udp is a DHCP message (RFC 2131 section 2: BOOTP layout
// with the magic cookie at offset 236; RFC 8415 sections 7.1 and 7.2: multicast
// or link-local) between places where DHCP belongs.
func (c *checker) dhcp(udp layers.UDP, src, dst netip.Addr) bool {
	const cookie = 0x63825363
	p, ports := udp.Payload, [2]layers.UDPPort{udp.SrcPort, udp.DstPort}
	near := func(a netip.Addr) bool {
		return a.IsUnspecified() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}) || a.IsLinkLocalUnicast() ||
			a == netip.MustParseAddr("ff02::1:2") ||
			slices.ContainsFunc(c.allow.Links, func(l netip.Prefix) bool { return l.Contains(a) })
	}
	if !near(src) || !near(dst) {
		return false
	}
	if src.Is4() {
		request := ports == [2]layers.UDPPort{68, 67} && len(p) > 0 && p[0] == 1
		reply := ports == [2]layers.UDPPort{67, 68} && len(p) > 0 && p[0] == 2
		return (request || reply) && len(p) >= 240 && binary.BigEndian.Uint32(p[236:]) == cookie
	}
	return (ports == [2]layers.UDPPort{546, 547} || ports == [2]layers.UDPPort{547, 546}) && len(p) >= 4
}
