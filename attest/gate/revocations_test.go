package gate

import (
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"sekisho/attest"
)

// TestSilence: ten seconds after the last word nothing is relied on, while
// what was revoked stays so.
func TestSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := NewRevocations(Feed{Organization: "o", Log: slog.New(slog.DiscardHandler)})
		if r.Heard() == nil {
			t.Error("relied on before a word")
		}
		gone := attest.Digest{1}
		if err := r.take(&attest.Revocations{Organization: "o", Sequence: 3, Full: true, Changes: []attest.Revocation{{Device: gone, Sequence: 3, Revoked: true}}}, true); err != nil {
			t.Fatal(err)
		}
		time.Sleep(attest.RevocationSilence - time.Millisecond)
		if err := r.Heard(); err != nil {
			t.Error(err)
		}
		if err := r.take(&attest.Revocations{Organization: "o", Sequence: 3}, false); err != nil {
			t.Fatal(err)
		}
		time.Sleep(attest.RevocationSilence - time.Millisecond)
		if err := r.Heard(); err != nil {
			t.Error("after a heartbeat:", err)
		}
		time.Sleep(time.Millisecond)
		if r.Heard() == nil || !r.Revoked(attest.Holder{Device: gone}) {
			t.Error("after the silence")
		}
		for name, m := range map[string]*attest.Revocations{
			"older": {Organization: "o", Sequence: 2, Full: true},
			"other": {Organization: "p", Sequence: 4, Full: true},
			"part":  {Organization: "o", Sequence: 4},
		} {
			if r.take(m, true) == nil || !r.Revoked(attest.Holder{Device: gone}) || r.Heard() == nil {
				t.Errorf("%s message was taken", name)
			}
		}
	})
}
