package guestlink

import (
	"encoding/binary"
	"errors"
	"net/netip"
)

// Errors of ParseIP.
var (
	ErrNotIP    = errors.New("guestlink: not an IP packet")
	ErrIPLength = errors.New("guestlink: IP header disagrees with the length of the packet")
)

// ParseIP returns the addresses of an IP packet. A nil error proves that:
//
//   - the version is 4 or 6 (RFC 791, RFC 8200) and the fixed header is whole;
//   - the length in the header is the length of b, so nothing follows the packet;
//   - an IPv4 header length is at least 20 bytes and within the packet.
//
// Nothing behind the addresses is looked at.
func ParseIP(b []byte) (src, dst netip.Addr, err error) {
	if len(b) == 0 {
		return src, dst, ErrNotIP
	}
	switch b[0] >> 4 {
	case 4:
		const header = 20
		if len(b) < header {
			return src, dst, ErrNotIP
		}
		ihl := int(b[0]&0x0f) * 4
		if ihl < header || ihl > len(b) || int(binary.BigEndian.Uint16(b[2:])) != len(b) {
			return src, dst, ErrIPLength
		}
		return netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20])), nil
	case 6:
		const header = 40
		if len(b) < header {
			return src, dst, ErrNotIP
		}
		if header+int(binary.BigEndian.Uint16(b[4:])) != len(b) {
			return src, dst, ErrIPLength
		}
		return netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40])), nil
	}
	return src, dst, ErrNotIP
}
