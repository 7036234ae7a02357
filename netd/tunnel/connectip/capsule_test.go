package connectip

import (
	"bytes"
	"net/netip"
	"reflect"
	"sync"
	"testing"
)

func TestVarint(t *testing.T) {
	// The examples of RFC 9000, appendix A.1.
	for want, b := range map[uint64][]byte{
		151288809941952652: {0xc2, 0x19, 0x7c, 0x5e, 0xff, 0x14, 0xe8, 0x8c},
		494878333:          {0x9d, 0x7f, 0x3e, 0x7d},
		15293:              {0x7b, 0xbd},
		37:                 {0x25},
	} {
		if v, n := varint(b); v != want || n != len(b) {
			t.Errorf("varint(%x) = %d, %d, want %d", b, v, n, want)
		}
		if got := appendVarint(nil, want); !bytes.Equal(got, b) {
			t.Errorf("appendVarint(%d) = %x, want %x", want, got, b)
		}
		for i := range b {
			if _, n := varint(b[:i]); n != 0 {
				t.Errorf("varint(%x): %d bytes read of a truncated one", b[:i], n)
			}
		}
	}
}

func TestAddresses(t *testing.T) {
	list := []address{{7, netip.MustParsePrefix("10.80.0.2/32")}, {0, netip.MustParsePrefix("2001:db8::/64")}}
	s := newScanner(new(sync.Pool), appendAddresses(nil, capsuleAddressAssign, list...))
	kind, v, ok, err := s.next()
	if kind != capsuleAddressAssign || !ok || err != nil {
		t.Fatal(kind, ok, err)
	}
	got, err := parseAddresses(v)
	if err != nil || !reflect.DeepEqual(got, list) {
		t.Errorf("parseAddresses = %v, %v", got, err)
	}
	for name, bad := range map[string][]byte{
		"no version":          {0},
		"version 5":           {0, 5, 1, 2, 3, 4, 32},
		"short address":       {0, 4, 1, 2, 3},
		"no length":           {0, 4, 1, 2, 3, 4},
		"length 33":           {0, 4, 1, 2, 3, 4, 33},
		"bits behind length":  {0, 4, 1, 2, 3, 4, 8},
		"more than 64":        bytes.Repeat([]byte{0, 4, 1, 2, 3, 4, 32}, 65),
		"truncated last byte": {0, 4, 1, 2, 3, 4, 32, 0x40},
	} {
		if got, err := parseAddresses(bad); err == nil {
			t.Errorf("%s: parsed as %v", name, got)
		}
	}
}

// TestScannerByteByByte feeds every split of a stream with known, unknown and
// empty capsules.
func TestScannerByteByByte(t *testing.T) {
	var stream []byte
	stream = appendPacket(stream, []byte("one"))
	stream = appendCapsule(stream, 0x1f2e3d, bytes.Repeat([]byte{1}, 40<<10)) // greased
	stream = appendCapsule(stream, capsuleDatagram, nil)
	stream = appendEveryRoute(stream, true, true)
	stream = appendPacket(stream, bytes.Repeat([]byte{2}, MaxPacket))
	for _, step := range []int{1, 7, 1000, 1 << 14} {
		s := newScanner(new(sync.Pool), nil)
		var kinds []uint64
		var sizes []int
		for in := stream; len(in) > 0; {
			n := copy(s.free()[:min(step, len(s.free()))], in)
			s.fed(n)
			in = in[n:]
			for {
				kind, v, ok, err := s.next()
				if err != nil {
					t.Fatal(err)
				}
				if !ok {
					break
				}
				kinds, sizes = append(kinds, kind), append(sizes, len(v))
			}
		}
		if !reflect.DeepEqual(kinds, []uint64{0, 0, 3, 0}) || !reflect.DeepEqual(sizes, []int{4, 0, 44, MaxPacket + 1}) {
			t.Errorf("step %d: capsules %v of %v bytes", step, kinds, sizes)
		}
	}
}

func TestScannerCaps(t *testing.T) {
	for name, head := range map[string][]byte{
		"datagram": appendVarint(appendVarint(nil, capsuleDatagram), maxDatagram+1),
		"assign":   appendVarint(appendVarint(nil, capsuleAddressAssign), maxControl+1),
		"unknown":  appendVarint(appendVarint(nil, 0x4444), maxSkipped+1),
		"2^62-1":   appendVarint(appendVarint(nil, capsuleDatagram), 1<<62-1),
	} {
		if _, _, _, err := newScanner(new(sync.Pool), head).next(); err == nil {
			t.Errorf("%s: an oversized capsule was accepted", name)
		}
	}
}

func FuzzScanner(f *testing.F) {
	f.Add(appendPacket(nil, []byte("packet")), uint16(1))
	f.Add(appendAddresses(nil, capsuleAddressAssign, address{1, netip.MustParsePrefix("10.80.0.2/32")}), uint16(3))
	f.Add(appendCapsule(appendEveryRoute(nil, true, false), 0x9999, make([]byte, 300)), uint16(64))
	f.Fuzz(func(t *testing.T, in []byte, step uint16) {
		s := newScanner(new(sync.Pool), nil)
		for len(in) > 0 {
			room := s.free()
			if len(room) == 0 {
				t.Fatal("scanner is full and asks for more")
			}
			n := copy(room, in[:min(len(in), int(step)+1)])
			s.fed(n)
			in = in[n:]
			for {
				kind, v, ok, err := s.next()
				if err != nil {
					return
				}
				if !ok {
					break
				}
				if len(v) > maxTrain {
					t.Fatalf("capsule %#x of %d bytes", kind, len(v))
				}
				if kind == capsuleAddressAssign || kind == capsuleAddressRequest {
					if list, err := parseAddresses(v); err == nil {
						_, v, _, _ := newScanner(new(sync.Pool), appendAddresses(nil, kind, list...)).next()
						again, err := parseAddresses(v)
						if err != nil || len(again) != len(list) {
							t.Fatalf("%v does not survive: %v, %v", list, again, err)
						}
					}
				}
			}
		}
	})
}
