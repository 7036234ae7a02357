// Package eventlog is a strict reader of TCG firmware event logs (TCG PC Client
// Platform Firmware Profile 1.06, section 10) over go-attestation's parser.
//
// A log is written by the firmware, carried by the device and believed by
// nobody: sizes are capped before anything is parsed, every quoted PCR must
// replay, and facts are drawn from digests, never from an event's type or
// data, which no PCR covers.
package eventlog

import (
	"crypto"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	parser "github.com/google/go-attestation/attest"

	"sekisho/attest"
)

// Limits, checked before the parser sees the log.
const (
	MaxEvents = 4096
	MaxEvent  = 64 << 10        // bytes of data of one event
	maxTime   = 5 * time.Second // of parsing and of replaying one log
)

// Event types of the firmware profile, section 10.4.1.
const (
	TypeNoAction    uint32 = 0x00000003
	TypeSeparator   uint32 = 0x00000004
	TypeTag         uint32 = 0x00000006 // EV_EVENT_TAG
	TypeIPL         uint32 = 0x0000000d
	TypeApplication uint32 = 0x80000003 // EV_EFI_BOOT_SERVICES_APPLICATION
)

// Event is one event with its SHA-256 digest. Type and Data are hints.
type Event struct {
	Number int // position in the log
	PCR    int
	Type   uint32
	Data   []byte
	Digest attest.Digest
}

// Log is a parsed log. Nothing in it is true before Replay has passed.
type Log struct {
	Events []Event
	parsed *parser.EventLog
}

// Parse reads a crypto-agile log with SHA-256 digests. Errors are
// *attest.Refusal with one of the ReasonLog codes.
func Parse(data []byte) (*Log, error) {
	if len(data) > attest.MaxEventLog {
		return nil, attest.Refuse(attest.ReasonLogTooLarge, "event log of %d bytes, at most %d", len(data), attest.MaxEventLog)
	}
	end, err := scan(data)
	if err != nil {
		return nil, err
	}
	parsed, err := guarded(func() (*parser.EventLog, error) { return parser.ParseEventLog(data[:end]) })
	if err != nil {
		return nil, attest.Refuse(attest.ReasonLogMalformed, "event log: %v", err)
	}
	l := &Log{parsed: parsed}
	for i, e := range parsed.Events(parser.HashSHA256) {
		if e.Type == parser.EventType(TypeNoAction) {
			continue // extends nothing
		}
		if len(e.Digest) != sha256.Size {
			return nil, attest.Refuse(attest.ReasonLogNoSHA256, "event %d (PCR %d) has no SHA-256 digest", i, e.Index)
		}
		if e.Index < 0 || e.Index > 23 {
			return nil, attest.Refuse(attest.ReasonLogMalformed, "event %d extends PCR %d, which does not exist", i, e.Index)
		}
		l.Events = append(l.Events, Event{i, e.Index, uint32(e.Type), e.Data, attest.Digest(e.Digest)})
	}
	return l, nil
}

// Check replays the log against pcrs, the values that a quote has proven. A
// nil error proves, for each of attest.QuotedPCRs:
//
//   - pcrs has a value for it;
//   - if the value is not the reset value, the log has events for it;
//   - the log's events for it give exactly that value;
//   - for PCR 0 to 7, exactly one event is the legal separator, so that what
//     stands before it was measured by the firmware (section 3.3.2.2).
//
// Errors are *attest.Refusal.
func (l *Log) Check(pcrs map[int]attest.Digest) error {
	count := make(map[int]int)
	for _, e := range l.Events {
		count[e.PCR]++
	}
	var list []parser.PCR
	for _, i := range attest.QuotedPCRs {
		v, ok := pcrs[i]
		switch {
		case !ok:
			return attest.Refuse(attest.ReasonPCRSelection, "no value of PCR %d", i)
		case count[i] == 0 && v != attest.Digest{}:
			return attest.Refuse(attest.ReasonLogMissingEvents, "PCR %d was extended and the event log does not say by what", i)
		}
		list = append(list, parser.PCR{Index: i, Digest: v[:], DigestAlg: crypto.SHA256})
	}
	_, err := guarded(func() ([]parser.Event, error) { return l.parsed.Verify(list) })
	var replay parser.ReplayError
	switch {
	case errors.As(err, &replay):
		return attest.Refuse(attest.ReasonLogReplay, "the event log does not give the values of PCRs %v", replay.InvalidPCRs)
	case err != nil:
		return attest.Refuse(attest.ReasonLogReplay, "event log: %v", err)
	}
	return l.checkSeparators()
}

// checkSeparators counts separators by digest: an event of another type with a
// separator's digest is as good as a separator to a PCR.
func (l *Log) checkSeparators() error {
	legal := map[attest.Digest]bool{
		sha256.Sum256([]byte{0, 0, 0, 0}):             true,
		sha256.Sum256([]byte{0xff, 0xff, 0xff, 0xff}): true,
	}
	var seen [8]int
	for _, e := range l.Events {
		switch {
		case e.PCR > 7:
		case legal[e.Digest]:
			seen[e.PCR]++
		case e.Type == TypeSeparator:
			return attest.Refuse(attest.ReasonLogSeparator, "event %d: separator of PCR %d is not a legal one; the firmware reported an error", e.Number, e.PCR)
		}
	}
	for pcr, n := range seen {
		if n != 1 {
			return attest.Refuse(attest.ReasonLogSeparator, "PCR %d has %d separators, want 1", pcr, n)
		}
	}
	return nil
}

// guarded runs f under recover and a time limit. The caps make f finish by
// itself; should a fault of the parser break that, the caller does not hang.
func guarded[T any](f func() (T, error)) (T, error) {
	type outcome struct {
		v   T
		err error
	}
	done := make(chan outcome, 1)
	go func() {
		var o outcome
		defer func() {
			if r := recover(); r != nil {
				o.err = fmt.Errorf("parser failed: %v", r)
			}
			done <- o
		}()
		o.v, o.err = f()
	}()
	limit := time.NewTimer(maxTime)
	defer limit.Stop()
	select {
	case o := <-done:
		return o.v, o.err
	case <-limit.C:
		var zero T
		return zero, fmt.Errorf("parser took over %v", maxTime)
	}
}

// scan walks the log's frame without looking into it, applies the caps, and
// returns where the events end: firmware may leave 0x00 or 0xFF behind them.
func scan(data []byte) (end int, err error) {
	malformed := func(format string, a ...any) (int, error) {
		return 0, attest.Refuse(attest.ReasonLogMalformed, "event log: "+format, a...)
	}
	// The first event is in the old format: index, type, SHA-1, size.
	const head = 4 + 4 + 20 + 4
	if len(data) < head {
		return malformed("%d bytes, shorter than one event", len(data))
	}
	size := binary.LittleEndian.Uint32(data[28:])
	if size > MaxEvent || int(size) > len(data)-head {
		return malformed("first event claims %d bytes of data", size)
	}
	spec := data[head : head+int(size)]
	if binary.LittleEndian.Uint32(data[4:]) != TypeNoAction || len(spec) < 28 || string(spec[:16]) != "Spec ID Event03\x00" {
		return 0, attest.Refuse(attest.ReasonLogNoSHA256, "event log is not of the crypto-agile format; set the TPM to SHA-256 in the firmware")
	}
	sizes, err := digestSizes(spec)
	if err != nil {
		return malformed("%v", err)
	}
	at := head + int(size)
	for n := 1; at < len(data); n++ {
		if padding(data[at:]) {
			break
		}
		if n > MaxEvents {
			return 0, attest.Refuse(attest.ReasonLogTooLarge, "event log of over %d events", MaxEvents)
		}
		length, err := eventSize(data[at:], sizes)
		if err != nil {
			return malformed("event %d: %v", n, err)
		}
		at += length
	}
	return at, nil
}

// digestSizes reads the algorithm table of a TCG_EfiSpecIDEvent (section
// 10.4.5.1).
func digestSizes(spec []byte) (map[uint16]int, error) {
	n := binary.LittleEndian.Uint32(spec[24:])
	if n == 0 || n > 16 || len(spec) < 28+4*int(n) {
		return nil, fmt.Errorf("%d digest algorithms", n)
	}
	sizes := make(map[uint16]int, n)
	for i := range int(n) {
		entry := spec[28+4*i:]
		id, size := binary.LittleEndian.Uint16(entry), int(binary.LittleEndian.Uint16(entry[2:]))
		if _, twice := sizes[id]; twice || size == 0 || size > 64 {
			return nil, fmt.Errorf("digest algorithm 0x%04x of %d bytes", id, size)
		}
		sizes[id] = size
	}
	const sha256ID = 0x000b // TPM_ALG_SHA256
	if s, ok := sizes[sha256ID]; ok && s != sha256.Size {
		return nil, fmt.Errorf("SHA-256 digests of %d bytes", s)
	}
	return sizes, nil
}

// eventSize returns the length of the TCG_PCR_EVENT2 at the head of b.
func eventSize(b []byte, sizes map[uint16]int) (int, error) {
	if len(b) < 12 {
		return 0, fmt.Errorf("truncated after %d bytes", len(b))
	}
	digests := binary.LittleEndian.Uint32(b[8:])
	if digests > uint32(len(sizes)) {
		return 0, fmt.Errorf("%d digests for %d algorithms", digests, len(sizes))
	}
	at := 12
	seen := make(map[uint16]bool, digests)
	for range digests {
		if len(b) < at+2 {
			return 0, errors.New("truncated in its digests")
		}
		id := binary.LittleEndian.Uint16(b[at:])
		size, known := sizes[id]
		if !known || seen[id] {
			return 0, fmt.Errorf("digest algorithm 0x%04x is unknown or comes twice", id)
		}
		seen[id] = true
		at += 2 + size
	}
	if len(b) < at+4 {
		return 0, errors.New("truncated in its digests")
	}
	size := binary.LittleEndian.Uint32(b[at:])
	at += 4
	if size > MaxEvent {
		return 0, fmt.Errorf("%d bytes of data, at most %d", size, MaxEvent)
	}
	if int(size) > len(b)-at {
		return 0, fmt.Errorf("%d bytes of data, %d left", size, len(b)-at)
	}
	return at + int(size), nil
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
