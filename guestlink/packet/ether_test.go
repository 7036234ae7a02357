package packet

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net/netip"
	"os"
	"testing"
)

// scriptTAP is a TAP device that gives frames and keeps what is written.
type scriptTAP struct {
	frames [][]byte
	wrote  [][]byte
}

func (s *scriptTAP) Read(b []byte) (int, error) {
	if len(s.frames) == 0 {
		return 0, io.EOF
	}
	n := copy(b, s.frames[0])
	s.frames = s.frames[1:]
	return n, nil
}

func (s *scriptTAP) Write(b []byte) (int, error) {
	s.wrote = append(s.wrote, bytes.Clone(b))
	return len(b), nil
}

func (s *scriptTAP) Close() error { return nil }

func ether(typ uint16, body []byte) []byte {
	f := []byte{0x02, 0x73, 0x65, 0x6b, 0x69, 0x01, 0x00, 0xff, 1, 2, 3, 4}
	return append(binary.BigEndian.AppendUint16(f, typ), body...)
}

func arp(op byte, sender, target string) []byte {
	b := []byte{0, 1, 8, 0, 6, 4, 0, op, 0x00, 0xff, 1, 2, 3, 4}
	b = append(append(b, netip.MustParseAddr(sender).AsSlice()...), make([]byte, 6)...)
	return append(b, netip.MustParseAddr(target).AsSlice()...)
}

func solicit(source, target string) []byte {
	b := make([]byte, 64)
	b[0], b[5], b[6], b[7], b[40] = 0x60, 24, 58, 255, 135
	copy(b[8:], netip.MustParseAddr(source).AsSlice())
	copy(b[24:], netip.MustParseAddr("ff02::1:ff00:1").AsSlice())
	copy(b[48:], netip.MustParseAddr(target).AsSlice())
	return b
}

func TestEtherDevice(t *testing.T) {
	packet := ipv4("10.80.0.2", "10.1.0.1", 40)
	tap := &scriptTAP{frames: [][]byte{
		{1, 2, 3}, ether(0x88cc, make([]byte, 50)), // cut; LLDP
		ether(etherARP, arp(1, "10.80.0.2", "10.1.0.1")),
		ether(etherARP, arp(1, "0.0.0.0", "10.80.0.2")),   // probe for duplicates
		ether(etherARP, arp(1, "10.80.0.2", "10.80.0.2")), // gratuitous
		ether(etherARP, arp(2, "10.80.0.2", "10.1.0.1")),  // answer
		ether(etherARP, arp(1, "10.80.0.2", "10.1.0.1")[:20]),
		ether(etherIPv6, solicit("2001:db8::2", "2001:db8::1")),
		ether(etherIPv6, solicit("::", "2001:db8::2")),                    // probe for duplicates: passed on, and dropped by rule
		ether(etherIPv4, append(bytes.Clone(packet), make([]byte, 6)...)), // filled up to 60 bytes
	}}
	d := newEtherDevice(tap)
	buf := make([]byte, 2000)
	if n, err := d.Read(buf); err != nil || n != 64 || buf[6] != 58 {
		t.Fatalf("%d bytes, %v; want the probe of IPv6", n, err)
	}
	if n, err := d.Read(buf); err != nil || !bytes.Equal(buf[:n], packet) {
		t.Fatalf("%x, %v", buf[:n], err)
	}
	if len(tap.wrote) != 2 {
		t.Fatalf("%d answers, want 2", len(tap.wrote))
	}
	a := tap.wrote[0]
	if !bytes.Equal(a[:6], []byte{0x00, 0xff, 1, 2, 3, 4}) || a[21] != 2 || !bytes.Equal(a[22:28], peerMAC[:]) ||
		netip.AddrFrom4([4]byte(a[28:32])) != netip.MustParseAddr("10.1.0.1") {
		t.Errorf("arp answer %x", a)
	}
	na := tap.wrote[1][etherHeader:]
	if na[40] != 136 || netip.AddrFrom16([16]byte(na[8:24])) != netip.MustParseAddr("2001:db8::1") || !bytes.Equal(na[66:72], peerMAC[:]) {
		t.Errorf("neighbour advertisement %x", na)
	}
	sum := binary.BigEndian.Uint16(na[42:])
	na[42], na[43] = 0, 0
	if icmp6Checksum(na) != sum {
		t.Error("checksum")
	}
	if _, err := d.Write(packet); err != nil || !bytes.Equal(tap.wrote[2], append(append([]byte{0x00, 0xff, 1, 2, 3, 4}, peerMAC[:]...), append([]byte{8, 0}, packet...)...)) {
		t.Errorf("%x, %v", tap.wrote[2], err)
	}
	if _, err := d.Read(buf); err != io.EOF {
		t.Errorf("at the end: %v", err)
	}
}

func FuzzEther(f *testing.F) {
	f.Add(ether(etherARP, arp(1, "10.80.0.2", "10.1.0.1")))
	f.Add(ether(etherIPv6, solicit("2001:db8::2", "2001:db8::1")))
	f.Fuzz(func(t *testing.T, frame []byte) {
		d := newEtherDevice(&scriptTAP{frames: [][]byte{frame}})
		buf := make([]byte, 1<<16)
		if n, err := d.Read(buf); err == nil && (n == 0 || n > len(frame)-etherHeader) {
			t.Fatalf("%d bytes of %d", n, len(frame))
		}
	})
}

// deaf is a device whose Close does not end a Read.
type deaf struct{ never chan struct{} }

func (d deaf) Read([]byte) (int, error)    { <-d.never; return 0, io.EOF }
func (d deaf) Write(b []byte) (int, error) { return len(b), nil }
func (d deaf) Close() error                { <-d.never; return nil }

func TestReleasedReader(t *testing.T) {
	d := deaf{make(chan struct{})}
	r := newReleasedReader(d, 2000)
	ended := make(chan error)
	go func() { _, err := r.Read(make([]byte, 10)); ended <- err }()
	r.Close()
	if err := <-ended; !errors.Is(err, os.ErrClosed) {
		t.Errorf("read ended by %v", err)
	}
	close(d.never)
	mem := newMemDevice()
	r = newReleasedReader(mem, 2000)
	for i := range 1000 { // more than it has buffers
		mem.in <- ipv4("10.80.0.2", "10.1.0.1", 20+i)
		if n, err := r.Read(make([]byte, 2000)); err != nil || n != 20+i {
			t.Fatalf("%d bytes, %v", n, err)
		}
	}
}
