package capture

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
)

// initial is a client's Initial packet as far as a bystander can tell.
func initial(version uint32, size int) []byte {
	b := make([]byte, size)
	b[0] = 0xc0
	binary.BigEndian.PutUint32(b[1:], version)
	b[5], b[14] = 8, 4
	return b
}

func TestQUIC(t *testing.T) {
	short := append([]byte{0x41}, make([]byte, 60)...)
	allow := AllowList{Servers: allow.Servers, QUIC: []netip.AddrPort{server}, Links: allow.Links}
	to := func(payload []byte) []byte { return udp4(t, client.String(), server.String(), payload) }
	from := func(payload []byte) []byte { return udp4(t, server.String(), client.String(), payload) }
	icmp := func(source, target string) []byte {
		inner := make([]byte, 28)
		inner[0] = 0x45
		a, b := netip.MustParseAddr(source).As4(), netip.MustParseAddr(target).As4()
		copy(inner[12:], a[:])
		copy(inner[16:], b[:])
		return ether(t, true, layers.EthernetTypeIPv4, ipv4("203.0.113.1", "192.168.50.23", layers.IPProtocolICMPv4), gopacket.Payload(append([]byte{3, 3, 0, 0, 0, 0, 0, 0}, inner...)))
	}
	for name, c := range map[string]struct {
		frames [][]byte
		leaked int
	}{
		"a conversation":        {[][]byte{to(initial(1, 1200)), from(initial(1, 1200)), to(short), from(short)}, 0},
		"without a beginning":   {[][]byte{to(short)}, 1},
		"a small beginning":     {[][]byte{to(initial(1, 600))}, 1},
		"another version":       {[][]byte{to(initial(2, 1200))}, 1},
		"no fixed bit":          {[][]byte{to(initial(1, 1200)), to(make([]byte, 100))}, 1},
		"another server":        {[][]byte{udp4(t, client.String(), "203.0.113.10:443", initial(1, 1200))}, 1},
		"another port":          {[][]byte{udp4(t, client.String(), "203.0.113.20:53", initial(1, 1200))}, 1},
		"another client's port": {[][]byte{to(initial(1, 1200)), udp4(t, "192.168.50.23:5", server.String(), short)}, 1},
		"error about a server":  {[][]byte{icmp("192.168.50.23", "203.0.113.20")}, 0},
		"error about another":   {[][]byte{icmp("192.168.50.23", "8.8.8.8")}, 1},
		"error about nobody's":  {[][]byte{icmp("10.80.0.2", "203.0.113.20")}, 1},
	} {
		r, err := Check(file(t, c.frames...), allow)
		if err != nil || r.Leaked != c.leaked {
			t.Errorf("%s: %s, %v, want %d leaked", name, &r, err, c.leaked)
		}
	}
}
