// Package runlog is the event log of the host domain's run time: what was
// extended after the firmware and the boot stub were done. It is the TLV
// encoding of the TCG Canonical Event Log Format, version 1.0, section 5, with
// a content type of our own. It does no I/O.
//
// One record:
//
//	00 len record number (8)
//	01 len PCR (1)
//	03 len digests: 0b len SHA-256 of the content TLV (32)
//	e0 len content: KIND len detail (32)
//
// Types are one byte, lengths four, all numbers big endian. Unlike a
// firmware's log nothing in it is beyond the PCRs: the digest covers kind and
// detail, and the kind fixes the PCR.
package runlog

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"

	"sekisho/attest"
)

// TLV types: of the format, section 5.1, and our content's, from the range
// that the TCG has not given to anyone.
const (
	tlvRecord  = 0x00
	tlvPCR     = 0x01
	tlvDigests = 0x03
	tlvContent = 0xe0
	algSHA256  = 0x0b // TPM_ALG_SHA256
)

const (
	tlvHead     = 1 + 4
	contentSize = tlvHead + sha256.Size
	recordSize  = tlvHead + 8 + tlvHead + 1 + tlvHead + tlvHead + sha256.Size + tlvHead + contentSize
	// MaxEvents is how many events one boot may have.
	MaxEvents = attest.MaxRunLog / recordSize
)

// ErrMalformed is returned for a log that is not the encoding of known events.
var ErrMalformed = errors.New("run-time event log is malformed")

func tlv(kind byte, value []byte) []byte {
	b := binary.BigEndian.AppendUint32([]byte{kind}, uint32(len(value)))
	return append(b, value...)
}

func content(e attest.RunEvent) []byte { return tlv(tlvContent, tlv(byte(e.Kind), e.Detail[:])) }

// Digest is what event e extends its PCR with.
func Digest(e attest.RunEvent) attest.Digest { return sha256.Sum256(content(e)) }

// Append returns log with e as its next record. It refuses kinds that nobody
// knows and a log that is full.
func Append(log []byte, e attest.RunEvent) ([]byte, error) {
	pcr, ok := e.Kind.PCR()
	if !ok {
		return nil, fmt.Errorf("run-time event log: %s is not a kind that can be recorded", e.Kind)
	}
	n := len(log) / recordSize
	if n >= MaxEvents {
		return nil, fmt.Errorf("run-time event log: %d events, at most %d; start the laptop again", n, MaxEvents)
	}
	digest := Digest(e)
	out := append(bytes.Clone(log), tlv(tlvRecord, binary.BigEndian.AppendUint64(nil, uint64(n)))...)
	out = append(out, tlv(tlvPCR, []byte{byte(pcr)})...)
	out = append(out, tlv(tlvDigests, tlv(algSHA256, digest[:]))...)
	return append(out, content(e)...), nil
}

// Parse reads a log. A nil error proves that data is exactly what Append makes
// of the events returned: known kinds, each with its own PCR and its own
// digest, numbered from zero without a gap. Errors are ErrMalformed.
func Parse(data []byte) ([]attest.RunEvent, error) {
	if len(data) > attest.MaxRunLog || len(data)%recordSize != 0 {
		return nil, fmt.Errorf("%w: %d bytes, want records of %d and at most %d bytes", ErrMalformed, len(data), recordSize, attest.MaxRunLog)
	}
	var events []attest.RunEvent
	var again []byte
	for at := 0; at < len(data); at += recordSize {
		body := data[at+recordSize-contentSize : at+recordSize]
		e := attest.RunEvent{Kind: attest.EventKind(body[0]), Detail: attest.Digest(body[tlvHead:])}
		next, err := Append(again, e)
		if err != nil {
			return nil, fmt.Errorf("%w: record %d: %w", ErrMalformed, len(events), err)
		}
		if !bytes.Equal(next[at:], data[at:at+recordSize]) {
			return nil, fmt.Errorf("%w: record %d is not the encoding of %s", ErrMalformed, len(events), e)
		}
		events, again = append(events, e), next
	}
	return events, nil
}

// Replay returns the values that events give to the PCRs that they extend,
// from the reset state. PCRs that no event extends are absent.
func Replay(events []attest.RunEvent) map[int]attest.Digest {
	pcrs := make(map[int]attest.Digest)
	for _, e := range events {
		pcr, ok := e.Kind.PCR()
		if !ok {
			continue // Parse and Append refuse it
		}
		v, d := pcrs[pcr], Digest(e)
		pcrs[pcr] = sha256.Sum256(append(v[:], d[:]...))
	}
	return pcrs
}

// AtBoot undoes the events: it returns pcrs as they were before the first of
// them, for the judgement of the boot. Every PCR that an event extends must
// hold exactly what the events give it, which also proves that nothing but
// these events extended it. Errors are *attest.Refusal.
func AtBoot(pcrs map[int]attest.Digest, log []byte) (map[int]attest.Digest, []attest.RunEvent, error) {
	events, err := Parse(log)
	if err != nil {
		return nil, nil, attest.Refuse(attest.ReasonRunLogMalformed, "%v", err)
	}
	replayed := Replay(events)
	boot := make(map[int]attest.Digest, len(pcrs))
	for i, seen := range pcrs {
		want, extended := replayed[i]
		switch {
		case !extended:
			boot[i] = seen
		case seen != want:
			return nil, nil, attest.Refuse(attest.ReasonRunLogReplay, "PCR %d is %.16s…, the run-time events give %.16s…: something else was measured, or an event is missing; start the laptop again", i, seen, want)
		default:
			boot[i] = attest.Digest{}
		}
	}
	for i := range replayed {
		if _, quoted := pcrs[i]; !quoted {
			return nil, nil, attest.Refuse(attest.ReasonRunLogReplay, "run-time events extend PCR %d, which is not quoted", i)
		}
	}
	return boot, events, nil
}
