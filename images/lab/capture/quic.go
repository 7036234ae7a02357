package capture

import (
	"encoding/binary"
	"net/netip"
	"slices"
)

const (
	// quicVersion is QUIC version 1 (RFC 9000, section 15).
	quicVersion = 1
	// quicInitial is the least size of a datagram that carries a client's
	// Initial packet (RFC 9000, section 14.1).
	quicInitial = 1200
	// maxConnectionID bounds connection IDs (RFC 9000, section 17.2).
	maxConnectionID = 20
)

// quic judges one datagram of UDP: it has to belong to a conversation that the
// laptop opened with an allowed server by a QUIC version 1 Initial packet, and
// to look like QUIC all the way. Inside QUIC version 1 there is TLS 1.3 and
// nothing else (RFC 9001, section 4.2).
func (c *checker) quic(payload []byte, from, to netip.AddrPort, f frame) (why string) {
	key, toServer := flowKey{from, to}, true
	if !slices.Contains(c.allow.QUIC, to) {
		if key, toServer = (flowKey{to, from}), false; !slices.Contains(c.allow.QUIC, from) {
			return "UDP that is not DHCP, nor QUIC to a gateway"
		}
	}
	if !f.whole {
		return "datagram cut short by the capture: its content cannot be judged"
	}
	if len(payload) < 21 || payload[0]&0x40 == 0 { // the fixed bit; header, packet number and tag
		return "UDP to a gateway that is not QUIC"
	}
	if long := payload[0]&0x80 != 0; long {
		id := int(payload[5])
		if binary.BigEndian.Uint32(payload[1:]) != quicVersion || id > maxConnectionID || len(payload) < 7+id || int(payload[6+id]) > maxConnectionID {
			return "QUIC of another version than 1"
		}
		if toServer && payload[0]&0x30 == 0 && len(payload) >= quicInitial && !c.talks[key] {
			if len(c.talks) >= maxFlows {
				return "more connections than can be followed"
			}
			c.talks[key] = true
			c.report.Flows["udp "+key.server.String()]++
		}
	}
	switch {
	case c.talks[key]:
		c.allowed("quic")
	case c.allow.Midway:
		c.allowed("midway")
	default:
		return "QUIC without a beginning by the laptop"
	}
	return ""
}

// unreachable reports whether an ICMP message to the given address is an error
// (RFC 792: types 3, 11 and 12; RFC 4443, section 2.1: types below 128) about a
// packet that came from there and went to an allowed server: the network may say
// so to the laptop, and it says nothing else.
func (c *checker) unreachable(payload []byte, to netip.Addr) bool {
	if len(payload) < 8 {
		return false
	}
	server := func(a netip.Addr) bool {
		is := func(s netip.AddrPort) bool { return s.Addr() == a }
		return slices.ContainsFunc(c.allow.Servers, is) || slices.ContainsFunc(c.allow.QUIC, is)
	}
	kind, p := payload[0], payload[8:]
	if to.Is4() {
		return (kind == 3 || kind == 11 || kind == 12) && len(p) >= 20 && p[0]>>4 == 4 &&
			netip.AddrFrom4([4]byte(p[12:16])) == to && server(netip.AddrFrom4([4]byte(p[16:20])))
	}
	return kind < 128 && len(p) >= 40 && p[0]>>4 == 6 &&
		netip.AddrFrom16([16]byte(p[8:24])) == to && server(netip.AddrFrom16([16]byte(p[24:40])))
}
