package attester_test

import (
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/attest/gate"
	"sekisho/attest/tpm"
)

// TestZeroTouch: a laptop without a ticket stays unenrolled until its TPM is
// on the purchase list, then enrols by itself.
func TestZeroTouch(t *testing.T) {
	m := software(t, image.Boot())
	s := newSite(t, m.roots, time.Hour, image.Reference("sekisho", "1"))
	p := newLaptop(t, s, m, newState(t, attest.Ticket{}))
	got, _ := p.until(func(g gate.Status) bool { return g.State == gate.StateUnenrolled && g.Reason != "" })
	if got.Reason != attest.ReasonNoTicket.String() {
		t.Errorf("%+v", got)
	}
	dev, err := m.open()
	if err != nil {
		t.Fatal(err)
	}
	ek, err := tpm.ParsePublic(dev.Identity().EK)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.service.AddPurchase(t.Context(), []attest.Digest{attest.DeviceID(ek.Name())}, "delivery"); err != nil {
		t.Fatal(err)
	}
	p.untilState(gate.StateAffirming)
}
