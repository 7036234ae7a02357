package login

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"testing"
	"testing/synctest"
	"time"

	"sekisho/attest"
	"sekisho/attest/approval"
	"sekisho/attest/gate"
	"sekisho/hostos/login/fprint"
	"sekisho/hostos/login/piv"
)

var testDevice = attest.Digest{0xd1}

// desk is a verifier that passes permits on and keeps what is reported, two
// approvers, and a reader that takes any finger.
type permitDesk struct {
	*world
	keys    [2]*ecdsa.PrivateKey
	permits [][]byte
	news    []attest.LogonNews
	taken   []string
	away    error // of the next enrolments
}

func (d *permitDesk) ReportLogon(_ context.Context, n attest.LogonNews) (a attest.LogonAnswer, _ error) {
	d.news = append(d.news, n)
	for _, e := range n.Events {
		a.Stored = max(a.Stored, e.Number)
	}
	a.Permits = d.permits
	return a, nil
}

func (d *permitDesk) Enrol(_ context.Context, user, finger string, _ func(fprint.Feedback)) error {
	if d.away == nil {
		d.taken = append(d.taken, user+" "+finger)
	}
	return d.away
}
func (d *permitDesk) Delete(context.Context, string, string) error { return nil }
func (d *permitDesk) Prints() (map[string][]byte, error)           { return map[string][]byte{"f": {1}}, nil }

func newPermitDesk(t *testing.T) (*permitDesk, *Engine) {
	t.Helper()
	d := &permitDesk{world: newWorld()}
	e := issue(t, d.world, policy)
	var text []byte
	for i := range d.keys {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		der, err := x509.MarshalPKIXPublicKey(k.Public())
		if err != nil {
			t.Fatal(err)
		}
		d.keys[i] = k
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})...)
	}
	var err error
	if e.Approvers, err = approval.ParseApprovers(text, 2); err != nil {
		t.Fatal(err)
	}
	e.SetReader(d)
	d.affirm(e)
	return d, e
}

// affirm makes the laptop attested, under its device's name.
func (d *permitDesk) affirm(e *Engine) {
	d.set(gate.StateAffirming, time.Now().Add(time.Hour))
	d.status.DeviceID = testDevice.String()
	e.attest(d.status)
}

// sign makes a permit, signed by as many approvers.
func (d *permitDesk) sign(t *testing.T, p attest.CardPermit, signers ...*ecdsa.PrivateKey) []byte {
	t.Helper()
	p.Serial, p.Reason = rand.Text(), "test"
	if p.User == "" {
		p.User = "taro@EXAMPLE.LG.JP"
	}
	if p.Device == (attest.Digest{}) {
		p.Device = testDevice
	}
	if p.Expires.IsZero() {
		p.Expires = time.Now().Add(time.Hour)
	}
	s, err := approval.New(attest.ApproveCard, p)
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range signers {
		if err := s.Sign(k); err != nil {
			t.Fatal(err)
		}
	}
	data, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// TestPermits: what two approvers have signed for this laptop, card and time is
// done, once; nothing else is.
func TestPermits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, e := newPermitDesk(t)
		both := d.keys[:]
		report := func() {
			t.Helper()
			if err := e.report(t.Context(), d); err != nil {
				t.Fatal(err)
			}
		}
		report()
		before := len(e.store.get().Events)
		minutes := attest.CardPermit{Do: attest.CardPINOnly, Minutes: 60}
		other := minutes
		other.Device = attest.Digest{2}
		hanako := minutes
		hanako.User = "hanako@EXAMPLE.LG.JP"
		late, long, much := minutes, minutes, minutes
		late.Expires, long.Expires, much.Minutes = time.Now(), time.Now().AddDate(0, 1, 0), 25*60
		stranger, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		for name, p := range map[string][]byte{
			"one signature": d.sign(t, minutes, both[0]), "one person twice": d.sign(t, minutes, both[0], both[0]),
			"a stranger's": d.sign(t, minutes, both[0], stranger), "another laptop": d.sign(t, other, both...),
			"another user": d.sign(t, hanako, both...), "expired": d.sign(t, late, both...), "for a month": d.sign(t, long, both...),
			"for more than a day": d.sign(t, much, both...), "nothing known": d.sign(t, attest.CardPermit{Do: "open"}, both...), "noise": []byte("{}"),
		} {
			d.permits = [][]byte{p}
			report()
			if st := e.store.get(); !st.PINOnly.IsZero() || len(st.Used) > 0 || len(st.Events) != before {
				t.Errorf("%s: it was done: %+v", name, st.Events[before:])
			}
		}

		d.permits = [][]byte{d.sign(t, minutes, both...)}
		report()
		if e.store.get().PINOnly.IsZero() || e.lastEvent().Slot != "pin-only 60 minutes" || e.lastEvent().Permit == "" {
			t.Errorf("the PIN does not stand alone: %+v", e.lastEvent())
		}
		if err := e.AllowPINOnly(t.Context(), time.Time{}); err != nil {
			t.Fatal(err)
		}
		report()
		if !e.store.get().PINOnly.IsZero() {
			t.Error("a permit was used twice")
		}

		for range policy.PINTries {
			sign(t, e, "000000")
		}
		if sw := sign(t, e, pinText); sw != piv.Blocked {
			t.Errorf("after wrong PINs: %04X", uint16(sw))
		}
		d.permits = [][]byte{d.sign(t, attest.CardPermit{Do: attest.CardUnblock}, both...)}
		report()
		d.match <- nil
		if sw := sign(t, e, pinText); sw != piv.OK {
			t.Errorf("unblocked: %04X", uint16(sw))
		}
		padded, err := attest.PadCardPIN("654321")
		if err != nil {
			t.Fatal(err)
		}
		hash, err := attest.NewCardPINHash(padded)
		if err != nil {
			t.Fatal(err)
		}
		d.permits = [][]byte{d.sign(t, attest.CardPermit{Do: attest.CardPIN, PIN: &hash}, both...)}
		report()
		d.match <- nil
		if sw := sign(t, e, "654321"); sw != piv.OK {
			t.Errorf("the new PIN: %04X", uint16(sw))
		}

		// An enrolment waits for its person.
		d.permits, d.away = [][]byte{d.sign(t, attest.CardPermit{Do: attest.CardEnrol, Finger: "left-index-finger"}, both...)}, fprint.ErrEnrolment
		report()
		d.away = nil
		report()
		report()
		if len(d.taken) != 1 || d.taken[0] != "taro@EXAMPLE.LG.JP left-index-finger" {
			t.Errorf("fingers %q", d.taken)
		}
		e.timer.Stop()
	})
}

// TestIssueByPermit: a card is set up, certified and used by permits alone.
func TestIssueByPermit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, e := newPermitDesk(t)
		d.permits = [][]byte{d.sign(t, attest.CardPermit{Do: attest.CardSetup, User: "hanako@EXAMPLE.LG.JP", Name: "花子"}, d.keys[:]...)}
		for range 2 {
			if err := e.report(t.Context(), d); err != nil {
				t.Fatal(err)
			}
		}
		last := d.news[len(d.news)-1]
		if r, err := gate.ParseCardRequest(last.Request); err != nil || len(r.CSR) == 0 {
			t.Fatalf("no certificate request: %v", err)
		}
		if err := e.report(t.Context(), d); err != nil || string(d.news[len(d.news)-1].Request) != string(last.Request) {
			t.Errorf("the request changed: %v", err)
		}
		chain := certificate(t, d.key.Public(), nil)
		d.permits = [][]byte{d.sign(t, attest.CardPermit{Do: attest.CardImport, User: "hanako@EXAMPLE.LG.JP", Chain: string(chain)}, d.keys[:]...)}
		if err := e.report(t.Context(), d); err != nil {
			t.Fatal(err)
		}
		if e.lastEvent().Reason != Failed { // for nothing that a logon is
			t.Errorf("imported: %+v", e.lastEvent())
		}
		e.timer.Stop()
	})
}

// TestReport: events go out once, in order, as they come; none while the gate
// is shut.
func TestReport(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, e := newPermitDesk(t)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- e.Report(ctx, d) }()
		synctest.Wait()
		for range 3 {
			d.match <- nil
			sign(t, e, pinText)
			synctest.Wait()
		}
		d.set(gate.StateRefused, time.Time{})
		e.attest(d.status)
		sign(t, e, pinText)
		synctest.Wait()
		var got []attest.LogonEvent
		for _, n := range d.news {
			got = append(got, n.Events...)
		}
		if len(got) != 3 {
			t.Fatalf("%d events were reported, want 3", len(got))
		}
		d.affirm(e)
		synctest.Wait()
		got = append(got, d.news[len(d.news)-1].Events...)
		for i, ev := range got {
			if ev.Number != uint64(i+1) || (ev.Reason == "open") != (i < 3) || ev.User != "taro@EXAMPLE.LG.JP" || ev.Result == "" {
				t.Errorf("event %d: %+v", i, ev)
			}
		}
		if len(got) != 4 || e.store.get().Stored != 4 {
			t.Errorf("%d events, %d stored", len(got), e.store.get().Stored)
		}
		before := len(d.news)
		time.Sleep(reportEvery + time.Second) // of synctest's clock
		synctest.Wait()
		if len(d.news) != before+1 || len(d.news[before].Events) > 0 {
			t.Errorf("%d reports without news", len(d.news)-before)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		e.timer.Stop()
	})
}
