// Package second reads event logs with google/go-attestation, beside our own
// reader: who parses hostile input alone may be alone with a mistake. Both must
// find the same events, or the log counts as malformed.
//
// Our reader stays the first one. It caps what it reads before it allocates,
// knows padding, refuses a digest that comes twice, and takes a third of the
// time; go-attestation v0.6.4 does none of that, reads padding as events, and
// says nothing of an event's position. It does not know every algorithm: a log
// that declares one which it does not know is read by ours alone.
package second

import (
	"bytes"
	"fmt"
	"sync"

	parser "github.com/google/go-attestation/attest"

	"sekisho/attest"
	"sekisho/attest/eventlog"
)

// maxKnown bounds the logs that a Memory knows, per generation.
const maxKnown = 1 << 16

// Memory remembers logs on which both readers agree: a device shows the same
// log from boot to boot. The zero value, and nil, know none. It is safe for
// concurrent use.
type Memory struct {
	mu       sync.Mutex
	now, old map[attest.Digest]struct{}
}

// Check is the function Check for a log of that SHA-256, done once for each
// log while it is remembered.
func (m *Memory) Check(digest attest.Digest, data []byte, l *eventlog.Log) error {
	if m == nil {
		return Check(data, l)
	}
	m.mu.Lock()
	_, known := m.now[digest]
	if _, before := m.old[digest]; before && !known {
		known = true
		m.learn(digest)
	}
	m.mu.Unlock()
	if known {
		return nil
	}
	if err := Check(data, l); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.learn(digest)
	return nil
}

// learn notes a log. m.mu is held.
func (m *Memory) learn(digest attest.Digest) {
	if m.now == nil || len(m.now) >= maxKnown {
		m.old, m.now = m.now, make(map[attest.Digest]struct{})
	}
	m.now[digest] = struct{}{}
}

// Check demands that go-attestation reads from data, a crypto-agile log, the
// events that l has, in SHA-256. l must be what eventlog.Parse made of data.
// Errors are *attest.Refusal.
func Check(data []byte, l *eventlog.Log) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = disagree("the second one failed: %v", r)
		}
	}()
	for _, b := range l.Declared() {
		if b.Size() == 0 {
			return nil
		}
	}
	log, err := parser.ParseEventLog(data[:len(data)-l.Padding()])
	if err != nil {
		return disagree("the second one: %v", err)
	}
	i := 0
	for _, s := range log.Events(parser.HashSHA256) {
		if uint32(s.Type) == eventlog.TypeNoAction {
			continue
		}
		if i == len(l.Events) {
			return disagree("the second one reads more than %d events", i)
		}
		e := &l.Events[i]
		if s.Index != e.PCR || uint32(s.Type) != e.Type || !bytes.Equal(s.Data, e.Data) || !bytes.Equal(s.Digest, e.Digest[:]) {
			return disagree("event %d is another one to the second", e.Number)
		}
		i++
	}
	if i != len(l.Events) {
		return disagree("the second one reads %d events of %d", i, len(l.Events))
	}
	return nil
}

func disagree(format string, a ...any) *attest.Refusal {
	return attest.Refuse(attest.ReasonLogMalformed, "event log: two readers do not agree on it: %s", fmt.Sprintf(format, a...))
}
