package tunnel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
)

// FrameHeader is the length in bytes of what stands before a frame's packet:
// as long as the virtio-net header (virtio 1.2, section 5.1.6, without
// num_buffers), which takes its place on the way into a TUN device.
const FrameHeader = 10

// Kinds of frames: virtio-net's gso_type (virtio 1.2, section 5.1.6).
const (
	single = 0 // one packet
	train4 = 1 // TCP over IPv4
	train6 = 4 // TCP over IPv6
	trainU = 5 // UDP over either
)

// minSegment is the least payload of a train's segments in bytes: what 576
// bytes of IPv4 leave after the longest headers. A smaller one would make one
// frame thousands of packets.
const minSegment = 576 - 60 - 60

// ErrFrame is the error for a frame that is not what Frame says.
var ErrFrame = errors.New("malformed frame")

// Frame is an inner packet behind a header of FrameHeader bytes:
//
//	kind (1 byte) | 0 (1) | segment size (2, big endian) | 0 (6)
//
// A train is a run of TCP or UDP segments of one flow, as segmentation offload
// makes and takes them: one IP and one transport header, then the payload of all
// segments, each but the last of the segment size. Its transport checksum means
// nothing. In any other frame all of the header is 0. Trains of UDP do not leave
// the host: not every kernel takes them.
type Frame []byte

// Packet returns the IP packet.
func (f Frame) Packet() []byte { return f[FrameHeader:] }

// Train reports whether f is a train.
func (f Frame) Train() bool { return f[0] != single }

// TCP reports whether f is a train of TCP segments.
func (f Frame) TCP() bool { return f[0] == train4 || f[0] == train6 }

func (f Frame) segment() int { return int(binary.BigEndian.Uint16(f[2:])) }

// Transport protocols (IANA "Assigned Internet Protocol Numbers").
const (
	tcp = 6
	udp = 17
)

// headers returns the lengths of IP header and both headers of a whole,
// unfragmented packet that f, a train, must hold (RFC 791, section 3.1; RFC
// 8200, section 3; RFC 9293, section 3.1; RFC 768).
func (f Frame) headers() (ip, both int, err error) {
	p := f.Packet()
	protocol := byte(tcp)
	if f[0] == trainU {
		protocol = udp
	}
	switch {
	case f[0] != train6 && len(p) >= 28 && p[0]>>4 == 4:
		ip = int(p[0]&15) * 4
		if ip < 20 || int(binary.BigEndian.Uint16(p[2:])) != len(p) || p[9] != protocol || binary.BigEndian.Uint16(p[6:])&0x3fff != 0 {
			return 0, 0, ErrFrame
		}
	case f[0] != train4 && len(p) >= 48 && p[0]>>4 == 6:
		ip = 40
		if int(binary.BigEndian.Uint16(p[4:])) != len(p)-40 || p[6] != protocol {
			return 0, 0, ErrFrame
		}
	default:
		return 0, 0, ErrFrame
	}
	both = ip + 8
	if protocol == tcp {
		if len(p) < ip+20 || p[ip+12]>>4 < 5 {
			return 0, 0, ErrFrame
		}
		both = ip + int(p[ip+12]>>4)*4
	}
	if both >= len(p) {
		return 0, 0, ErrFrame
	}
	return ip, both, nil
}

// Check judges a frame from a peer: a nil error proves that f is a train of TCP
// whose segments are packets of at most mtu bytes.
func (f Frame) Check(mtu int) error {
	if len(f) < FrameHeader || len(f) > FrameHeader+1<<16-1 {
		return fmt.Errorf("%w: %d bytes", ErrFrame, len(f))
	}
	_, both, err := f.headers()
	if err != nil || !f.TCP() {
		return ErrFrame
	}
	if s := f.segment(); s < minSegment || both+s > mtu || f[1] != 0 || [6]byte(f[4:10]) != [6]byte{} {
		return fmt.Errorf("%w: segments of %d bytes", ErrFrame, s)
	}
	return nil
}

// Split calls emit with each segment of a train as a whole packet, or with the
// one packet of any other frame. buf is room for one packet; what is emitted
// is valid until emit returns.
func (f Frame) Split(buf []byte, emit func(packet []byte)) error {
	if !f.Train() {
		emit(f.Packet())
		return nil
	}
	ip, both, err := f.headers()
	if err != nil {
		return err
	}
	p, size := f.Packet(), f.segment()
	if size == 0 || both+size > len(buf) {
		return fmt.Errorf("%w: segments of %d bytes", ErrFrame, size)
	}
	for i, from := 0, both; from < len(p); i, from = i+1, from+size {
		payload := p[from:min(from+size, len(p))]
		s := buf[:both+len(payload)]
		copy(s, p[:both])
		copy(s[both:], payload)
		if s[0]>>4 == 4 {
			binary.BigEndian.PutUint16(s[2:], uint16(len(s)))
			binary.BigEndian.PutUint16(s[4:], binary.BigEndian.Uint16(p[4:])+uint16(i))
			sumHeader(s, ip)
		} else {
			binary.BigEndian.PutUint16(s[4:], uint16(len(s)-40))
		}
		sum := 6 // of the checksum field in the header
		if f[0] == trainU {
			binary.BigEndian.PutUint16(s[ip+4:], uint16(len(s)-ip))
		} else {
			sum = 16
			segment(s[ip:], uint32(i*size), i == 0, from+size >= len(p))
		}
		sumTransport(s, ip, sum)
		emit(s)
	}
	return nil
}

// segment makes t, a copy of a train's TCP header, that of the segment whose
// payload begins offset bytes into the train's.
func segment(t []byte, offset uint32, first, last bool) {
	const fin, psh, cwr = 0x01, 0x08, 0x80
	binary.BigEndian.PutUint32(t[4:], binary.BigEndian.Uint32(t[4:])+offset)
	if !last {
		t[13] &^= fin | psh
	}
	if !first {
		t[13] &^= cwr // RFC 3168, section 6.1.2: once per window
	}
}

// virtio turns f into what a TUN device takes: the header in the machine's
// byte order, and the checksum left to the kernel. Whatever a peer wrote into
// the checksums is replaced.
func (f Frame) virtio() error {
	ip, both, err := f.headers()
	if err != nil {
		return err
	}
	p := f.Packet()
	size := f.segment()
	sumHeader(p, ip)
	binary.BigEndian.PutUint16(p[ip+16:], fold(pseudo(p, ip, tcp)))
	f[0], f[1] = 1, f[0] // VIRTIO_NET_HDR_F_NEEDS_CSUM, gso_type
	for i, v := range []int{both, size, ip, 16} {
		binary.NativeEndian.PutUint16(f[2+2*i:], uint16(v))
	}
	return nil
}

// fromVirtio turns what a TUN device gave into a frame, and finishes the
// checksum of a packet whose sender left it to the device.
func (f Frame) fromVirtio() error {
	flags, kind := f[0], f[1]
	size, start, offset := binary.NativeEndian.Uint16(f[4:]), int(binary.NativeEndian.Uint16(f[6:])), int(binary.NativeEndian.Uint16(f[8:]))
	clear(f[:FrameHeader])
	p := f.Packet()
	switch kind {
	case single:
		if flags&1 == 0 {
			return nil
		}
		if start+offset+2 > len(p) {
			return fmt.Errorf("%w: checksum beyond the packet", ErrFrame)
		}
		// The field holds the sum over the pseudo-header.
		sum := ^fold(sum64(p[start:], 0))
		if sum == 0 {
			sum = 0xffff // for UDP 0 means none (RFC 768)
		}
		binary.BigEndian.PutUint16(p[start+offset:], sum)
		return nil
	case train4, train6, trainU:
		f[0] = kind
		binary.BigEndian.PutUint16(f[2:], size)
		if _, _, err := f.headers(); err != nil {
			return err
		}
		return nil
	}
	return fmt.Errorf("%w: kind %d", ErrFrame, kind)
}

// sumHeader fills in the checksum of an IPv4 header of n bytes.
func sumHeader(p []byte, n int) {
	if p[0]>>4 != 4 {
		return
	}
	p[10], p[11] = 0, 0
	binary.BigEndian.PutUint16(p[10:], ^fold(sum64(p[:n], 0)))
}

// sumTransport fills in the checksum at offset at behind the IP header of n bytes.
func sumTransport(p []byte, n, at int) {
	protocol := uint64(tcp)
	if at == 6 {
		protocol = udp
	}
	p[n+at], p[n+at+1] = 0, 0
	sum := ^fold(sum64(p[n:], pseudo(p, n, protocol)))
	if sum == 0 && protocol == udp {
		sum = 0xffff // 0 means none (RFC 768)
	}
	binary.BigEndian.PutUint16(p[n+at:], sum)
}

// pseudo sums the pseudo-header of the packet p (RFC 9293, section 3.1; RFC
// 8200, section 8.1).
func pseudo(p []byte, ip int, protocol uint64) uint64 {
	addresses := p[12:20]
	if p[0]>>4 == 6 {
		addresses = p[8:40]
	}
	return sum64(addresses, protocol+uint64(len(p)-ip))
}

// sum64 adds b in ones' complement, as 64-bit words that fold brings down
// (RFC 1071, section 2).
func sum64(b []byte, sum uint64) uint64 {
	var carry uint64
	for len(b) >= 32 {
		sum, carry = bits.Add64(sum, binary.BigEndian.Uint64(b), carry)
		sum, carry = bits.Add64(sum, binary.BigEndian.Uint64(b[8:]), carry)
		sum, carry = bits.Add64(sum, binary.BigEndian.Uint64(b[16:]), carry)
		sum, carry = bits.Add64(sum, binary.BigEndian.Uint64(b[24:]), carry)
		b = b[32:]
	}
	for len(b) >= 8 {
		sum, carry = bits.Add64(sum, binary.BigEndian.Uint64(b), carry)
		b = b[8:]
	}
	var last [8]byte
	copy(last[:], b)
	sum, carry = bits.Add64(sum, binary.BigEndian.Uint64(last[:]), carry)
	sum, carry = bits.Add64(sum, 0, carry)
	return sum + carry
}

// fold brings a sum down to 16 bits.
func fold(sum uint64) uint16 {
	for sum>>16 != 0 {
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}
