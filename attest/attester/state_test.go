package attester

import (
	"bytes"
	"errors"
	"io"
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/attest/gate"
)

// memory is a state partition in memory. A write past cut bytes is lost, as in
// a power cut.
type memory struct {
	data []byte
	cut  int // bytes that may still be written, negative: no limit
}

func newMemory() *memory { return &memory{make([]byte, PartitionSize), -1} }

func (m *memory) ReadAt(p []byte, at int64) (int, error) {
	n := copy(p, m.data[at:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (m *memory) WriteAt(p []byte, at int64) (int, error) {
	n := len(p)
	if m.cut >= 0 {
		n = min(n, m.cut)
		m.cut -= n
	}
	copy(m.data[at:], p[:n])
	if n < len(p) {
		return n, io.ErrShortWrite
	}
	return n, nil
}

func TestStateRoundTrip(t *testing.T) {
	m := newMemory()
	s := NewState(m)
	if _, err := s.Load(); !errors.Is(err, ErrNoRecord) {
		t.Errorf("new partition: %v, want ErrNoRecord", err)
	}
	for i := range 5 {
		want := Record{Enrolment: &attest.Enrolment{Device: attest.Digest{byte(i)}, Verifier: "v", Enrolled: time.Unix(int64(i), 0).UTC()}}
		if err := s.Store(want); err != nil {
			t.Fatal(err)
		}
		got, err := NewState(m).Load()
		if err != nil || *got.Enrolment != *want.Enrolment {
			t.Errorf("%d: %+v, %v", i, got, err)
		}
	}
}

// TestStatePowerCut cuts the power at each byte of a write: the record is the
// old one or the new one.
func TestStatePowerCut(t *testing.T) {
	m := newMemory()
	if err := NewState(m).Store(Record{Ticket: attest.NewTicket("old")}); err != nil {
		t.Fatal(err)
	}
	before := bytes.Clone(m.data)
	fresh := Record{Enrolment: &attest.Enrolment{Device: attest.Digest{1}}}
	whole, err := encodeRecord(2, fresh)
	if err != nil {
		t.Fatal(err)
	}
	for cut := range len(whole) + 1 {
		m := &memory{bytes.Clone(before), cut}
		err := NewState(m).Store(fresh)
		m.cut = -1
		r, lerr := NewState(m).Load()
		if lerr != nil {
			t.Fatalf("cut after %d bytes: %v", cut, lerr)
		}
		if (err == nil) != (r.Enrolment != nil) || (r.Enrolment == nil) != (r.Ticket.Reveal() == "old") {
			t.Fatalf("cut after %d bytes: %+v, store said %v", cut, r, err)
		}
		if err := NewState(m).Store(fresh); err != nil {
			t.Fatalf("cut after %d bytes: the next write: %v", cut, err)
		}
	}
}

func TestStateErase(t *testing.T) {
	m := newMemory()
	s := NewState(m)
	for _, r := range []Record{{Ticket: attest.NewTicket("old secret")}, {Enrolment: &attest.Enrolment{}}} {
		if err := s.Store(r); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Erase(); err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(m.data, []byte("old secret")) {
		t.Error("the ticket is still there")
	}
	if r, err := s.Load(); err != nil || r.Enrolment == nil {
		t.Errorf("%+v, %v", r, err)
	}
}

func FuzzDecodeRecord(f *testing.F) {
	data, err := encodeRecord(7, Record{Ticket: attest.NewTicket("t")})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add(make([]byte, headSize))
	f.Fuzz(func(t *testing.T, data []byte) {
		seq, r, err := decodeRecord(data)
		if err != nil {
			return
		}
		again, err := encodeRecord(seq, r)
		if err != nil {
			t.Fatal(err)
		}
		if q, _, err := decodeRecord(again); err != nil || q != seq {
			t.Errorf("%d, %v after a round trip of %d", q, err, seq)
		}
	})
}

// TestNext goes through all facts: affirming needs a TPM, a credential in force
// and no refusal, and nothing else says affirming.
func TestNext(t *testing.T) {
	now := time.Unix(1000, 0)
	if got := Next(Facts{}, now); got != gate.StateNoTPM {
		t.Errorf("no facts: %s", got)
	}
	seen := make(map[string]bool)
	for bits := range 32 {
		for _, notAfter := range []time.Time{{}, now.Add(-1), now, now.Add(1)} {
			f := Facts{bits&1 != 0, bits&2 != 0, bits&4 != 0, bits&8 != 0, bits&16 != 0, notAfter}
			got := Next(f, now)
			seen[got] = true
			if want := f.TPM && !f.Refused && now.Before(notAfter); (got == gate.StateAffirming) != want {
				t.Errorf("%+v: %s", f, got)
			}
			if _, open := gate.Open(gate.Status{State: got, NotAfter: notAfter}, gate.Tunnel, now); open && got != gate.StateAffirming {
				t.Errorf("%+v: %s opens the tunnel", f, got)
			}
		}
	}
	if len(seen) != 7 {
		t.Errorf("states reached: %v", seen)
	}
}
