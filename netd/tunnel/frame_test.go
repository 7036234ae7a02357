package tunnel

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
)

// packet builds a packet with correct checksums by gopacket.
func packet(t testing.TB, v6, overUDP bool, seq uint32, id uint16, flags string, payload []byte) []byte {
	t.Helper()
	var ip interface {
		gopacket.NetworkLayer
		gopacket.SerializableLayer
	}
	protocol := layers.IPProtocolTCP
	if overUDP {
		protocol = layers.IPProtocolUDP
	}
	ip = &layers.IPv4{Version: 4, TTL: 64, Id: id, Protocol: protocol, SrcIP: []byte{10, 80, 0, 2}, DstIP: []byte{10, 1, 0, 80}}
	if v6 {
		ip = &layers.IPv6{Version: 6, HopLimit: 64, NextHeader: protocol, SrcIP: bytes.Repeat([]byte{0xfd}, 16), DstIP: bytes.Repeat([]byte{0xfe}, 16)}
	}
	has := func(f byte) bool { return bytes.IndexByte([]byte(flags), f) >= 0 }
	tcp := &layers.TCP{SrcPort: 1000, DstPort: 80, Seq: seq, Ack: 7, ACK: true, FIN: has('F'), PSH: has('P'), CWR: has('C'), Window: 500,
		Options: []layers.TCPOption{{OptionType: layers.TCPOptionKindNop}, {OptionType: layers.TCPOptionKindNop}, {OptionType: layers.TCPOptionKindTimestamps, OptionLength: 10, OptionData: make([]byte, 8)}}}
	udp := &layers.UDP{SrcPort: 1000, DstPort: 80}
	tcp.SetNetworkLayerForChecksum(ip)
	udp.SetNetworkLayerForChecksum(ip)
	var transport gopacket.SerializableLayer = tcp
	if overUDP {
		transport = udp
	}
	b := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(b, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, ip, transport, gopacket.Payload(payload)); err != nil {
		t.Fatal(err)
	}
	return bytes.Clone(b.Bytes())
}

func train(kind byte, size int, packet []byte) Frame {
	f := append(make(Frame, FrameHeader), packet...)
	f[0] = kind
	binary.BigEndian.PutUint16(f[2:], uint16(size))
	return f
}

// TestSplit compares every segment with what gopacket makes of it.
func TestSplit(t *testing.T) {
	payload := make([]byte, 10_001)
	for i := range payload {
		payload[i] = byte(rand.Uint32())
	}
	const size = 1348
	for _, v6 := range []bool{false, true} {
		for _, overUDP := range []bool{false, true} {
			kind := byte(train4)
			if v6 {
				kind = train6
			}
			if overUDP {
				kind = trainU
			}
			f := train(kind, size, packet(t, v6, overUDP, 1<<32-5000, 65534, "FPC", payload))
			n := 0
			if err := f.Split(make([]byte, MaxMTU), func(got []byte) {
				from := n * size
				flags := ""
				if n == 0 {
					flags = "C"
				}
				if from+size >= len(payload) {
					flags = "FP"
				}
				start := uint32(1<<32-5000) + uint32(from)
				want := packet(t, v6, overUDP, start, uint16(65534+n), flags, payload[from:min(from+size, len(payload))])
				if !bytes.Equal(got, want) {
					t.Errorf("v6 %v, udp %v, segment %d:\n%x, want\n%x", v6, overUDP, n, got[:60], want[:60])
				}
				n++
			}); err != nil || n != 8 {
				t.Errorf("v6 %v, udp %v: %d segments, %v", v6, overUDP, n, err)
			}
		}
	}
}

func TestCheck(t *testing.T) {
	good := func() Frame { return train(train4, 1348, packet(t, false, false, 1, 1, "", make([]byte, 5000))) }
	if err := good().Check(1400); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(Frame) Frame{
		"segments over the mtu": func(f Frame) Frame { binary.BigEndian.PutUint16(f[2:], 1349); return f },
		"tiny segments":         func(f Frame) Frame { binary.BigEndian.PutUint16(f[2:], 8); return f },
		"no segments":           func(f Frame) Frame { binary.BigEndian.PutUint16(f[2:], 0); return f },
		"single":                func(f Frame) Frame { f[0] = single; return f },
		"unknown kind":          func(f Frame) Frame { f[0] = 3; return f },
		"other family":          func(f Frame) Frame { f[0] = train6; return f },
		"udp":                   func(f Frame) Frame { return train(trainU, 1000, packet(t, false, true, 0, 1, "", make([]byte, 5000))) },
		"header not empty":      func(f Frame) Frame { f[5] = 1; return f },
		"cut":                   func(f Frame) Frame { return f[:len(f)-1] },
		"longer":                func(f Frame) Frame { return append(f, 0) },
		"empty":                 func(f Frame) Frame { return nil },
		"only a header":         func(f Frame) Frame { return f[:FrameHeader] },
		"a fragment":            func(f Frame) Frame { f[FrameHeader+6] = 0x20; return f },
		"not tcp":               func(f Frame) Frame { f[FrameHeader+9] = 17; return f },
		"short tcp header":      func(f Frame) Frame { f[FrameHeader+32] = 0x40; return f },
		"no payload":            func(f Frame) Frame { return train(train4, 1000, packet(t, false, false, 1, 1, "", nil)) },
	} {
		if err := spoil(good()).Check(1400); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func FuzzFrame(f *testing.F) {
	f.Add([]byte(train(train4, 1348, packet(f, false, false, 1, 1, "F", make([]byte, 3000)))))
	f.Add([]byte(train(train6, 1000, packet(f, true, false, 1, 1, "", make([]byte, 3000)))))
	f.Fuzz(func(t *testing.T, b []byte) {
		frame := Frame(b)
		if frame.Check(1400) != nil {
			return
		}
		total := 0
		if err := frame.Split(make([]byte, MaxMTU), func(p []byte) {
			if len(p) > 1400 {
				t.Fatalf("segment of %d bytes", len(p))
			}
			total += len(p)
		}); err != nil || total < len(frame.Packet()) {
			t.Fatalf("%d bytes of %d, %v", total, len(frame.Packet()), err)
		}
		if err := frame.virtio(); err != nil {
			t.Fatal(err)
		}
	})
}

func BenchmarkSplit(b *testing.B) {
	f := train(train4, 1348, packet(b, false, false, 1, 1, "", make([]byte, 60_000)))
	buf := make([]byte, MaxMTU)
	b.SetBytes(60_000)
	for b.Loop() {
		f.Split(buf, func([]byte) {})
	}
}
