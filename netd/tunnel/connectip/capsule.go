package connectip

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"sekisho/netd/tunnel"
)

// Capsule types (RFC 9297, section 3.5; RFC 9484, section 4.7).
const (
	capsuleDatagram           = 0x00
	capsuleAddressAssign      = 0x01
	capsuleAddressRequest     = 0x02
	capsuleRouteAdvertisement = 0x03
	// capsulePadding is one of the types that everybody skips (RFC 9297, section
	// 5.4: 0x29 * N + 0x17).
	capsulePadding = 0x17
	// capsuleTrain is ours, sent only to a peer that said it understands it
	// (trainsParameter): a tunnel.Frame that is a train.
	capsuleTrain = 0x3e6b1545
)

const (
	// MaxPacket is the largest inner packet in bytes.
	MaxPacket = 9000
	// maxDatagram is the largest value of a DATAGRAM capsule: context id and packet.
	maxDatagram = MaxPacket + 8
	// maxTrain is the largest value of a train's capsule.
	maxTrain = tunnel.FrameHeader + 1<<16 - 1
	// maxControl is the largest value of any other known capsule.
	maxControl = 2048
	// maxSkipped is the largest value of an unknown capsule. RFC 9297, section
	// 3.2, asks to skip them; a peer that announces more than this is not worth it.
	maxSkipped = 1 << 20
	// maxEntries bounds the addresses or routes in one capsule.
	maxEntries = 64
)

var errTruncated = errors.New("truncated")

// appendVarint appends v as a QUIC variable-length integer (RFC 9000, section 16).
func appendVarint(b []byte, v uint64) []byte {
	switch {
	case v < 1<<6:
		return append(b, byte(v))
	case v < 1<<14:
		return binary.BigEndian.AppendUint16(b, uint16(v)|1<<14)
	case v < 1<<30:
		return binary.BigEndian.AppendUint32(b, uint32(v)|2<<30)
	}
	return binary.BigEndian.AppendUint64(b, v|3<<62)
}

// varint reads one from the front of b; n is 0 if b is too short.
func varint(b []byte) (v uint64, n int) {
	if len(b) == 0 {
		return 0, 0
	}
	n = 1 << (b[0] >> 6)
	if len(b) < n {
		return 0, 0
	}
	v = uint64(b[0] & 0x3f)
	for _, c := range b[1:n] {
		v = v<<8 | uint64(c)
	}
	return v, n
}

// appendPacket appends packet as a DATAGRAM capsule with context id 0 (RFC
// 9484, section 6).
func appendPacket(b, packet []byte) []byte {
	b = append(b, capsuleDatagram)
	b = appendVarint(b, uint64(len(packet)+1))
	b = append(b, 0)
	return append(b, packet...)
}

// capsuleOverhead bounds what stands before a packet or a train, in bytes.
const capsuleOverhead = 4 + 4 + 1

func appendCapsule(b []byte, kind uint64, value []byte) []byte {
	b = appendVarint(b, kind)
	b = appendVarint(b, uint64(len(value)))
	return append(b, value...)
}

// address is one entry of an ADDRESS_ASSIGN or ADDRESS_REQUEST capsule (RFC
// 9484, sections 4.7.1 and 4.7.2).
type address struct {
	ID     uint64 // request id; 0 in an assignment that nobody asked for
	Prefix netip.Prefix
}

func appendAddresses(b []byte, kind uint64, list ...address) []byte {
	var v []byte
	for _, a := range list {
		v = appendVarint(v, a.ID)
		v = append(v, version(a.Prefix.Addr()))
		v = append(v, a.Prefix.Addr().AsSlice()...)
		v = append(v, byte(a.Prefix.Bits()))
	}
	return appendCapsule(b, kind, v)
}

func parseAddresses(v []byte) ([]address, error) {
	var list []address
	for len(v) > 0 {
		id, n := varint(v)
		if n == 0 {
			return nil, fmt.Errorf("address capsule: %w", errTruncated)
		}
		addr, rest, err := parseAddress(v[n:])
		if err != nil {
			return nil, fmt.Errorf("address capsule: %w", err)
		}
		if len(rest) == 0 {
			return nil, fmt.Errorf("address capsule: %w", errTruncated)
		}
		p := netip.PrefixFrom(addr, int(rest[0]))
		if !p.IsValid() || p.Masked() != p {
			return nil, fmt.Errorf("address capsule: prefix %s/%d: want no bits beyond the length", addr, rest[0])
		}
		if list = append(list, address{id, p}); len(list) > maxEntries {
			return nil, fmt.Errorf("address capsule: over %d entries", maxEntries)
		}
		v = rest[1:]
	}
	return list, nil
}

// parseAddress reads IP version and address from the front of v.
func parseAddress(v []byte) (netip.Addr, []byte, error) {
	if len(v) == 0 {
		return netip.Addr{}, nil, errTruncated
	}
	size := 4
	switch v[0] {
	case 4:
	case 6:
		size = 16
	default:
		return netip.Addr{}, nil, fmt.Errorf("ip version %d", v[0])
	}
	if len(v) < 1+size {
		return netip.Addr{}, nil, errTruncated
	}
	a, _ := netip.AddrFromSlice(v[1 : 1+size])
	return a, v[1+size:], nil
}

func version(a netip.Addr) byte {
	if a.Is4() {
		return 4
	}
	return 6
}

// appendEveryRoute appends a ROUTE_ADVERTISEMENT capsule (RFC 9484, section
// 4.7.3) for every address of the families given, and every protocol.
func appendEveryRoute(b []byte, v4, v6 bool) []byte {
	var v []byte
	if v4 {
		v = append(v, 4, 0, 0, 0, 0, 255, 255, 255, 255, 0)
	}
	if v6 {
		v = append(append(v, 6), make([]byte, 16)...)
		v = append(append(v, bytes.Repeat([]byte{255}, 16)...), 0)
	}
	return appendCapsule(b, capsuleRouteAdvertisement, v)
}

// scanner cuts a byte stream into capsules. Its buffer is there only while
// bytes are in it.
type scanner struct {
	pool       *sync.Pool // of *[scanSize]byte
	buf        *[scanSize]byte
	start, end int
	skip       uint64 // bytes of an unknown capsule still to come
}

const (
	// record is the most that one TLS read returns (RFC 8446, section 5.1).
	record = 1 << 14
	// scanSize is room for the longest capsule and a record more.
	scanSize = maxTrain + 16 + record
)

func newScanner(pool *sync.Pool, buffered []byte) *scanner {
	s := &scanner{pool: pool}
	s.end = copy(s.free(), buffered)
	return s
}

// free returns where the next bytes of the stream go; fed says how many came.
// Values that next returned are no longer valid.
func (s *scanner) free() []byte {
	if s.buf == nil {
		s.buf, _ = s.pool.Get().(*[scanSize]byte)
		if s.buf == nil {
			s.buf = new([scanSize]byte)
		}
	}
	s.end = copy(s.buf[:], s.buf[s.start:s.end])
	s.start = 0
	return s.buf[s.end:]
}

func (s *scanner) fed(n int) { s.end += n }

// rest gives the buffer back if nothing is in it.
func (s *scanner) rest() {
	if s.buf != nil && s.start == s.end {
		s.pool.Put(s.buf)
		s.buf, s.start, s.end = nil, 0, 0
	}
}

// next returns the next whole capsule of a known type, and ok = false if the
// stream must be read further. The value is valid until the next call of free.
// An error is final.
func (s *scanner) next() (kind uint64, value []byte, ok bool, err error) {
	for {
		if s.skip > 0 {
			n := min(s.skip, uint64(s.end-s.start))
			s.start += int(n)
			if s.skip -= n; s.skip > 0 {
				return 0, nil, false, nil
			}
		}
		if s.buf == nil {
			return 0, nil, false, nil
		}
		b := s.buf[s.start:s.end]
		kind, n := varint(b)
		if n == 0 {
			return 0, nil, false, nil
		}
		size, m := varint(b[n:])
		if m == 0 {
			return 0, nil, false, nil
		}
		limit := uint64(maxControl)
		switch kind {
		case capsuleDatagram:
			limit = maxDatagram
		case capsuleTrain:
			limit = maxTrain
		case capsuleAddressAssign, capsuleAddressRequest, capsuleRouteAdvertisement:
		default:
			if size > maxSkipped {
				return 0, nil, false, fmt.Errorf("unknown capsule %#x of %d bytes, at most %d", kind, size, maxSkipped)
			}
			s.start += n + m
			s.skip = size
			continue
		}
		if size > limit {
			return 0, nil, false, fmt.Errorf("capsule %#x of %d bytes, at most %d", kind, size, limit)
		}
		if uint64(len(b)-n-m) < size {
			return 0, nil, false, nil
		}
		from := s.start + n + m
		s.start = from + int(size)
		return kind, s.buf[from:s.start], true, nil
	}
}
