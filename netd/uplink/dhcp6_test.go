//go:build linux

package uplink

import (
	"net/netip"
	"testing"

	"sekisho/netd/uplink/ndp"
)

func FuzzDatagram(f *testing.F) {
	self := netip.MustParseAddr("fe80::23")
	good := ndp.Packet(netip.MustParseAddr("fe80::1"), self, 64, 17, []byte{2, 35, 2, 34, 0, 12, 0, 0, 'd', 'h', 'c', 'p'})
	if b := datagram(good, self); string(b) != "dhcp" {
		f.Errorf("payload %q", b)
	}
	for name, b := range map[string][]byte{
		"from far away":   ndp.Packet(netip.MustParseAddr("2001:db8::1"), self, 64, 17, []byte{2, 35, 2, 34, 0, 12, 0, 0, 'd', 'h', 'c', 'p'}),
		"to another":      ndp.Packet(netip.MustParseAddr("fe80::1"), netip.MustParseAddr("fe80::24"), 64, 17, []byte{2, 35, 2, 34, 0, 12, 0, 0, 'd', 'h', 'c', 'p'}),
		"to another port": ndp.Packet(netip.MustParseAddr("fe80::1"), self, 64, 17, []byte{2, 35, 2, 35, 0, 12, 0, 0, 'd', 'h', 'c', 'p'}),
		"of wrong length": ndp.Packet(netip.MustParseAddr("fe80::1"), self, 64, 17, []byte{2, 35, 2, 34, 0, 13, 0, 0, 'd', 'h', 'c', 'p'}),
		"cut":             good[:47],
	} {
		if datagram(b, self) != nil {
			f.Errorf("taken: %s", name)
		}
	}
	f.Add(good)
	f.Fuzz(func(t *testing.T, b []byte) {
		if p := datagram(b, self); len(p) > len(b) {
			t.Fatal("longer than the packet")
		}
	})
}
