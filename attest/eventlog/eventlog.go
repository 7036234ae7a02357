// Package eventlog is a strict reader of TCG firmware event logs (TCG PC Client
// Platform Firmware Profile 1.06, section 10). google/go-attestation is the
// second reader (attest/eventlog/second): the verifier refuses a log that both
// do not read the same.
//
// A log is written by the firmware, carried by the device and believed by
// nobody: sizes are capped before anything is parsed, every quoted PCR must
// replay, and facts are drawn from digests, never from an event's type or
// data, which no PCR covers.
//
// Read takes any log that can be viewed, Appraise judges it against PCR values
// of one bank. Parse and Check are what the verifier uses: SHA-256 only, no
// tolerance.
package eventlog

import (
	"fmt"
	"slices"
	"time"

	"sekisho/attest"
)

// Limits, checked before anything is parsed.
const (
	MaxEvents = 4096
	MaxEvent  = 64 << 10        // bytes of data of one event
	maxTime   = 5 * time.Second // of parsing and of replaying one log
)

// Event types of the firmware profile, section 10.4.1.
const (
	TypePostCode         uint32 = 0x00000001
	TypeNoAction         uint32 = 0x00000003
	TypeSeparator        uint32 = 0x00000004
	TypeAction           uint32 = 0x00000005
	TypeTag              uint32 = 0x00000006 // EV_EVENT_TAG
	TypeCRTMContents     uint32 = 0x00000007
	TypeCRTMVersion      uint32 = 0x00000008
	TypeMicrocode        uint32 = 0x00000009
	TypeConfigFlags      uint32 = 0x0000000a
	TypeTableOfDevices   uint32 = 0x0000000b
	TypeCompactHash      uint32 = 0x0000000c
	TypeIPL              uint32 = 0x0000000d
	TypeIPLPartition     uint32 = 0x0000000e
	TypeNonhostCode      uint32 = 0x0000000f
	TypeNonhostConfig    uint32 = 0x00000010
	TypeNonhostInfo      uint32 = 0x00000011
	TypeOmitBootDevice   uint32 = 0x00000012
	TypePostCode2        uint32 = 0x00000013
	TypeVariableConfig   uint32 = 0x80000001 // EV_EFI_VARIABLE_DRIVER_CONFIG
	TypeVariableBoot     uint32 = 0x80000002
	TypeApplication      uint32 = 0x80000003 // EV_EFI_BOOT_SERVICES_APPLICATION
	TypeBootDriver       uint32 = 0x80000004
	TypeRuntimeDriver    uint32 = 0x80000005
	TypeGPT              uint32 = 0x80000006
	TypeEFIAction        uint32 = 0x80000007
	TypeFirmwareBlob     uint32 = 0x80000008
	TypeHandoffTables    uint32 = 0x80000009
	TypeFirmwareBlob2    uint32 = 0x8000000a
	TypeHandoffTables2   uint32 = 0x8000000b
	TypeVariableBoot2    uint32 = 0x8000000c
	TypeGPT2             uint32 = 0x8000000d
	TypeHCRTM            uint32 = 0x80000010
	TypeVariableAuth     uint32 = 0x800000e0 // EV_EFI_VARIABLE_AUTHORITY
	TypeSPDMBlob         uint32 = 0x800000e1
	TypeSPDMConfig       uint32 = 0x800000e2
	TypeSPDMDevicePolicy uint32 = 0x800000e3
	TypeSPDMDeviceAuth   uint32 = 0x800000e4
)

// Event is one event. Type and Data are hints: no PCR covers them.
type Event struct {
	Number int // position in the log
	PCR    int
	Type   uint32
	Data   []byte
	Digest attest.Digest // SHA-256; zero if the log has none

	// Digests within the log, nil if absent.
	sha1   *[20]byte
	sha256 *[32]byte
	sha384 *[48]byte
	sha512 *[64]byte
}

func (e *Event) setDigest(b Bank, digest []byte) {
	switch b {
	case SHA1:
		e.sha1 = (*[20]byte)(digest)
	case SHA256:
		e.sha256, e.Digest = (*[32]byte)(digest), attest.Digest(digest)
	case SHA384:
		e.sha384 = (*[48]byte)(digest)
	case SHA512:
		e.sha512 = (*[64]byte)(digest)
	}
}

// DigestIn returns the event's digest in a bank, nil if it has none.
func (e *Event) DigestIn(b Bank) []byte {
	switch {
	case b == SHA1 && e.sha1 != nil:
		return e.sha1[:]
	case b == SHA256 && e.sha256 != nil:
		return e.sha256[:]
	case b == SHA384 && e.sha384 != nil:
		return e.sha384[:]
	case b == SHA512 && e.sha512 != nil:
		return e.sha512[:]
	}
	return nil
}

// Log is a log that was read. Nothing in it is true before it was appraised.
type Log struct {
	Format Format
	Events []Event // those that extend a PCR
	Notes  []Event // EV_NO_ACTION events behind the header

	algorithms []algorithm
	count      int // events, the header among them
	padding    int // bytes behind the last event
}

// Padding is how many bytes of padding stood behind the last event.
func (l *Log) Padding() int { return l.padding }

// Declared lists the algorithms of the log's table, whether its banks can be
// replayed or not.
func (l *Log) Declared() (list []Bank) {
	for _, a := range l.algorithms {
		list = append(list, a.id)
	}
	return list
}

// Banks lists the banks that can be replayed and that every event of the log
// has a digest for, the one to prefer first.
func (l *Log) Banks() []Bank {
	var out []Bank
	for _, b := range banks {
		declared := slices.ContainsFunc(l.algorithms, func(a algorithm) bool { return a.id == b })
		if declared && l.has(b) {
			out = append(out, b)
		}
	}
	return out
}

// has reports whether every event has a digest in bank b.
func (l *Log) has(b Bank) bool {
	for i := range l.Events {
		if l.Events[i].DigestIn(b) == nil {
			return false
		}
	}
	return true
}

// Append adds the events of further logs of the same boot, in their order, as
// Windows writes one more log at each resume. They may use no algorithm that
// the first log does not declare.
func (l *Log) Append(more ...*Log) error {
	for i, m := range more {
		if l.Format != FormatAgile || m.Format != FormatAgile {
			return malformed("further log %d: only crypto-agile logs can be joined", i+1)
		}
		for _, a := range m.algorithms {
			if !slices.Contains(l.algorithms, a) {
				return malformed("further log %d: digests of algorithm 0x%04x, which the first log does not have", i+1, uint16(a.id))
			}
		}
		if l.count+m.count > MaxEvents {
			return attest.Refuse(attest.ReasonLogTooLarge, "event logs of over %d events", MaxEvents)
		}
		for _, e := range m.Events {
			e.Number += l.count
			l.Events = append(l.Events, e)
		}
		for _, e := range m.Notes {
			e.Number += l.count
			l.Notes = append(l.Notes, e)
		}
		l.count += m.count
	}
	return nil
}

// Parse reads a crypto-agile log with SHA-256 digests, for Check. Errors are
// *attest.Refusal with one of the ReasonLog codes.
func Parse(data []byte) (*Log, error) {
	l, err := Read(data)
	if err != nil {
		return nil, err
	}
	if l.Format != FormatAgile {
		return nil, attest.Refuse(attest.ReasonLogNoSHA256, "event log is not of the crypto-agile format; set the TPM to SHA-256 in the firmware")
	}
	for i := range l.Events {
		if e := &l.Events[i]; e.sha256 == nil {
			return nil, attest.Refuse(attest.ReasonLogNoSHA256, "event %d (PCR %d) has no SHA-256 digest", e.Number, e.PCR)
		}
	}
	return l, nil
}

// Check judges the log against pcrs, the values that a quote has proven, as
// strictly as Appraise can: whatever Appraise finds is a refusal unless it is
// of severity warn. pcrs must hold all of attest.QuotedPCRs, without what was
// extended after the boot: that comes from our own log (attest/runlog), never
// from the firmware's.
//
// A nil error proves, for each of attest.QuotedPCRs:
//
//   - pcrs has a value for it;
//   - if the value is not the reset value, the log has events for it;
//   - the log's events for it give exactly that value;
//   - for PCR 0 to 7, exactly one event is the legal separator, so that what
//     stands before it was measured by the firmware (section 3.3.2.2);
//   - in PCR 4 and 7 there are only event types that belong there;
//   - where an event's type says that its digest is of its data, it is.
//
// Errors are *attest.Refusal, with the findings that refuse.
func (l *Log) Check(pcrs map[int]attest.Digest) ([]attest.Finding, error) {
	values := make(map[int][]byte, len(attest.QuotedPCRs))
	for _, i := range attest.QuotedPCRs {
		v, ok := pcrs[i]
		if !ok {
			return nil, attest.Refuse(attest.ReasonPCRSelection, "no value of PCR %d", i)
		}
		values[i] = v[:]
	}
	r := l.Appraise(Options{Bank: SHA256, PCRs: values, Complete: true})
	var list []attest.Finding
	for _, f := range r.Findings {
		if f.Severity != attest.SeverityWarn {
			f.Severity = attest.SeverityBlock // a laptop of ours has no quirk that degrades
			list = append(list, f.Finding())
		}
	}
	if len(list) == 0 {
		return nil, nil
	}
	return list, attest.Refuse(list[0].Reason, "%s", list[0].Sentence.EN)
}

// guarded runs f under recover and a time limit. The caps make f finish by
// itself; should a fault of a parser break that, the caller does not hang.
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
