package eventlog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"sekisho/attest"
)

// Format is how a log is written. The zero value is none.
type Format uint8

// The formats.
const (
	FormatAgile  Format = 1 // TCG_PCR_EVENT2 after a Spec ID event (section 10.2.2)
	FormatLegacy Format = 2 // TCG_PCR_EVENT of TCG 1.2: SHA-1 only (section 10.2.1)
)

func (f Format) String() string {
	switch f {
	case FormatAgile:
		return "crypto-agile"
	case FormatLegacy:
		return "tcg-1.2"
	}
	return "none"
}

// MarshalText implements encoding.TextMarshaler.
func (f Format) MarshalText() ([]byte, error) { return []byte(f.String()), nil }

// specID begins the body of the event that makes a log crypto-agile.
const specID = "Spec ID Event03\x00"

// legacyHead is the fixed part of an event in the old format: index, type,
// SHA-1, size.
const legacyHead = 4 + 4 + 20 + 4

// algorithm is one entry of a log's algorithm table.
type algorithm struct {
	id   Bank
	size int
}

// Read reads a log of either format, and nothing but its frame: caps come
// before any allocation, and what stands behind the last event may only be
// 0x00 or only 0xFF. Errors are *attest.Refusal.
func Read(data []byte) (*Log, error) {
	if len(data) > attest.MaxEventLog {
		return nil, attest.Refuse(attest.ReasonLogTooLarge, "event log of %d bytes, at most %d", len(data), attest.MaxEventLog)
	}
	return guarded(func() (*Log, error) { return read(data) })
}

func read(data []byte) (*Log, error) {
	if len(data) == 0 {
		return nil, malformed("it is empty")
	}
	if padding(data) {
		return &Log{Format: FormatLegacy, algorithms: []algorithm{{SHA1, SHA1.Size()}}, padding: len(data)}, nil
	}
	first, n, err := legacyEvent(data)
	if err != nil {
		return nil, malformed("first event: %v", err)
	}
	if first.Type != TypeNoAction || !bytes.HasPrefix(first.Data, []byte(specID)) {
		l := &Log{Format: FormatLegacy, algorithms: []algorithm{{SHA1, SHA1.Size()}}}
		if err := l.walk(data, legacyEvent); err != nil {
			return nil, err
		}
		return l, nil
	}
	algorithms, err := parseSpecID(first.Data)
	if err != nil {
		return nil, malformed("Spec ID event: %v", err)
	}
	l := &Log{Format: FormatAgile, algorithms: algorithms, count: 1}
	// Events of real logs take 400 bytes and more.
	l.Events = make([]Event, 0, min(len(data)/400, MaxEvents))
	if err := l.walk(data[n:], func(b []byte) (Event, int, error) { return agileEvent(b, algorithms) }); err != nil {
		return nil, err
	}
	return l, nil
}

// walk adds the events in data, which next cuts off one by one.
func (l *Log) walk(data []byte, next func([]byte) (Event, int, error)) error {
	for len(data) > 0 {
		if padding(data) {
			l.padding = len(data)
			return nil
		}
		if l.count >= MaxEvents {
			return attest.Refuse(attest.ReasonLogTooLarge, "event log of over %d events", MaxEvents)
		}
		e, n, err := next(data)
		if err != nil {
			return malformed("event %d: %v", l.count, err)
		}
		e.Number = l.count
		l.count++
		data = data[n:]
		if e.Type == TypeNoAction {
			l.Notes = append(l.Notes, e)
			continue
		}
		if e.PCR < 0 || e.PCR > 23 {
			return malformed("event %d extends PCR %d, which does not exist", e.Number, e.PCR)
		}
		l.Events = append(l.Events, e)
	}
	return nil
}

func malformed(format string, a ...any) error {
	return attest.Refuse(attest.ReasonLogMalformed, "event log: "+format, a...)
}

// legacyEvent reads the TCG_PCR_EVENT at the head of b and its length.
func legacyEvent(b []byte) (Event, int, error) {
	if len(b) < legacyHead {
		return Event{}, 0, fmt.Errorf("truncated after %d bytes", len(b))
	}
	size, err := dataSize(b[28:], len(b)-legacyHead)
	if err != nil {
		return Event{}, 0, err
	}
	end := legacyHead + size
	return Event{
		PCR: int(int32(binary.LittleEndian.Uint32(b))), Type: binary.LittleEndian.Uint32(b[4:]),
		Data: b[legacyHead:end:end], sha1: (*[20]byte)(b[8:28]),
	}, end, nil
}

// agileEvent reads the TCG_PCR_EVENT2 at the head of b and its length.
func agileEvent(b []byte, algorithms []algorithm) (Event, int, error) {
	if len(b) < 12 {
		return Event{}, 0, fmt.Errorf("truncated after %d bytes", len(b))
	}
	e := Event{PCR: int(int32(binary.LittleEndian.Uint32(b))), Type: binary.LittleEndian.Uint32(b[4:])}
	digests := binary.LittleEndian.Uint32(b[8:])
	if digests > uint32(len(algorithms)) {
		return Event{}, 0, fmt.Errorf("%d digests for %d algorithms", digests, len(algorithms))
	}
	at := 12
	var seen uint16 // bit by place in the table, which has at most 16 entries
	for range digests {
		if len(b) < at+2 {
			return Event{}, 0, errors.New("truncated in its digests")
		}
		id := Bank(binary.LittleEndian.Uint16(b[at:]))
		place := 0
		for place < len(algorithms) && algorithms[place].id != id {
			place++
		}
		if place == len(algorithms) || seen&(1<<place) != 0 {
			return Event{}, 0, fmt.Errorf("digest algorithm 0x%04x is unknown or comes twice", uint16(id))
		}
		seen |= 1 << place
		at += 2
		end := at + algorithms[place].size
		if len(b) < end {
			return Event{}, 0, errors.New("truncated in its digests")
		}
		e.setDigest(id, b[at:end:end])
		at = end
	}
	if len(b) < at+4 {
		return Event{}, 0, errors.New("truncated in its digests")
	}
	size, err := dataSize(b[at:], len(b)-at-4)
	if err != nil {
		return Event{}, 0, err
	}
	at += 4
	e.Data = b[at : at+size : at+size]
	return e, at + size, nil
}

// dataSize reads the length of an event's data, of which left bytes are there.
func dataSize(b []byte, left int) (int, error) {
	size := binary.LittleEndian.Uint32(b)
	if size > MaxEvent {
		return 0, fmt.Errorf("%d bytes of data, at most %d", size, MaxEvent)
	}
	if int(size) > left {
		return 0, fmt.Errorf("%d bytes of data, %d left", size, left)
	}
	return int(size), nil
}

// parseSpecID reads the algorithm table of a TCG_EfiSpecIDEvent (section
// 10.4.5.1).
func parseSpecID(spec []byte) ([]algorithm, error) {
	if len(spec) < 28 || !bytes.HasPrefix(spec, []byte(specID)) {
		return nil, fmt.Errorf("%d bytes, shorter than its fixed part", len(spec))
	}
	if minor, major := spec[20], spec[21]; major != 2 || minor != 0 {
		return nil, fmt.Errorf("version %d.%d, want 2.0", major, minor)
	}
	n := binary.LittleEndian.Uint32(spec[24:])
	if n == 0 || n > 16 || len(spec) < 28+4*int(n) {
		return nil, fmt.Errorf("%d digest algorithms", n)
	}
	table := make([]algorithm, n)
	for i := range table {
		entry := spec[28+4*i:]
		a := algorithm{Bank(binary.LittleEndian.Uint16(entry)), int(binary.LittleEndian.Uint16(entry[2:]))}
		for _, before := range table[:i] {
			if before.id == a.id {
				return nil, fmt.Errorf("digest algorithm 0x%04x comes twice", uint16(a.id))
			}
		}
		if want := a.id.Size(); a.size == 0 || a.size > 64 || want != 0 && a.size != want {
			return nil, fmt.Errorf("digest algorithm 0x%04x of %d bytes", uint16(a.id), a.size)
		}
		table[i] = a
	}
	return table, nil
}

// padding reports whether b holds nothing but 0x00 or nothing but 0xFF.
func padding(b []byte) bool {
	if b[0] != 0 && b[0] != 0xff {
		return false
	}
	for _, c := range b {
		if c != b[0] {
			return false
		}
	}
	return true
}
