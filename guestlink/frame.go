package guestlink

import (
	"errors"
	"fmt"
	"io"
)

// A frame is a header of four bytes and a payload:
//
//	 0               1               2               3
//	+---------------+---------------+---------------+---------------+
//	|     type      |         length of the payload, big endian      |
//	+---------------+---------------+---------------+---------------+
const headerSize = 4

// HeaderSize is the length in bytes of the header of a frame.
const HeaderSize = headerSize

// maxFrame is the longest frame in bytes.
const maxFrame = headerSize + VirtioHeaderSize + MaxPacket

// Caps of a payload in bytes, checked before anything is stored.
const (
	MaxPacket  = 65535   // the longest IP packet (RFC 791 total length)
	MaxControl = 4 << 10 // Config, Status, Time and Power, JSON
	maxHello   = 64
	maxProbe   = probeSize
	// MaxBatch is how many bytes one write carries at most: the largest
	// packet of a virtio vsock stream (VIRTIO_VSOCK_MAX_PKT_BUF_SIZE).
	MaxBatch = 64 << 10
)

// Type is the kind of a frame.
type Type uint8

// Types on the wire; numbers are never reused.
const (
	TypeHello  Type = 1 // both ways, first frame, exactly once
	TypePacket Type = 2 // both ways: one IP packet
	TypeConfig Type = 3 // host to guest: Config
	TypeStatus Type = 4 // guest to host: Status

	// Of version 2, each only where its capability is in force.
	TypeOffload Type = 16 // both ways: virtio-net header and packet, CapOffload
	TypeTime    Type = 17 // host to guest: Time, CapTime
	TypePower   Type = 18 // both ways: Power, CapPower
	TypeProbe   Type = 19 // both ways: Probe, CapProbe
)

func (t Type) String() string {
	switch t {
	case TypeHello:
		return "hello"
	case TypePacket:
		return "packet"
	case TypeConfig:
		return "config"
	case TypeStatus:
		return "status"
	case TypeOffload:
		return "offload"
	case TypeTime:
		return "time"
	case TypePower:
		return "power"
	case TypeProbe:
		return "probe"
	}
	return fmt.Sprintf("type %d", uint8(t))
}

// limit is the longest payload of t, 0 for a type that does not exist.
func (t Type) limit() int {
	switch t {
	case TypeHello:
		return maxHello
	case TypePacket:
		return MaxPacket
	case TypeOffload:
		return VirtioHeaderSize + MaxPacket
	case TypeConfig, TypeStatus, TypeTime, TypePower:
		return MaxControl
	case TypeProbe:
		return maxProbe
	}
	return 0
}

// Reason says what was wrong with a frame.
type Reason uint8

// Reasons by which bad frames are counted; numbers leave the process.
const (
	ReasonNone      Reason = 0
	ReasonType      Reason = 1 // unknown type
	ReasonEmpty     Reason = 2 // no payload
	ReasonOversize  Reason = 3 // payload over the cap of its type
	ReasonTruncated Reason = 4 // stream ended inside a frame
	ReasonOrder     Reason = 5 // a type that may not come now or from this end
	ReasonHello     Reason = 6 // not this protocol
	ReasonVersion   Reason = 7 // no version in common
	ReasonControl   Reason = 8 // control message that does not parse
)

// Reasons is the number of reasons, for counters indexed by Reason.
const Reasons = 9

func (r Reason) String() string {
	names := [Reasons]string{"none", "type", "empty", "oversize", "truncated", "order", "hello", "version", "control"}
	if int(r) < len(names) {
		return names[r]
	}
	return fmt.Sprintf("reason %d", uint8(r))
}

// FrameError is a frame that broke the protocol. The link it came from must be
// reset: where the next frame begins is not known.
type FrameError struct {
	Reason Reason
	Type   Type
	Length int
	Err    error // what the parser said, may be nil
}

func (e *FrameError) Error() string {
	s := fmt.Sprintf("guestlink: bad frame: %s (%s, %d bytes)", e.Reason, e.Type, e.Length)
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

func (e *FrameError) Unwrap() error { return e.Err }

// ReasonOf returns the reason when err is a bad frame and ReasonNone otherwise.
func ReasonOf(err error) Reason {
	if e, ok := errors.AsType[*FrameError](err); ok {
		return e.Reason
	}
	return ReasonNone
}

// Frame is one frame. Payload belongs to the Reader it came from and is valid
// until a call of Next that reads: as long as Buffered was true before each.
type Frame struct {
	Type    Type
	Payload []byte
}

// AppendFrame appends a frame to dst. A payload that is empty or over the cap
// of its type is an error and leaves dst as it was.
func AppendFrame(dst []byte, t Type, payload []byte) ([]byte, error) {
	if err := checkHeader(t, len(payload)); err != nil {
		return dst, err
	}
	n := len(payload)
	dst = append(dst, byte(t), byte(n>>16), byte(n>>8), byte(n))
	return append(dst, payload...), nil
}

// PutHeader writes the header of a frame whose payload of n bytes already lies
// behind it. It lets a packet be read from a device into the place from which
// it is sent.
func PutHeader(frame []byte, t Type, n int) error {
	if err := checkHeader(t, n); err != nil {
		return err
	}
	frame[0], frame[1], frame[2], frame[3] = byte(t), byte(n>>16), byte(n>>8), byte(n)
	return nil
}

func checkHeader(t Type, n int) error {
	switch limit := t.limit(); {
	case limit == 0:
		return &FrameError{Reason: ReasonType, Type: t, Length: n}
	case n == 0:
		return &FrameError{Reason: ReasonEmpty, Type: t}
	case n > limit:
		return &FrameError{Reason: ReasonOversize, Type: t, Length: n}
	}
	return nil
}

// Reader splits a byte stream into frames. Its memory is fixed: one buffer
// that holds the longest frame and the rest of a batch.
type Reader struct {
	r        io.Reader
	buf      []byte
	from, to int // unread bytes are buf[from:to]
}

// readBuffer is the size of a Reader's buffer: several of the longest frames, so
// that the beginning of one seldom has to be moved.
const readBuffer = 4 * MaxBatch

// NewReader returns a Reader of r.
func NewReader(r io.Reader) *Reader {
	return &Reader{r: r, buf: make([]byte, readBuffer)}
}

// Next returns the next frame. At a clean end of the stream the error is
// io.EOF; a frame that breaks the protocol gives a *FrameError, and every
// later call gives nothing that can be trusted.
func (r *Reader) Next() (Frame, error) {
	f, ok, err := r.split()
	for !ok && err == nil {
		if err = r.fill(); err != nil {
			break
		}
		f, ok, err = r.split()
	}
	return f, err
}

// Buffered reports whether Next would return without reading.
func (r *Reader) Buffered() bool {
	b := r.buf[r.from:r.to]
	return len(b) >= headerSize && len(b)-headerSize >= length(b)
}

// Partial reports whether a frame has begun and not ended.
func (r *Reader) Partial() bool { return r.from < r.to && !r.Buffered() }

func length(header []byte) int {
	return int(header[1])<<16 | int(header[2])<<8 | int(header[3])
}

// split takes one frame from the buffer; ok is false when it is not complete.
func (r *Reader) split() (f Frame, ok bool, err error) {
	b := r.buf[r.from:r.to]
	if len(b) < headerSize {
		return Frame{}, false, nil
	}
	t, n := Type(b[0]), length(b)
	if err := checkHeader(t, n); err != nil {
		return Frame{}, false, err
	}
	if len(b)-headerSize < n {
		return Frame{}, false, nil
	}
	r.from += headerSize + n
	return Frame{Type: t, Payload: b[headerSize : headerSize+n : headerSize+n]}, true, nil
}

// fill reads more. The unread rest is moved to the front only when the longest
// frame would not fit behind it.
func (r *Reader) fill() error {
	if r.from == r.to {
		r.from, r.to = 0, 0
	} else if len(r.buf)-r.from < maxFrame {
		r.to = copy(r.buf, r.buf[r.from:r.to])
		r.from = 0
	}
	n, err := r.r.Read(r.buf[r.to:])
	r.to += n
	switch {
	case n > 0:
		return nil
	case err == io.EOF && r.from < r.to:
		b := r.buf[r.from:r.to]
		return &FrameError{Reason: ReasonTruncated, Type: Type(b[0]), Length: len(b), Err: io.ErrUnexpectedEOF}
	case err == nil:
		return io.ErrNoProgress
	}
	return err
}
