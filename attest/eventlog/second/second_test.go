package second_test

import (
	"crypto/sha256"
	"errors"
	"testing"

	"sekisho/attest"
	"sekisho/attest/eventlog"
	"sekisho/attest/eventlog/logtest"
	"sekisho/attest/eventlog/second"
)

func parse(t *testing.T, data []byte) *eventlog.Log {
	t.Helper()
	l, err := eventlog.Parse(data)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// TestDisagreement: what one reader has and the other has not is refused by
// name, whichever of the two is right.
func TestDisagreement(t *testing.T) {
	good := logtest.Image{Kernel: "k", Initramfs: "i", Cmdline: "c"}.Boot().Bytes()
	if err := second.Check(append(good, 0, 0, 0), parse(t, append(good, 0, 0, 0))); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(*eventlog.Log){
		"another PCR":    func(l *eventlog.Log) { l.Events[3].PCR++ },
		"another type":   func(l *eventlog.Log) { l.Events[3].Type++ },
		"another digest": func(l *eventlog.Log) { l.Events[3].Digest[0]++ },
		"other data":     func(l *eventlog.Log) { l.Events[3].Data = []byte("other") },
		"one less":       func(l *eventlog.Log) { l.Events = l.Events[:len(l.Events)-1] },
		"one more":       func(l *eventlog.Log) { l.Events = append(l.Events, l.Events[0]) },
	} {
		l := parse(t, good)
		change(l)
		var why *attest.Refusal
		if err := second.Check(good, l); !errors.As(err, &why) || why.Reason != attest.ReasonLogMalformed {
			t.Errorf("%s: %v", name, err)
		}
		// What was refused is not remembered.
		var m second.Memory
		for range 2 {
			if m.Check(sha256.Sum256(good), good, l) == nil {
				t.Errorf("%s: remembered as good", name)
			}
		}
	}
}

// TestMemory: an agreed log is not read again.
func TestMemory(t *testing.T) {
	good := logtest.Image{Kernel: "k"}.Boot().Bytes()
	l, digest := parse(t, good), attest.Digest(sha256.Sum256(good))
	var m second.Memory
	if err := m.Check(digest, good, l); err != nil {
		t.Fatal(err)
	}
	l.Events = nil
	if err := m.Check(digest, good, l); err != nil {
		t.Errorf("read again: %v", err)
	}
	if err := (*second.Memory)(nil).Check(digest, good, l); err == nil {
		t.Error("nobody's memory knows a log")
	}
}
