package guestlink

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// Version is the newest version of the protocol that this code speaks, and
// MinVersion the oldest.
const (
	Version    = 2
	MinVersion = 1
)

// Capabilities are bits that an end offers; what both offer is in force.
// Version 1 defines none: an end ignores bits that it does not know.
type Capabilities uint32

// Capabilities of version 2; numbers are never reused.
const (
	CapOffload Capabilities = 1 << 0 // frames of TypeOffload are understood
	CapTime    Capabilities = 1 << 1 // the guest takes the time from the host
	CapPower   Capabilities = 1 << 2 // the guest shuts down and suspends on request
	CapProbe   Capabilities = 1 << 3 // probes are answered
	// CapAddress6: the guest takes a Config with an IPv6 address beside the IPv4 one.
	CapAddress6 Capabilities = 1 << 4
)

// Has reports whether all bits of b are in c.
func (c Capabilities) Has(b Capabilities) bool { return c&b == b }

// Words returns the capabilities that this version knows.
func (c Capabilities) Words() []string {
	words := []string{}
	for i, w := range []string{"offload", "time", "power", "probe", "address6"} {
		if c.Has(1 << i) {
			words = append(words, w)
		}
	}
	return words
}

// MinBatch is the smallest batch in bytes that an end can ask for; a smaller
// one means this.
const MinBatch = 4 << 10

// Hello is the first frame of each end. Batch and Queues came with version 2;
// where they are absent, they are MaxBatch and 1.
type Hello struct {
	Version      uint16
	Capabilities Capabilities
	Batch        uint32 // most bytes in one write that this end likes to get
	Queues       uint16 // streams over which it would spread flows
}

// helloMagic begins every hello.
const helloMagic = "sekisho\x00"

// AppendHello appends a hello frame to dst.
func AppendHello(dst []byte, h Hello) []byte {
	p := []byte(helloMagic)
	p = binary.BigEndian.AppendUint16(p, h.Version)
	p = binary.BigEndian.AppendUint32(p, uint32(h.Capabilities))
	if h.Version >= 2 {
		p = binary.BigEndian.AppendUint32(p, h.Batch)
		p = binary.BigEndian.AppendUint16(p, h.Queues)
	}
	dst, _ = AppendFrame(dst, TypeHello, p) // 14 or 20 bytes: within the cap
	return dst
}

// ParseHello reads the payload of a hello frame. Bytes after the known fields
// are left to later versions.
func ParseHello(p []byte) (Hello, error) {
	const size = len(helloMagic) + 2 + 4
	if len(p) < size || len(p) > maxHello || string(p[:len(helloMagic)]) != helloMagic {
		return Hello{}, &FrameError{Reason: ReasonHello, Type: TypeHello, Length: len(p)}
	}
	h := Hello{
		Version:      binary.BigEndian.Uint16(p[len(helloMagic):]),
		Capabilities: Capabilities(binary.BigEndian.Uint32(p[len(helloMagic)+2:])),
		Batch:        MaxBatch,
		Queues:       1,
	}
	if h.Version >= 2 && len(p) >= size+6 {
		h.Batch = min(max(binary.BigEndian.Uint32(p[size:]), MinBatch), MaxBatch)
		h.Queues = max(binary.BigEndian.Uint16(p[size+4:]), 1)
	}
	return h, nil
}

// Agree returns what is in force between two ends: the lower version, the
// capabilities that both offer (none in version 1), the smaller batch and the
// fewer queues.
func Agree(a, b Hello) (Hello, error) {
	h := Hello{
		Version: min(a.Version, b.Version), Capabilities: a.Capabilities & b.Capabilities,
		Batch: min(max(min(a.Batch, b.Batch), MinBatch), MaxBatch), Queues: max(min(a.Queues, b.Queues), 1),
	}
	if h.Version < 2 {
		h.Capabilities, h.Batch, h.Queues = 0, MaxBatch, 1
	}
	if h.Version < MinVersion {
		return Hello{}, &FrameError{Reason: ReasonVersion, Type: TypeHello,
			Err: fmt.Errorf("version %d, want at least %d", h.Version, MinVersion)}
	}
	return h, nil
}

// State is where the guest end stands. The zero value is waiting.
type State uint8

// States of the guest end; the words leave the process.
const (
	StateWaiting    State = 0 // no Config yet
	StateConfigured State = 1 // the last Config is in force
	StateFailed     State = 2 // the last Config could not be applied
)

func (s State) String() string {
	switch s {
	case StateConfigured:
		return "configured"
	case StateFailed:
		return "failed"
	}
	return "waiting"
}

// MarshalText implements encoding.TextMarshaler.
func (s State) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *State) UnmarshalText(b []byte) error {
	for _, v := range []State{StateWaiting, StateConfigured, StateFailed} {
		if v.String() == string(b) {
			*s = v
			return nil
		}
	}
	return fmt.Errorf("state %q: want waiting, configured or failed", b)
}

// Status is what the guest end says of itself. The guest may lie: it is shown,
// never acted upon.
type Status struct {
	State  State  `json:"state"`
	Detail string `json:"detail,omitempty"`
}

// AppendConfig appends a config frame to dst.
func AppendConfig(dst []byte, c Config) ([]byte, error) {
	if err := c.Validate(); err != nil {
		return dst, err
	}
	return appendJSON(dst, TypeConfig, c)
}

// ParseConfig reads and validates the payload of a config frame, or the body
// of linkd's PUT /v1/config.
func ParseConfig(p []byte) (Config, error) {
	var c Config
	if err := parseJSON(TypeConfig, p, &c); err != nil {
		return Config{}, err
	}
	if err := c.Validate(); err != nil {
		return Config{}, &FrameError{Reason: ReasonControl, Type: TypeConfig, Length: len(p), Err: err}
	}
	return c, nil
}

// maxDetail keeps a status frame within its cap, whatever JSON escapes.
const maxDetail = 512

// AppendStatus appends a status frame to dst. A detail over 512 bytes is cut.
func AppendStatus(dst []byte, s Status) ([]byte, error) {
	if len(s.Detail) > maxDetail {
		s.Detail = s.Detail[:maxDetail]
	}
	return appendJSON(dst, TypeStatus, s)
}

// ParseStatus reads the payload of a status frame.
func ParseStatus(p []byte) (Status, error) {
	var s Status
	if err := parseJSON(TypeStatus, p, &s); err != nil {
		return Status{}, err
	}
	return s, nil
}

func appendJSON(dst []byte, t Type, v any) ([]byte, error) {
	p, err := json.Marshal(v)
	if err != nil {
		return dst, fmt.Errorf("guestlink: %s: %w", t, err)
	}
	return AppendFrame(dst, t, p)
}

// parseJSON decodes one document of at most MaxControl bytes. Unknown fields
// are errors: a version that adds one announces it by its number.
func parseJSON(t Type, p []byte, v any) error {
	bad := func(err error) error {
		return &FrameError{Reason: ReasonControl, Type: t, Length: len(p), Err: err}
	}
	if len(p) > MaxControl {
		return &FrameError{Reason: ReasonOversize, Type: t, Length: len(p)}
	}
	d := json.NewDecoder(bytes.NewReader(p))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return bad(err)
	}
	if _, err := d.Token(); err != io.EOF {
		return bad(errors.New("data after the document"))
	}
	return nil
}
