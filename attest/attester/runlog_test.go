package attester_test

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/attest/attester"
	"sekisho/attest/gate"
)

// TestRunTimeEvents: an event is in the TPM and in the log, a new quote shows
// it at once, and the verifier still affirms; so does the next start of
// attestd, even if it died between writing and measuring.
func TestRunTimeEvents(t *testing.T) { machines(t, image.Boot(), runTimeEvents) }

func runTimeEvents(t *testing.T, m machine) {
	s := newSite(t, m.roots, time.Hour, image.Reference("sekisho", "1"))
	p := newLaptop(t, s, m, newState(t, s.ticket()))
	p.untilState(gate.StateAffirming)
	for _, e := range []attest.RunEvent{
		{Kind: attest.EventDiskKey, Detail: attest.Digest{1}},
		{Kind: attest.EventWorkDomain, Detail: attest.Digest{2}},
	} {
		before := len(s.service.Results())
		if err := p.client.Record(t.Context(), e); err != nil {
			t.Fatal(err)
		}
		// The credential lives for an hour: only the event asks for a quote.
		if r := s.resultAfter(before); r.Status != attest.StatusAffirming {
			t.Fatalf("after %s: %+v", e, r)
		}
	}
	p.stop()

	// attestd dies after writing an event, before measuring it.
	log := attester.OpenRunLog(m.events)
	dev, err := m.open()
	if err != nil {
		t.Fatal(err)
	}
	cut := errors.New("power cut")
	if err := log.RecordForTest(broken{dev, cut}, attest.RunEvent{Kind: attest.EventWorkDomain}); !errors.Is(err, cut) {
		t.Fatal(err)
	}
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
	p = newLaptop(t, s, m, p.state)
	p.untilState(gate.StateAffirming)
}

// resultAfter waits for the first result beyond those n that there were.
func (s *site) resultAfter(n int) attest.Result {
	s.t.Helper()
	tick, limit := time.NewTicker(5*time.Millisecond), time.After(20*time.Second)
	defer tick.Stop()
	for {
		if list := s.service.Results(); len(list) > n {
			return list[n]
		}
		select {
		case <-tick.C:
		case <-limit:
			s.t.Fatal("no quote followed the event")
		}
	}
}

// broken is a TPM that measures no more.
type broken struct {
	attester.Measurer
	err error
}

func (b broken) Extend(int, attest.Digest) error { return b.err }

// TestUnloggedExtensionIsRefused: whoever extends PCR 14 behind attestd's back
// loses the credential with the next quote.
func TestUnloggedExtensionIsRefused(t *testing.T) {
	m := software(t, image.Boot())
	s := newSite(t, m.roots, time.Hour, image.Reference("sekisho", "1"))
	p := newLaptop(t, s, m, newState(t, s.ticket()))
	p.untilState(gate.StateAffirming)
	dev, err := m.open()
	if err != nil {
		t.Fatal(err)
	}
	if err := dev.Extend(14, attest.Digest{7}); err != nil {
		t.Fatal(err)
	}
	if err := p.client.Record(t.Context(), attest.RunEvent{Kind: attest.EventWorkDomain}); err != nil {
		t.Fatal(err)
	}
	got, _ := p.untilState(gate.StateRefused)
	if got.Reason != attest.ReasonRunLogReplay.String() {
		t.Errorf("%+v", got)
	}
}

func TestRecordWithoutALog(t *testing.T) {
	m := software(t, image.Boot())
	m.events = filepath.Join(t.TempDir(), "absent")
	s := newSite(t, m.roots, time.Hour, image.Reference("sekisho", "1"))
	p := newLaptop(t, s, m, newState(t, s.ticket()))
	p.untilState(gate.StateAffirming)
	if err := p.client.Record(t.Context(), attest.RunEvent{Kind: attest.EventWorkDomain}); !errors.Is(err, gate.ErrNoEvents) {
		t.Error(err)
	}
	if err := p.client.Record(t.Context(), attest.RunEvent{}); err == nil {
		t.Error("an event without kind was accepted")
	}
}

// TestEventsAreForRoot: a user who may use the credential may not record.
func TestEventsAreForRoot(t *testing.T) {
	m := software(t, image.Boot())
	s := newSite(t, m.roots, time.Hour, image.Reference("sekisho", "1"))
	h := attester.HandlerForTest(t, s.organization(), m.open, attester.OpenRunLog(m.events), newState(t, s.ticket()))
	for name, ctx := range map[string]context.Context{
		"another user": attester.PeerForTest(t.Context(), 102),
		"unknown":      t.Context(),
	} {
		for _, path := range []string{"/v1/events", "/v1/unlock"} {
			w := httptest.NewRecorder()
			h.ServeHTTP(w, httptest.NewRequestWithContext(ctx, http.MethodPost, path, nil))
			if w.Code != http.StatusForbidden {
				t.Errorf("%s: %s: %d", name, path, w.Code)
			}
		}
	}
}
