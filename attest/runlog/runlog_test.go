package runlog

import (
	"bytes"
	"encoding/hex"
	"errors"
	"testing"

	"sekisho/attest"
)

func build(t testing.TB, events ...attest.RunEvent) []byte {
	t.Helper()
	var log []byte
	for _, e := range events {
		var err error
		if log, err = Append(log, e); err != nil {
			t.Fatal(err)
		}
	}
	return log
}

var (
	work = attest.RunEvent{Kind: attest.EventWorkDomain, Detail: attest.Digest{1}}
	disk = attest.RunEvent{Kind: attest.EventDiskKey, Detail: attest.Digest{2}}
)

func TestRoundTrip(t *testing.T) {
	log := build(t, disk, work, work)
	events, err := Parse(log)
	if err != nil || len(events) != 3 || events[0] != disk || events[2] != work {
		t.Errorf("%v, %v", events, err)
	}
	// A frozen record: a change would cut off laptops from older verifiers.
	want := "00000000080000000000000000" + "01000000010e" + "0300000025" + "0b00000020" +
		hex.EncodeToString(func() []byte { d := Digest(work); return d[:] }()) +
		"e000000025" + "0100000020" + "01" + hex.EncodeToString(make([]byte, 31))
	if got := hex.EncodeToString(build(t, work)); got != want {
		t.Errorf("record\n%s, want\n%s", got, want)
	}
}

func TestParseRefuses(t *testing.T) {
	good := build(t, work, disk)
	for name, log := range map[string][]byte{
		"truncated":   good[:len(good)-1],
		"reordered":   append(bytes.Clone(good[recordSize:]), good[:recordSize]...),
		"gap":         good[recordSize:],
		"other kind":  changed(good, recordSize-contentSize, 9),
		"other PCR":   changed(good, tlvHead+8+tlvHead, 11),
		"relabelled":  changed(good, recordSize-contentSize, byte(attest.EventDiskKey)),
		"digest":      changed(good, tlvHead+8+tlvHead+1+2*tlvHead, 0xff),
		"over limits": bytes.Repeat(good, MaxEvents),
	} {
		if _, err := Parse(log); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Append(nil, attest.RunEvent{}); err == nil {
		t.Error("an event without kind was recorded")
	}
}

func changed(b []byte, at int, to byte) []byte {
	b = bytes.Clone(b)
	if b[at] == to {
		to++
	}
	b[at] = to
	return b
}

func TestAtBoot(t *testing.T) {
	zero := map[int]attest.Digest{11: {9}, 14: {}, 15: {}}
	if boot, events, err := AtBoot(zero, nil); err != nil || len(events) > 0 || boot[11] != zero[11] {
		t.Errorf("no events: %v, %v, %v", boot, events, err)
	}
	log := build(t, work, disk)
	after := Replay([]attest.RunEvent{work, disk})
	after[11] = attest.Digest{9}
	boot, events, err := AtBoot(after, log)
	if err != nil || len(events) != 2 || boot[14] != (attest.Digest{}) || boot[15] != (attest.Digest{}) || boot[11] != after[11] {
		t.Errorf("%v, %v, %v", boot, events, err)
	}
	for name, c := range map[string]struct {
		pcrs map[int]attest.Digest
		log  []byte
	}{
		"logged, not extended": {zero, log},
		"extended by more":     {map[int]attest.Digest{14: {1}, 15: after[15]}, log},
		"PCR not quoted":       {map[int]attest.Digest{14: after[14]}, log},
		"malformed":            {after, log[1:]},
	} {
		var why *attest.Refusal
		if _, _, err := AtBoot(c.pcrs, c.log); !errors.As(err, &why) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(build(f, work, disk))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		events, err := Parse(data)
		if err != nil {
			return
		}
		if !bytes.Equal(build(t, events...), data) {
			t.Error("accepted another encoding than its own")
		}
	})
}
