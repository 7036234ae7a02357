package guestlink

import (
	"encoding/binary"
	"fmt"
	"time"
)

// Time is the host domain's clock, for a guest that has slept or drifts.
type Time struct {
	Unix int64 `json:"unix_nano"` // nanoseconds since 1970 UTC
}

// Bounds of a time that a guest takes: a clock outside of them was never set.
var (
	minTime = time.Date(2024, 1, 1, 0, 0, 0, 0, time.UTC)
	maxTime = time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC)
)

// AppendTime appends a time frame to dst.
func AppendTime(dst []byte, t time.Time) ([]byte, error) {
	return appendJSON(dst, TypeTime, Time{Unix: t.UnixNano()})
}

// ParseTime reads the payload of a time frame. A time before 2024 or after 2099
// is an error.
func ParseTime(p []byte) (time.Time, error) {
	var v Time
	if err := parseJSON(TypeTime, p, &v); err != nil {
		return time.Time{}, err
	}
	t := time.Unix(0, v.Unix).UTC()
	if t.Before(minTime) || !t.Before(maxTime) {
		return time.Time{}, &FrameError{Reason: ReasonControl, Type: TypeTime, Length: len(p), Err: fmt.Errorf("time %s is no clock's", t.Format(time.RFC3339))}
	}
	return t, nil
}

// Action is what the host asks of the work domain. The zero value asks nothing
// and is refused.
type Action uint8

// Actions; the words leave the process.
const (
	ActionNone     Action = 0
	ActionShutdown Action = 1 // orderly, as by the power button
	ActionSuspend  Action = 2 // to memory
)

func (a Action) String() string {
	switch a {
	case ActionShutdown:
		return "shutdown"
	case ActionSuspend:
		return "suspend"
	}
	return "none"
}

// MarshalText implements encoding.TextMarshaler.
func (a Action) MarshalText() ([]byte, error) { return []byte(a.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (a *Action) UnmarshalText(b []byte) error {
	for _, v := range []Action{ActionShutdown, ActionSuspend} {
		if v.String() == string(b) {
			*a = v
			return nil
		}
	}
	return fmt.Errorf("action %q: want shutdown or suspend", b)
}

// Power asks for an action (host to guest, Answer empty) or says what became of
// it (guest to host, the same ID, Answer "accepted" or "refused").
type Power struct {
	ID     uint32 `json:"id"` // chosen by the host, not 0
	Action Action `json:"action"`
	Answer string `json:"answer,omitempty"`
	Detail string `json:"detail,omitempty"`
}

// Answers of a guest.
const (
	AnswerAccepted = "accepted"
	AnswerRefused  = "refused"
)

// AppendPower appends a power frame to dst. A detail over 512 bytes is cut.
func AppendPower(dst []byte, p Power) ([]byte, error) {
	if len(p.Detail) > maxDetail {
		p.Detail = p.Detail[:maxDetail]
	}
	return appendJSON(dst, TypePower, p)
}

// ParsePower reads the payload of a power frame: a request without and an
// answer with one of the two words.
func ParsePower(b []byte) (Power, error) {
	var p Power
	if err := parseJSON(TypePower, b, &p); err != nil {
		return Power{}, err
	}
	var fault error
	switch {
	case p.ID == 0 || p.Action == ActionNone:
		fault = fmt.Errorf("power: id %d, action %s", p.ID, p.Action)
	case p.Answer != "" && p.Answer != AnswerAccepted && p.Answer != AnswerRefused:
		fault = fmt.Errorf("power: answer %q", p.Answer)
	}
	if fault != nil {
		return Power{}, &FrameError{Reason: ReasonControl, Type: TypePower, Length: len(b), Err: fault}
	}
	return p, nil
}

// Probe asks whether the other end still runs, or answers with the same token.
type Probe struct {
	Answer bool
	Token  uint64
}

const probeSize = 9

// AppendProbe appends a probe frame to dst: one byte, 0 for a question and 1
// for an answer, and the token, big endian.
func AppendProbe(dst []byte, p Probe) []byte {
	b := make([]byte, 1, probeSize)
	if p.Answer {
		b[0] = 1
	}
	dst, _ = AppendFrame(dst, TypeProbe, binary.BigEndian.AppendUint64(b, p.Token)) // 9 bytes: within the cap
	return dst
}

// ParseProbe reads the payload of a probe frame.
func ParseProbe(b []byte) (Probe, error) {
	if len(b) != probeSize || b[0] > 1 {
		return Probe{}, &FrameError{Reason: ReasonControl, Type: TypeProbe, Length: len(b)}
	}
	return Probe{Answer: b[0] == 1, Token: binary.BigEndian.Uint64(b[1:])}, nil
}
