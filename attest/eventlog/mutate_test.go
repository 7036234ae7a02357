package eventlog_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"maps"
	"slices"
	"strings"
	"testing"

	"sekisho/attest/eventlog"
	"sekisho/attest/eventlog/logtest"
)

// rawLog is a crypto-agile log cut into its events, so that it can be changed.
type rawLog struct {
	head   []byte
	events [][]byte
}

func cut(data []byte) (r rawLog) {
	size := func(b []byte) int { return int(binary.LittleEndian.Uint32(b)) }
	spec := data[32:]
	sizes := make(map[uint16]int)
	for i := range size(spec[24:]) {
		sizes[binary.LittleEndian.Uint16(spec[28+4*i:])] = int(binary.LittleEndian.Uint16(spec[30+4*i:]))
	}
	at := 32 + size(data[28:])
	r.head, data = data[:at], data[at:]
	for len(data) > 0 {
		at = 12
		for range size(data[8:]) {
			at += 2 + sizes[binary.LittleEndian.Uint16(data[at:])]
		}
		at += 4 + size(data[at:])
		r.events, data = append(r.events, data[:at]), data[at:]
	}
	return r
}

func (r rawLog) bytes(events ...[]byte) []byte {
	return slices.Concat(r.head, slices.Concat(events...))
}

func pcrOf(e []byte) int     { return int(int32(binary.LittleEndian.Uint32(e))) }
func typeOf(e []byte) uint32 { return binary.LittleEndian.Uint32(e[4:]) }

// mutable are the logs of real machines that pass with values of SHA-256.
func mutable(t *testing.T, each func(name string, raw rawLog, pcrs map[int][]byte, state eventlog.SecureBoot)) {
	readCorpus(t, "MANIFEST.md")
	n := 0
	for _, s := range samples {
		values := readBanks(t, strings.TrimSuffix(s.file, ".eventlog")+".pcrs.json")[eventlog.SHA256]
		if s.want != pass || values == nil || strings.Contains(s.file, "dl160") {
			continue
		}
		data := readCorpus(t, s.file)
		l, err := eventlog.Read(data)
		if err != nil {
			t.Fatal(err)
		}
		raw := cut(data[:len(data)-l.Padding()])
		if r := verdictOf(raw.bytes(raw.events...), values); r.Verdict != pass || r.SecureBoot != s.secureBoot {
			t.Fatalf("%s: cut and put together again: %+v", s.file, r.Findings)
		}
		n++
		each(s.file, raw, values, s.secureBoot)
	}
	if n < 10 {
		t.Errorf("%d logs were changed, want 10 and more", n)
	}
}

func verdictOf(data []byte, pcrs map[int][]byte) *eventlog.Report {
	l, err := eventlog.Read(data)
	if err != nil {
		return &eventlog.Report{}
	}
	return l.Appraise(eventlog.Options{Bank: eventlog.SHA256, PCRs: pcrs})
}

// TestMutations changes each event of real logs in turn, the TPM's values being
// what they were: left out, twice, exchanged with the next of its PCR, with
// another digest, in another PCR. None may pass.
func TestMutations(t *testing.T) {
	mutable(t, func(name string, raw rawLog, pcrs map[int][]byte, _ eventlog.SecureBoot) {
		for i, e := range raw.events {
			pcr := pcrOf(e)
			if typeOf(e) == eventlog.TypeNoAction || pcrs[pcr] == nil {
				continue
			}
			with := func(events ...[]byte) []byte {
				return raw.bytes(slices.Concat(raw.events[:i], events, raw.events[i+1:])...)
			}
			digest := bytes.Clone(e)
			digest[bytes.Index(e[12:], []byte{0x0b, 0})+14] ^= 1
			moved := bytes.Clone(e)
			moved[0] ^= 1
			untouched := bytes.Clone(e)
			binary.LittleEndian.PutUint32(untouched[4:], eventlog.TypeNoAction)
			for what, data := range map[string][]byte{
				"left out": with(), "twice": with(e, e), "another digest": with(digest), "another PCR": with(moved), "as no action": with(untouched),
			} {
				if r := verdictOf(data, pcrs); r.Verdict == pass {
					t.Errorf("%s: event %d (PCR %d, %s) %s: %+v", name, i+1, pcr, eventlog.TypeName(typeOf(e)), what, r.Findings)
				}
			}
			next := slices.IndexFunc(raw.events[i+1:], func(o []byte) bool { return pcrOf(o) == pcr && typeOf(o) != eventlog.TypeNoAction })
			if next < 0 || bytes.Equal(e[12:40], raw.events[i+1+next][12:40]) {
				continue
			}
			swapped := slices.Clone(raw.events)
			swapped[i], swapped[i+1+next] = swapped[i+1+next], swapped[i]
			if r := verdictOf(raw.bytes(swapped...), pcrs); r.Verdict == pass {
				t.Errorf("%s: events %d and %d exchanged: passes", name, i+1, i+next+2)
			}
		}
	})
}

// TestRelabelled adds the policy of a machine with Secure Boot behind the end
// of the log, as who controls a booted machine can: PCR 7 replays. And it calls
// each event of PCR 7, and both SecureBoot and the separator, all that may stand
// there, with their own data and with none. No log with policy behind the
// separator may pass, and none may say of Secure Boot what is not so.
func TestRelabelled(t *testing.T) {
	kinds := []uint32{2, eventlog.TypeSeparator, eventlog.TypeTag, eventlog.TypeVariableConfig, eventlog.TypeEFIAction,
		eventlog.TypeVariableAuth, eventlog.TypeSPDMDevicePolicy, eventlog.TypeSPDMDeviceAuth}
	forgery := func(state byte, separated bool) *logtest.Log {
		l := logtest.New()
		for _, v := range logtest.SecureBoot(state) {
			l.Hashed(7, eventlog.TypeVariableConfig, v)
		}
		if separated {
			l.Separator(7)
		}
		l.Hashed(7, eventlog.TypeVariableAuth, logtest.Variable("db", make([]byte, 16)))
		return l
	}
	mutable(t, func(name string, raw rawLog, pcrs map[int][]byte, state eventlog.SecureBoot) {
		var seven []int // events of PCR 7, the variable SecureBoot being the first
		separator := 0
		for i, e := range raw.events {
			if pcrOf(e) != 7 || typeOf(e) == eventlog.TypeNoAction {
				continue
			}
			if typeOf(e) == eventlog.TypeSeparator {
				separator = i
			}
			seven = append(seven, i)
		}
		forged := byte(1)
		if state == on {
			forged = 0
		}
		for _, f := range []*logtest.Log{forgery(forged, false), forgery(forged, true)} {
			more, values := cut(f.Bytes()).events, maps.Clone(pcrs)
			for _, x := range f.Extensions {
				v := sha256.Sum256(append(slices.Clone(values[7]), x.Digest[:]...))
				values[7] = v[:]
			}
			try := func(changes map[int]uint32, empty bool) {
				events := slices.Clone(raw.events)
				for i, kind := range changes {
					events[i] = relabel(events[i], kind, empty)
				}
				r := verdictOf(raw.bytes(slices.Concat(events, more)...), values)
				if r.SecureBoot != unknown && r.SecureBoot != state || r.Verdict == pass {
					t.Errorf("%s: relabelled %v: %s, Secure Boot %s, which is %s: %+v", name, changes, r.Verdict, r.SecureBoot, state, r.Findings)
				}
			}
			try(nil, false)
			for _, kind := range kinds {
				for _, empty := range []bool{false, true} {
					for _, i := range seven {
						try(map[int]uint32{i: kind}, empty)
					}
					for _, other := range kinds {
						try(map[int]uint32{seven[0]: kind, separator: other}, empty)
					}
				}
			}
		}
	})
}

// relabel gives an event another type, and no data if empty.
func relabel(e []byte, kind uint32, empty bool) []byte {
	e = bytes.Clone(e)
	binary.LittleEndian.PutUint32(e[4:], kind)
	if empty {
		at := 12
		for range binary.LittleEndian.Uint32(e[8:]) {
			at += 2 + eventlog.Bank(binary.LittleEndian.Uint16(e[at:])).Size()
		}
		e = append(e[:at], 0, 0, 0, 0)
	}
	return e
}
