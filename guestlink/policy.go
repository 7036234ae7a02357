package guestlink

import (
	"encoding/binary"
	"fmt"
	"strings"
)

// Numbers of IP protocols and IPv6 extension headers (IANA, protocol numbers).
const (
	protoTCP      = 6
	protoUDP      = 17
	protoFragment = 44
	protoESP      = 50
	protoICMPv6   = 58
	protoSCTP     = 132
)

// Policy says which unusual IP packets are carried. The zero value carries none
// of them.
type Policy struct {
	Fragments  bool // parts of a packet, but for the forms that only attacks have
	Options    bool // IPv4 headers with options
	Extensions bool // IPv6 extension headers other than Fragment
}

// DefaultPolicy carries fragments, which large DNS and Kerberos answers need.
func DefaultPolicy() Policy { return Policy{Fragments: true} }

// ParsePolicy reads a list of "fragments", "options" and "extensions", divided
// by commas; an empty string is none of them.
func ParsePolicy(s string) (p Policy, err error) {
	for word := range strings.SplitSeq(s, ",") {
		switch word {
		case "":
		case "fragments":
			p.Fragments = true
		case "options":
			p.Options = true
		case "extensions":
			p.Extensions = true
		default:
			return Policy{}, fmt.Errorf("policy %q: want fragments, options or extensions", word)
		}
	}
	return p, nil
}

// Verdict is what a Policy says of a packet. The zero value is refusal.
type Verdict uint8

// Verdicts.
const (
	VerdictFragment  Verdict = 0 // a fragment that is not carried
	VerdictOptions   Verdict = 1 // IPv4 options
	VerdictExtension Verdict = 2 // an IPv6 header chain that is not carried
	VerdictCarry     Verdict = 3
	VerdictNeighbour Verdict = 4 // ICMPv6 for neighbours on one link
)

// Judge applies p to a packet that ParseIP has accepted. Whatever p says, these
// are never carried: an IPv4 fragment at offset 1, which overwrites the TCP
// flags (RFC 1858, section 3), a fragment that ends behind 65,535 bytes, one
// that is not the last and not a multiple of 8 bytes (RFC 791, section 3.2), a
// packet with IPv6's jumbo length, IPv6 routing headers (RFC 5095), and ICMPv6
// but errors and echo: the guest link has no neighbours, and neither end learns
// routers, prefixes or resolvers by it.
func (p Policy) Judge(packet []byte) Verdict {
	if packet[0]>>4 == 4 {
		return p.judge4(packet)
	}
	return p.judge6(packet)
}

func (p Policy) judge4(b []byte) Verdict {
	header := int(b[0]&0x0f) * 4
	if header > 20 && !p.Options {
		return VerdictOptions
	}
	field := binary.BigEndian.Uint16(b[6:])
	if field&0x3fff == 0 { // neither offset nor more fragments
		return VerdictCarry
	}
	return p.fragment(int(field&0x1fff), field&0x2000 != 0, len(b)-header)
}

// fragment judges a part of n bytes, at offset times 8 bytes.
func (p Policy) fragment(offset int, more bool, n int) Verdict {
	if !p.Fragments || offset == 1 || n == 0 || (more && n%8 != 0) || offset*8+n > MaxPacket {
		return VerdictFragment
	}
	return VerdictCarry
}

func (p Policy) judge6(b []byte) Verdict {
	next, rest := b[6], b[40:]
	for range 8 { // no honest chain is longer (RFC 8200, section 4.1)
		switch next {
		case protoICMPv6:
			if len(rest) == 0 || !farther(rest[0]) {
				return VerdictNeighbour
			}
			return VerdictCarry
		case protoTCP, protoUDP, protoESP, protoSCTP:
			return VerdictCarry
		case protoFragment:
			if len(rest) < 8 {
				return VerdictExtension
			}
			field := binary.BigEndian.Uint16(rest[2:])
			v := p.fragment(int(field>>3), field&1 != 0, len(rest)-8)
			if v != VerdictCarry || field>>3 != 0 {
				return v // behind the first fragment comes no header
			}
			next, rest = rest[0], rest[8:]
		case 0, 60: // hop-by-hop, destination options
			if !p.Extensions || len(rest) < 8 || len(rest) < 8*(1+int(rest[1])) {
				return VerdictExtension
			}
			next, rest = rest[0], rest[8*(1+int(rest[1])):]
		default: // routing header, no next header, unknown ones
			return VerdictExtension
		}
	}
	return VerdictExtension
}

// farther reports whether an ICMPv6 type goes beyond one link: the errors of
// RFC 4443 (1 to 4) and echo (128, 129). What is left is neighbour discovery,
// multicast listeners and the like (IANA, ICMPv6 parameters).
func farther(icmp byte) bool { return icmp >= 1 && icmp <= 4 || icmp == 128 || icmp == 129 }

// FlowKey appends to dst what tells one flow from another: addresses, protocol
// and ports (not of fragments). Packet was accepted by ParseIP.
func FlowKey(dst, packet []byte) []byte {
	proto, addresses, transport := byte(0), packet[8:40], 40
	if packet[0]>>4 == 4 {
		proto, addresses, transport = packet[9], packet[12:20], int(packet[0]&0x0f)*4
		if binary.BigEndian.Uint16(packet[6:])&0x3fff != 0 {
			transport = len(packet)
		}
	} else {
		proto = packet[6]
	}
	dst = append(append(dst, proto), addresses...)
	if (proto == protoTCP || proto == protoUDP || proto == protoSCTP) && len(packet) >= transport+4 {
		dst = append(dst, packet[transport:transport+4]...)
	}
	return dst
}
