// Package ndp is what netd says and hears on a link to get an IPv6 address
// without the kernel's help: routers' advertisements (RFC 4861), of which no
// more is read than is believed, duplicate address detection (RFC 4862) and
// stable opaque addresses (RFC 7217). It is pure. Packets are whole IPv6 packets
// without link header.
package ndp

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"
)

// ICMPv6 types (RFC 4861, section 4).
const (
	TypeRouterSolicitation     = 133
	TypeRouterAdvertisement    = 134
	TypeNeighbourSolicitation  = 135
	TypeNeighbourAdvertisement = 136
)

const (
	header     = 40  // of IPv6 (RFC 8200, section 3)
	icmpv6     = 58  // its number as a next header
	hops       = 255 // nobody who is not on the link can send so (RFC 4861, section 3.1)
	maxPrefix  = 8   // prefixes read of one advertisement
	maxMessage = 1500
)

// The multicast addresses of all nodes and all routers on a link.
var (
	AllNodes   = netip.MustParseAddr("ff02::1")
	AllRouters = netip.MustParseAddr("ff02::2")
)

// Advertisement is what is taken from a router's advertisement. Resolvers
// (RDNSS, DNSSL), routes (RIO), portals (RFC 8910), preferences and timers are
// never looked at.
type Advertisement struct {
	Router   netip.Addr    // its link-local address
	Lifetime time.Duration // as a router to other networks; 0: it is none
	Managed  bool          // addresses are given by DHCPv6
	MTU      int           // bytes; 0 if it says nothing
	Prefixes []Prefix      // at most 8
}

// Prefix is one of the link's.
type Prefix struct {
	Prefix           netip.Prefix
	Autonomous       bool          // hosts make their addresses in it themselves
	Valid, Preferred time.Duration // how long addresses in it may be used, and be used for what is new
}

// Message is one that was heard. Exactly one of its fields is set.
type Message struct {
	Advertisement *Advertisement
	// Claimed is an address that somebody uses or is about to use: the target of
	// a neighbour's advertisement, or of a solicitation from the unspecified
	// address (RFC 4862, section 5.4.3).
	Claimed netip.Addr
	// Asked is set for any other solicitation; it is the address asked for.
	Asked netip.Addr
}

var errNot = errors.New("ndp: not a message for us")

// Parse reads a packet. It refuses everything that RFC 4861, sections 6.1.2 and
// 7.1, has a host ignore: another hop limit, extension headers, a wrong checksum
// or code, options without length, a router that does not speak from its
// link-local address.
func Parse(packet []byte) (Message, error) {
	if len(packet) < header+8 || packet[0]>>4 != 6 || packet[6] != icmpv6 || packet[7] != hops {
		return Message{}, errNot
	}
	size := int(binary.BigEndian.Uint16(packet[4:]))
	if size < 8 || size > maxMessage || header+size > len(packet) { // a short frame is padded
		return Message{}, fmt.Errorf("%w: length %d", errNot, size)
	}
	source, destination := netip.AddrFrom16([16]byte(packet[8:24])), netip.AddrFrom16([16]byte(packet[24:40]))
	b := packet[header : header+size]
	if checksum(source, destination, icmpv6, b) != 0 || b[1] != 0 {
		return Message{}, fmt.Errorf("%w: checksum or code", errNot)
	}
	switch b[0] {
	case TypeRouterAdvertisement:
		return parseAdvertisement(source, b)
	case TypeNeighbourSolicitation, TypeNeighbourAdvertisement:
		if len(b) < 24 {
			return Message{}, fmt.Errorf("%w: %d bytes", errNot, len(b))
		}
		target := netip.AddrFrom16([16]byte(b[8:24]))
		if err := options(b[24:], nil); err != nil || target.IsMulticast() || target.IsUnspecified() || target.Is4In6() {
			return Message{}, fmt.Errorf("%w: target %s, %v", errNot, target, err)
		}
		if b[0] == TypeNeighbourSolicitation && !source.IsUnspecified() {
			return Message{Asked: target}, nil
		}
		return Message{Claimed: target}, nil
	}
	return Message{}, fmt.Errorf("%w: type %d", errNot, b[0])
}

func parseAdvertisement(source netip.Addr, b []byte) (Message, error) {
	if len(b) < 16 || !source.IsLinkLocalUnicast() {
		return Message{}, fmt.Errorf("%w: advertisement of %d bytes from %s", errNot, len(b), source)
	}
	a := Advertisement{Router: source, Managed: b[5]&0x80 != 0, Lifetime: time.Duration(binary.BigEndian.Uint16(b[6:])) * time.Second}
	err := options(b[16:], func(kind byte, o []byte) error {
		switch {
		case kind == 5 && len(o) == 8: // MTU, RFC 4861, section 4.6.4
			mtu := binary.BigEndian.Uint32(o[4:])
			a.MTU = int(min(mtu, 1<<20))
			if mtu == 0 {
				a.MTU = 1 // said, and absurd
			}
		case kind == 3 && len(o) == 32: // prefix information, section 4.6.2
			if len(a.Prefixes) < maxPrefix && o[2] <= 128 {
				a.Prefixes = append(a.Prefixes, Prefix{
					Prefix:     netip.PrefixFrom(netip.AddrFrom16([16]byte(o[16:32])), int(o[2])).Masked(),
					Autonomous: o[3]&0x40 != 0, Valid: seconds(o[4:]), Preferred: seconds(o[8:]),
				})
			}
		case kind == 5 || kind == 3:
			return fmt.Errorf("%w: option %d of %d bytes", errNot, kind, len(o))
		}
		return nil
	})
	if err != nil {
		return Message{}, err
	}
	return Message{Advertisement: &a}, nil
}

func seconds(b []byte) time.Duration {
	return time.Duration(binary.BigEndian.Uint32(b)) * time.Second
}

// options calls f, unless nil, with every option, its header included.
func options(b []byte, f func(kind byte, option []byte) error) error {
	for len(b) > 0 {
		if len(b) < 8 || b[1] == 0 || int(b[1])*8 > len(b) {
			return fmt.Errorf("%w: an option without its length", errNot)
		}
		n := int(b[1]) * 8
		if f != nil {
			if err := f(b[0], b[:n]); err != nil {
				return err
			}
		}
		b = b[n:]
	}
	return nil
}

// RouterSolicitation asks routers to advertise, from an address that may be the
// unspecified one (RFC 4861, section 4.1).
func RouterSolicitation(from netip.Addr) []byte {
	return Packet(from, AllRouters, hops, icmpv6, []byte{TypeRouterSolicitation, 0, 0, 0, 0, 0, 0, 0})
}

// Probe asks whether somebody has the address a (RFC 4862, section 5.4.2).
func Probe(a netip.Addr) []byte {
	target := a.As16()
	return Packet(netip.IPv6Unspecified(), SolicitedNode(a), hops, icmpv6, append([]byte{TypeNeighbourSolicitation, 0, 0, 0, 0, 0, 0, 0}, target[:]...))
}

// Answer tells everybody on the link the hardware address of a (RFC 4861,
// section 4.4): unsolicited, with the override flag.
func Answer(a netip.Addr, hardware net.HardwareAddr) []byte {
	b := append([]byte{TypeNeighbourAdvertisement, 0, 0, 0, 0x20, 0, 0, 0}, a.AsSlice()...)
	return Packet(a, AllNodes, hops, icmpv6, append(append(b, 2, 1), hardware...))
}

// Packet makes an IPv6 packet of ICMPv6 or UDP, whose checksum stands at the
// usual place in body and is put there.
func Packet(from, to netip.Addr, hopLimit, protocol uint8, body []byte) []byte {
	at := 2
	if protocol != icmpv6 {
		at = 6 // UDP, RFC 768
	}
	p := make([]byte, header, header+len(body))
	p[0], p[6], p[7] = 0x60, protocol, hopLimit
	binary.BigEndian.PutUint16(p[4:], uint16(len(body)))
	s, d := from.As16(), to.As16()
	copy(p[8:], s[:])
	copy(p[24:], d[:])
	p = append(p, body...)
	sum := checksum(from, to, protocol, p[header:])
	if sum == 0 {
		sum = 0xffff // RFC 8200, section 8.1
	}
	binary.BigEndian.PutUint16(p[header+at:], sum)
	return p
}

// Destination is where a packet made here goes.
func Destination(packet []byte) netip.Addr { return netip.AddrFrom16([16]byte(packet[24:40])) }

// checksum is that of body with the pseudo-header (RFC 8200, section 8.1).
func checksum(from, to netip.Addr, protocol uint8, body []byte) uint16 {
	s, d := from.As16(), to.As16()
	sum := uint32(len(body)) + uint32(protocol)
	for _, b := range [][]byte{s[:], d[:], body} {
		for len(b) > 1 {
			sum += uint32(b[0])<<8 | uint32(b[1])
			b = b[2:]
		}
		if len(b) == 1 {
			sum += uint32(b[0]) << 8
		}
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum>>16 + sum&0xffff)
}

// SolicitedNode is the multicast address of those whose address ends as a's
// (RFC 4291, section 2.7.1).
func SolicitedNode(a netip.Addr) netip.Addr {
	b := a.As16()
	return netip.AddrFrom16([16]byte{0xff, 2, 11: 1, 12: 0xff, 13: b[13], 14: b[14], 15: b[15]})
}

// Hardware is the Ethernet address that a multicast address is sent to (RFC
// 2464, section 7).
func Hardware(multicast netip.Addr) net.HardwareAddr {
	b := multicast.As16()
	return net.HardwareAddr{0x33, 0x33, b[12], b[13], b[14], b[15]}
}

// Secret keeps addresses from being foretold, and from telling one network what
// they are in another.
type Secret [32]byte

// String implements fmt.Stringer. It does not show the secret.
func (Secret) String() string { return "secret" }

// Address is the stable opaque address in a prefix of 64 bits (RFC 7217,
// section 5): the same as long as prefix, hardware address and secret are, and
// another for each number of conflicts.
func (s Secret) Address(prefix netip.Prefix, hardware net.HardwareAddr, conflicts uint8) netip.Addr {
	b := prefix.Masked().Addr().As16()
	for try := byte(0); ; try++ {
		h := hmac.New(sha256.New, s[:])
		h.Write(b[:8])
		h.Write([]byte{byte(len(hardware))})
		h.Write(hardware)
		h.Write([]byte{conflicts, try})
		copy(b[8:], h.Sum(nil))
		// Not what is reserved (RFC 5453): a router's anycast address, and those
		// at the end.
		if id := binary.BigEndian.Uint64(b[8:]); id != 0 && id>>7 != 0xfdffffffffffffff>>7 && id>>24 != 0x02005efffe {
			return netip.AddrFrom16(b)
		}
	}
}
