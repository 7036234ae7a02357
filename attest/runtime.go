package attest

import "fmt"

// EventKind is something that happens while the host domain runs and that the
// TPM must know of. Kinds leave the process; their numbers never change.
type EventKind uint8

// The kinds, numbered by hand. The zero value is no event.
const (
	// EventWorkDomain: the work domain starts. The detail is the SHA-256 of
	// its configuration.
	EventWorkDomain EventKind = 1
	// EventDiskKey: a disk key was released. The detail is
	// HMAC(volume key, device id), so another volume shows as another value.
	EventDiskKey EventKind = 2
)

// MaxRunLog bounds the log of run-time events in bytes.
const MaxRunLog = 16 << 10

// eventKinds gives each kind its name and the PCR that it extends.
var eventKinds = map[EventKind]struct {
	name string
	pcr  int
}{
	EventWorkDomain: {"work-domain-started", 14},
	EventDiskKey:    {"disk-key-used", 15},
}

func (k EventKind) String() string {
	if e, ok := eventKinds[k]; ok {
		return e.name
	}
	return fmt.Sprintf("event-%d", uint8(k))
}

// PCR returns the PCR that events of this kind extend; ok is false for a kind
// that nobody knows.
func (k EventKind) PCR() (pcr int, ok bool) {
	e, ok := eventKinds[k]
	return e.pcr, ok
}

// ParseEventKind is the inverse of EventKind.String.
func ParseEventKind(s string) (EventKind, error) {
	for k, e := range eventKinds {
		if e.name == s {
			return k, nil
		}
	}
	return 0, fmt.Errorf("unknown event %.64q", s)
}

// MarshalText implements encoding.TextMarshaler.
func (k EventKind) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (k *EventKind) UnmarshalText(b []byte) (err error) {
	*k, err = ParseEventKind(string(b))
	return err
}

// RunEvent is one event of the host domain's run time.
type RunEvent struct {
	Kind   EventKind `json:"kind"`
	Detail Digest    `json:"detail"`
}

func (e RunEvent) String() string { return e.Kind.String() + " " + e.Detail.String() }
