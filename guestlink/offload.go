package guestlink

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// VirtioHeaderSize is the length in bytes of the virtio-net header that a TUN
// device with IFF_VNET_HDR puts before each packet (struct virtio_net_hdr,
// Virtio 1.2 section 5.1.6; little endian on the link).
const VirtioHeaderSize = 10

// Flags and segmentation types of the header (same section).
const (
	virtioNeedsCsum = 1 // the checksum is to be completed
	virtioDataValid = 2 // the sender has checked it: never believed

	gsoNone  = 0
	gsoTCPv4 = 1
	gsoTCPv6 = 4
	gsoUDP   = 5 // VIRTIO_NET_HDR_GSO_UDP_L4
)

// Bounds of segmentation: what Linux itself makes (TCP_MIN_SND_MSS and
// UDP_MAX_SEGMENTS in include/net/tcp.h and include/linux/udp.h).
const (
	minTCPSegment  = 48
	maxUDPSegments = 128
)

// ErrOffload is a virtio-net header that does not fit its packet.
var ErrOffload = errors.New("guestlink: virtio-net header does not fit its packet")

func offloadErr(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrOffload, fmt.Sprintf(format, args...))
}

// CheckOffload reads the payload of an offload frame: header, then one packet
// of which each segment must fit mtu. It overwrites the header with one that
// says only what was checked, so that b may be given to a TUN device, and
// returns the packet. A nil error proves that:
//
//   - flags and segmentation type are known, and the type is that of the packet's
//     IP version and transport;
//   - a checksum to be completed is that of a whole TCP or UDP header which
//     directly follows the IP header of an unfragmented packet;
//   - a segment carries at least 48 bytes of TCP (UDP: at most 128 segments),
//     and with its headers no more than mtu;
//   - the length of the headers is derived from them, not taken from b.
//
// The packet itself is ParseIP's affair.
func CheckOffload(b []byte, mtu int) (packet []byte, err error) {
	if len(b) <= VirtioHeaderSize {
		return nil, offloadErr("%d bytes", len(b))
	}
	packet = b[VirtioHeaderSize:]
	flags, gso := b[0], b[1]
	size := int(binary.LittleEndian.Uint16(b[4:]))
	start := int(binary.LittleEndian.Uint16(b[6:]))
	offset := int(binary.LittleEndian.Uint16(b[8:]))
	if flags&^(virtioNeedsCsum|virtioDataValid) != 0 {
		return nil, offloadErr("flags %#x", flags)
	}
	if flags&virtioNeedsCsum == 0 {
		if gso != gsoNone {
			return nil, offloadErr("segmentation without checksum")
		}
		if len(packet) > mtu {
			return nil, offloadErr("packet of %d bytes, mtu %d", len(packet), mtu)
		}
		clear(b[:VirtioHeaderSize])
		return packet, nil
	}
	v6, proto, transport, err := transportOf(packet)
	if err != nil {
		return nil, err
	}
	header, at := 8, 6 // UDP
	if proto == protoTCP {
		if len(packet) < transport+20 {
			return nil, offloadErr("tcp header cut")
		}
		header, at = int(packet[transport+12]>>4)*4, 16
	}
	if start != transport || offset != at {
		return nil, offloadErr("checksum at %d+%d, want %d+%d", start, offset, transport, at)
	}
	if header < 8 || (proto == protoTCP && header < 20) || len(packet) < transport+header {
		return nil, offloadErr("transport header of %d bytes in a packet of %d", header, len(packet))
	}
	headers, want := transport+header, byte(gsoNone)
	payload := len(packet) - headers
	switch {
	case gso == gsoNone:
		if len(packet) > mtu {
			return nil, offloadErr("packet of %d bytes, mtu %d", len(packet), mtu)
		}
		size = 0
	case proto == protoTCP && size < minTCPSegment:
		return nil, offloadErr("tcp segment of %d bytes", size)
	case proto == protoUDP && (size == 0 || payload > size*maxUDPSegments):
		return nil, offloadErr("udp segment of %d bytes", size)
	case headers+size > mtu || payload == 0:
		return nil, offloadErr("segments of %d+%d bytes, payload %d, mtu %d", headers, size, payload, mtu)
	case proto == protoUDP:
		want = gsoUDP
	case v6:
		want = gsoTCPv6
	default:
		want = gsoTCPv4
	}
	if gso != want {
		return nil, offloadErr("segmentation type %d, want %d", gso, want)
	}
	putVirtio(b, virtioNeedsCsum, gso, headers, size, transport, at)
	return packet, nil
}

func putVirtio(b []byte, flags, gso byte, headers, size, start, offset int) {
	b[0], b[1] = flags, gso
	for i, v := range []int{headers, size, start, offset} {
		binary.LittleEndian.PutUint16(b[2+2*i:], uint16(v))
	}
}

// Plain reports whether a virtio-net header says nothing that the packet does
// not say itself: it can go without.
func Plain(header []byte) bool { return header[0]&virtioNeedsCsum == 0 && header[1] == gsoNone }

// transportOf finds the TCP or UDP header that directly follows the IP header
// of a packet that is no fragment.
func transportOf(b []byte) (v6 bool, proto byte, at int, err error) {
	switch {
	case len(b) >= 28 && b[0]>>4 == 4:
		at, proto = int(b[0]&0x0f)*4, b[9]
		if at < 20 || binary.BigEndian.Uint16(b[6:])&0x3fff != 0 {
			return false, 0, 0, offloadErr("fragment or bad header")
		}
	case len(b) >= 48 && b[0]>>4 == 6:
		v6, at, proto = true, 40, b[6]
	default:
		return false, 0, 0, offloadErr("no transport header")
	}
	if (proto != protoTCP && proto != protoUDP) || len(b) < at+8 {
		return false, 0, 0, offloadErr("transport %d", proto)
	}
	return v6, proto, at, nil
}
