package piv

import (
	"encoding/binary"
	"errors"
)

// MaxCommand bounds a command APDU in bytes (ISO 7816-4, section 5.1).
const MaxCommand = 7 + 65535 + 2

// Command is a command APDU.
type Command struct {
	CLA, INS, P1, P2 byte
	Data             []byte
	Ne               int // bytes of response that the other end can take; 0 when it names none
}

var errAPDU = errors.New("malformed command APDU")

// ParseCommand reads a command APDU in any of the seven forms of ISO 7816-4,
// section 5.1, short and extended.
func ParseCommand(b []byte) (Command, error) {
	if len(b) < 4 || len(b) > MaxCommand {
		return Command{}, errAPDU
	}
	c := Command{CLA: b[0], INS: b[1], P1: b[2], P2: b[3]}
	body := b[4:]
	switch {
	case len(body) == 0: // case 1
		return c, nil
	case len(body) == 1: // case 2, short
		c.Ne = expected(int(body[0]), 256)
		return c, nil
	case body[0] != 0: // short
		n := int(body[0])
		if len(body) != 1+n && len(body) != 2+n {
			return Command{}, errAPDU
		}
		c.Data = body[1 : 1+n]
		if len(body) == 2+n {
			c.Ne = expected(int(body[1+n]), 256)
		}
		return c, nil
	case len(body) == 3: // case 2, extended
		c.Ne = expected(int(binary.BigEndian.Uint16(body[1:])), 65536)
		return c, nil
	case len(body) < 3:
		return Command{}, errAPDU
	}
	n := int(binary.BigEndian.Uint16(body[1:]))
	if n == 0 || len(body) != 3+n && len(body) != 5+n {
		return Command{}, errAPDU
	}
	c.Data = body[3 : 3+n]
	if len(body) == 5+n {
		c.Ne = expected(int(binary.BigEndian.Uint16(body[3+n:])), 65536)
	}
	return c, nil
}

// expected gives a Le field its meaning: zero is the most.
func expected(le, most int) int {
	if le == 0 {
		return most
	}
	return le
}

// Status is a status word (ISO 7816-4, section 5.6; SP 800-73-4 part 2,
// table 3 and the tables of each command).
type Status uint16

// The status words that this card answers. Those with a count add it.
const (
	OK                Status = 0x9000
	MoreData          Status = 0x6100 // with the bytes that remain, 0 for 256 and more
	VerifyFailed      Status = 0x63c0 // with the tries that are left
	ExecutionError    Status = 0x6400
	MemoryFailure     Status = 0x6581
	WrongLength       Status = 0x6700
	ChannelUnknown    Status = 0x6881
	NoSecureMessaging Status = 0x6882
	ChainExpected     Status = 0x6883
	SecurityStatus    Status = 0x6982
	Blocked           Status = 0x6983
	ConditionsOfUse   Status = 0x6985
	WrongData         Status = 0x6a80
	NotFound          Status = 0x6a82
	WrongParameters   Status = 0x6a86
	NoReference       Status = 0x6a88
	UnknownINS        Status = 0x6d00
	UnknownCLA        Status = 0x6e00
)

// append appends the status word to a response.
func (s Status) append(b []byte) []byte { return binary.BigEndian.AppendUint16(b, uint16(s)) }

// tlv appends a BER-TLV of one of this card's tags, one to three bytes.
func tlv(b []byte, tag uint32, value []byte) []byte {
	switch {
	case tag > 0xffff:
		b = append(b, byte(tag>>16), byte(tag>>8), byte(tag))
	case tag > 0xff:
		b = append(b, byte(tag>>8), byte(tag))
	default:
		b = append(b, byte(tag))
	}
	switch n := len(value); {
	case n < 0x80:
		b = append(b, byte(n))
	case n < 0x100:
		b = append(b, 0x81, byte(n))
	default:
		b = append(b, 0x82, byte(n>>8), byte(n)) // no object is over 64 KiB
	}
	return append(b, value...)
}

// nextTLV takes the first BER-TLV with a tag of one byte off b. ok is false
// when there is none, or when it is longer than b.
func nextTLV(b []byte) (tag byte, value, rest []byte, ok bool) {
	if len(b) < 2 {
		return 0, nil, nil, false
	}
	tag, n, b := b[0], int(b[1]), b[2:]
	switch {
	case n < 0x80:
	case n == 0x81 && len(b) >= 1:
		n, b = int(b[0]), b[1:]
	case n == 0x82 && len(b) >= 2:
		n, b = int(binary.BigEndian.Uint16(b)), b[2:]
	default:
		return 0, nil, nil, false
	}
	if n > len(b) {
		return 0, nil, nil, false
	}
	return tag, b[:n], b[n:], true
}
