// Package vscard speaks VSCARD, the protocol between QEMU's card slot
// (ccid-card-passthru) and whoever is the card. It frames messages and runs
// the card's end of one connection; what the card answers is another's.
//
// The protocol is that of libcacard's vscard_common.h: a header of three
// big-endian words (type, reader, length) and a body. QEMU keeps 64 KiB for a
// message.
package vscard

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Type is what a message is.
type Type uint32

// The message types.
const (
	Init          Type = 1 // magic, version, capabilities
	Error         Type = 2 // answer to ReaderAdd, ATR, CardRemove; code 0 is success
	ReaderAdd     Type = 3
	ReaderRemove  Type = 4
	ATR           Type = 5 // a card is in the reader
	CardRemove    Type = 6
	APDU          Type = 7 // command to the card, response from it
	Flush         Type = 8
	FlushComplete Type = 9
)

const (
	magic   = 0x56534344 // "VSCD"
	version = 2
	noID    = 0xffffffff // reader not yet known

	headerSize = 12
	// MaxBody bounds a message's body in bytes: the longest extended command,
	// 7 bytes of head, 65535 of data and 2 of Le (ISO 7816-4, section 5.1).
	// QEMU's own buffer is smaller than that by a few bytes.
	MaxBody = 7 + 65535 + 2
	// maxATR is ISO 7816-3's bound, section 8.1, and QEMU's.
	maxATR = 33
)

// Message is one message of either side.
type Message struct {
	Type   Type
	Reader uint32
	Body   []byte
}

// Read reads one message. It allocates no more than MaxBody. io.EOF means that
// the other end closed between two messages.
func Read(r io.Reader) (Message, error) {
	var h [headerSize]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		if errors.Is(err, io.EOF) {
			return Message{}, io.EOF
		}
		return Message{}, fmt.Errorf("vscard: header: %w", err)
	}
	m := Message{Type: Type(binary.BigEndian.Uint32(h[0:])), Reader: binary.BigEndian.Uint32(h[4:])}
	n := binary.BigEndian.Uint32(h[8:])
	if n > MaxBody {
		return Message{}, fmt.Errorf("vscard: message type %d of %d bytes, at most %d", m.Type, n, MaxBody)
	}
	m.Body = make([]byte, n)
	if _, err := io.ReadFull(r, m.Body); err != nil {
		return Message{}, fmt.Errorf("vscard: body of %d bytes: %w", n, noEOF(err))
	}
	return m, nil
}

// noEOF makes an end inside a message an unexpected one.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// Append appends m's encoding to b.
func (m Message) Append(b []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(m.Type))
	b = binary.BigEndian.AppendUint32(b, m.Reader)
	b = binary.BigEndian.AppendUint32(b, uint32(len(m.Body)))
	return append(b, m.Body...)
}

// initBody is the body of Init without capabilities.
func initBody() []byte {
	b := binary.BigEndian.AppendUint32(nil, magic)
	b = binary.BigEndian.AppendUint32(b, version)
	return binary.BigEndian.AppendUint32(b, 0)
}

// errorCode reads the body of an Error.
func errorCode(body []byte) (uint32, error) {
	if len(body) != 4 {
		return 0, fmt.Errorf("vscard: error message of %d bytes, want 4", len(body))
	}
	return binary.BigEndian.Uint32(body), nil
}
