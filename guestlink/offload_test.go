package guestlink

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"testing"
)

// segmentable makes an offload payload: header and a TCP or UDP packet of n
// bytes from 10.80.0.2 or 2001:db8::2.
func segmentable(v6 bool, proto, gso byte, size, n int) []byte {
	b := make([]byte, VirtioHeaderSize+n)
	p, at := b[VirtioHeaderSize:], 20
	if v6 {
		at = 40
		p[0], p[6], p[7] = 0x60, proto, 64
		binary.BigEndian.PutUint16(p[4:], uint16(n-40))
		copy(p[8:], netip.MustParseAddr("2001:db8::2").AsSlice())
		copy(p[24:], netip.MustParseAddr("2001:db8::1").AsSlice())
	} else {
		p[0], p[8], p[9] = 0x45, 64, proto
		binary.BigEndian.PutUint16(p[2:], uint16(n))
		copy(p[12:], []byte{10, 80, 0, 2, 10, 1, 0, 1})
	}
	offset := 6
	if proto == protoTCP {
		p[at+12], offset = 5<<4, 16
	}
	putVirtio(b, virtioNeedsCsum, gso, 0, size, at, offset)
	return b
}

func TestCheckOffload(t *testing.T) {
	le := binary.LittleEndian
	with := func(b []byte, f func(b []byte)) []byte { f(b); return b }
	tcp := func() []byte { return segmentable(false, protoTCP, gsoTCPv4, 1360, 60000) }
	for _, c := range []struct {
		name string
		b    []byte
		good bool
	}{
		{"tcp over v4", tcp(), true},
		{"tcp over v6", segmentable(true, protoTCP, gsoTCPv6, 1340, 60000), true},
		{"udp over v4", segmentable(false, protoUDP, gsoUDP, 1000, 60000), true},
		{"checksum only", segmentable(false, protoTCP, gsoNone, 0, 1000), true},
		{"nothing to do", with(tcp()[:VirtioHeaderSize+1400], func(b []byte) { clear(b[:10]) }), true},
		{"the longest", segmentable(false, protoTCP, gsoTCPv4, 1360, MaxPacket), true},

		{"no packet", make([]byte, 10), false},
		{"nothing", nil, false},
		{"unknown flag", with(tcp(), func(b []byte) { b[0] |= 4 }), false},
		{"segmentation without checksum", with(tcp(), func(b []byte) { b[0] = 0 }), false},
		{"ECN bit", with(tcp(), func(b []byte) { b[1] |= 0x80 }), false},
		{"old UDP fragmentation", with(tcp(), func(b []byte) { b[1] = 3 }), false},
		{"v6 type on v4", segmentable(false, protoTCP, gsoTCPv6, 1340, 6000), false},
		{"v4 type on v6", segmentable(true, protoTCP, gsoTCPv4, 1340, 6000), false},
		{"tcp type on udp", segmentable(false, protoUDP, gsoTCPv4, 1000, 6000), false},
		{"segments of 0", with(tcp(), func(b []byte) { le.PutUint16(b[4:], 0) }), false},
		{"segments of 1", with(tcp(), func(b []byte) { le.PutUint16(b[4:], 1) }), false},
		{"segments over the mtu", with(tcp(), func(b []byte) { le.PutUint16(b[4:], 1361) }), false},
		{"segments of 65535", with(tcp(), func(b []byte) { le.PutUint16(b[4:], 65535) }), false},
		{"129 udp segments", segmentable(false, protoUDP, gsoUDP, 100, 28+12801), false},
		{"checksum outside", with(tcp(), func(b []byte) { le.PutUint16(b[6:], 65000) }), false},
		{"checksum in the addresses", with(tcp(), func(b []byte) { le.PutUint16(b[6:], 12); le.PutUint16(b[8:], 0) }), false},
		{"checksum offset outside", with(tcp(), func(b []byte) { le.PutUint16(b[8:], 65535) }), false},
		{"sum that wraps", with(tcp(), func(b []byte) { le.PutUint16(b[6:], 65535); le.PutUint16(b[8:], 37) }), false},
		{"tcp header of 16", with(tcp(), func(b []byte) { b[10+32] = 4 << 4 }), false},
		{"tcp header outside", with(segmentable(false, protoTCP, gsoTCPv4, 1340, 45), func(b []byte) { b[10+32] = 15 << 4 }), false},
		{"no payload", segmentable(false, protoTCP, gsoTCPv4, 1340, 40), false},
		{"icmp", segmentable(false, 1, gsoNone, 0, 1000), false},
		{"a fragment", with(tcp(), func(b []byte) { b[10+6] = 0x20 }), false},
		{"v6 with extension", segmentable(true, 0, gsoTCPv6, 1340, 6000), false},
		{"one packet over the mtu", segmentable(false, protoTCP, gsoNone, 0, 1401), false},
		{"cut in the tcp header", segmentable(false, protoTCP, gsoTCPv4, 1340, 60000)[:10+30], false},
	} {
		before := bytes.Clone(c.b)
		p, err := CheckOffload(c.b, 1400)
		if (err == nil) != c.good || (err != nil && !errors.Is(err, ErrOffload)) {
			t.Errorf("%s: %v", c.name, err)
		}
		if err == nil && !bytes.Equal(p, before[VirtioHeaderSize:]) {
			t.Errorf("%s: the packet has changed", c.name)
		}
	}
}

// TestCheckOffloadRewrites wants a header that says nothing unchecked.
func TestCheckOffloadRewrites(t *testing.T) {
	b := segmentable(false, protoTCP, gsoTCPv4, 1360, 60000)
	b[0] |= virtioDataValid
	binary.LittleEndian.PutUint16(b[2:], 9999)
	if _, err := CheckOffload(b, 1400); err != nil {
		t.Fatal(err)
	}
	if b[0] != virtioNeedsCsum || binary.LittleEndian.Uint16(b[2:]) != 40 || Plain(b) {
		t.Errorf("header %x", b[:VirtioHeaderSize])
	}
}

func FuzzCheckOffload(f *testing.F) {
	f.Add(segmentable(false, protoTCP, gsoTCPv4, 1360, 6000), 1400)
	f.Add(segmentable(true, protoTCP, gsoTCPv6, 1340, 6000), 1400)
	f.Add(segmentable(false, protoUDP, gsoUDP, 1000, 6000), 1280)
	f.Fuzz(func(t *testing.T, b []byte, mtu int) {
		if mtu < MinMTU || mtu > MaxMTU || len(b) > VirtioHeaderSize+MaxPacket {
			return
		}
		p, err := CheckOffload(b, mtu)
		if err != nil {
			return
		}
		le := binary.LittleEndian
		hdr, size := int(le.Uint16(b[2:])), int(le.Uint16(b[4:]))
		start, offset := int(le.Uint16(b[6:])), int(le.Uint16(b[8:]))
		switch {
		case len(p) != len(b)-VirtioHeaderSize, b[0]&^1 != 0:
			t.Fatalf("header %x", b[:VirtioHeaderSize])
		case b[0] == 1 && (start < 20 || start+offset+2 > len(p) || hdr > len(p)):
			t.Fatalf("checksum at %d+%d, headers %d, packet of %d", start, offset, hdr, len(p))
		case b[1] != gsoNone && (size == 0 || hdr+size > mtu || hdr >= len(p)):
			t.Fatalf("segments of %d+%d, mtu %d", hdr, size, mtu)
		case b[1] == gsoNone && len(p) > mtu:
			t.Fatalf("packet of %d, mtu %d", len(p), mtu)
		}
		again := bytes.Clone(b)
		if _, err := CheckOffload(again, mtu); err != nil || !bytes.Equal(again, b) {
			t.Fatalf("what was checked is refused or changed: %v", err)
		}
	})
}

func TestPolicy(t *testing.T) {
	v4 := func(ihl int, field uint16, payload int) []byte {
		b := make([]byte, ihl*4+payload)
		b[0], b[9] = 0x40|byte(ihl), protoUDP
		binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
		binary.BigEndian.PutUint16(b[6:], field)
		return b
	}
	v6 := func(next byte, rest ...byte) []byte {
		b := append(make([]byte, 40), rest...)
		b[0], b[6] = 0x60, next
		binary.BigEndian.PutUint16(b[4:], uint16(len(rest)))
		return b
	}
	ext := func(next byte) []byte { return []byte{next, 0, 1, 4, 0, 0, 0, 0} }
	all := Policy{true, true, true}
	for _, c := range []struct {
		name   string
		p      Policy
		packet []byte
		want   Verdict
	}{
		{"plain v4", Policy{}, v4(5, 0x4000, 100), VerdictCarry},
		{"plain v6", Policy{}, v6(protoTCP, make([]byte, 20)...), VerdictCarry},
		{"options", Policy{Fragments: true}, v4(6, 0, 100), VerdictOptions},
		{"options by policy", all, v4(6, 0, 100), VerdictCarry},
		{"first fragment", Policy{}, v4(5, 0x2000, 104), VerdictFragment},
		{"first fragment by policy", DefaultPolicy(), v4(5, 0x2000, 104), VerdictCarry},
		{"last fragment", DefaultPolicy(), v4(5, 100, 3), VerdictCarry},
		{"fragment over the tcp flags", all, v4(5, 1, 100), VerdictFragment},
		{"fragment past the end", all, v4(5, 0x1fff, 100), VerdictFragment},
		{"fragment of odd length", all, v4(5, 0x2000, 101), VerdictFragment},
		{"empty fragment", all, v4(5, 0x2002, 0), VerdictFragment},
		{"v6 fragment", DefaultPolicy(), v6(protoFragment, append(ext(protoUDP)[:2], 0, 1, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8)...), VerdictCarry},
		{"v6 fragment refused", Policy{}, v6(protoFragment, append(ext(protoUDP)[:2], 0, 1, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8)...), VerdictFragment},
		{"v6 fragment cut", all, v6(protoFragment, 17, 0, 0), VerdictExtension},
		{"echo", DefaultPolicy(), v6(protoICMPv6, 128, 0, 0, 0, 0, 0, 0, 0), VerdictCarry},
		{"packet too big", DefaultPolicy(), v6(protoICMPv6, 2, 0, 0, 0, 0, 0, 5, 0), VerdictCarry},
		{"router solicitation", all, v6(protoICMPv6, 133, 0, 0, 0, 0, 0, 0, 0), VerdictNeighbour},
		{"router advertisement", all, v6(protoICMPv6, 134, 0, 0, 0, 0, 0, 0, 0), VerdictNeighbour},
		{"router advertisement behind a header", all, v6(60, append(ext(protoICMPv6), 134, 0, 0, 0)...), VerdictNeighbour},
		{"router advertisement in parts", all, v6(protoFragment, append(ext(protoICMPv6)[:2], 0, 1, 0, 0, 0, 0, 134, 2, 3, 4, 5, 6, 7, 8)...), VerdictNeighbour},
		{"redirect", all, v6(protoICMPv6, 137, 0, 0, 0), VerdictNeighbour},
		{"multicast listener", all, v6(protoICMPv6, 143, 0, 0, 0), VerdictNeighbour},
		{"nothing of icmp", all, v6(protoICMPv6), VerdictNeighbour},
		{"hop by hop", DefaultPolicy(), v6(0, append(ext(protoUDP), make([]byte, 8)...)...), VerdictExtension},
		{"hop by hop by policy", all, v6(0, append(ext(protoUDP), make([]byte, 8)...)...), VerdictCarry},
		{"hop by hop cut", all, v6(0, protoUDP, 9, 0, 0, 0, 0, 0, 0), VerdictExtension},
		{"routing header", all, v6(43, append(ext(protoUDP), make([]byte, 8)...)...), VerdictExtension},
		{"no next header", all, v6(59), VerdictExtension},
		{"unknown next header", all, v6(253, 1, 2, 3), VerdictExtension},
		{"endless chain", all, v6(60, bytes.Repeat(ext(60), 20)...), VerdictExtension},
	} {
		if _, _, err := ParseIP(c.packet); err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		if got := c.p.Judge(c.packet); got != c.want {
			t.Errorf("%s: %d, want %d", c.name, got, c.want)
		}
	}
	for s, want := range map[string]Policy{"": {}, "fragments": DefaultPolicy(), "options,extensions,fragments": all} {
		if p, err := ParsePolicy(s); err != nil || p != want {
			t.Errorf("policy %q: %+v, %v", s, p, err)
		}
	}
	if _, err := ParsePolicy("everything"); err == nil {
		t.Error("an unknown word went through")
	}
}

func FuzzPacket(f *testing.F) {
	f.Add(segmentable(false, protoTCP, 0, 0, 100)[10:], byte(0))
	f.Add(segmentable(true, protoUDP, 0, 0, 100)[10:], byte(7))
	f.Fuzz(func(t *testing.T, b []byte, policy byte) {
		if _, _, err := ParseIP(b); err != nil {
			return
		}
		p := Policy{policy&1 != 0, policy&2 != 0, policy&4 != 0}
		if v := p.Judge(b); v == VerdictCarry && (Policy{true, true, true}).Judge(b) != VerdictCarry {
			t.Fatal("a stricter policy carries more")
		}
		if k := FlowKey(nil, b); len(k) > 64 {
			t.Fatalf("flow key of %d bytes", len(k))
		}
	})
}

func FuzzMessages(f *testing.F) {
	f.Add(byte(TypeTime), []byte(`{"unix_nano":1795305600000000000}`))
	f.Add(byte(TypePower), []byte(`{"id":1,"action":"suspend"}`))
	f.Add(byte(TypeProbe), make([]byte, 9))
	f.Add(byte(TypeHello), []byte(helloMagic+"\x00\x02\x00\x00\x00\x0f\x00\x01\x00\x00\x00\x01"))
	f.Fuzz(func(t *testing.T, typ byte, b []byte) {
		var again []byte
		var err error
		switch Type(typ) {
		case TypeTime:
			if v, perr := ParseTime(b); perr == nil {
				again, err = AppendTime(nil, v)
			}
		case TypePower:
			if v, perr := ParsePower(b); perr == nil {
				again, err = AppendPower(nil, v)
			}
		case TypeProbe:
			if v, perr := ParseProbe(b); perr == nil {
				again = AppendProbe(nil, v)
			}
		case TypeConfig:
			if v, perr := ParseConfig(b); perr == nil {
				again, err = AppendConfig(nil, v)
			}
		case TypeStatus:
			if v, perr := ParseStatus(b); perr == nil {
				again, err = AppendStatus(nil, v)
			}
		case TypeHello:
			if v, perr := ParseHello(b); perr == nil {
				if a, aerr := Agree(Hello{Version: Version, Batch: MaxBatch, Queues: 1}, v); aerr == nil && (a.Batch < MinBatch || a.Batch > MaxBatch || a.Queues != 1) {
					t.Fatalf("agreed %+v", a)
				}
			}
		}
		if err != nil || len(again) > headerSize+MaxControl {
			t.Fatalf("what was read cannot be written: %d bytes, %v", len(again), err)
		}
	})
}
