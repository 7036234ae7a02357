package attester_test

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/attest/approval"
	"sekisho/attest/gate"
)

// TestLogonReport: a laptop's logons get into the audit of its verifier, once,
// and permits that two approvers have signed get to it; nobody reports in
// another's name.
func TestLogonReport(t *testing.T) {
	boot := image.Boot()
	m := software(t, boot)
	s := newSite(t, m.roots, time.Hour, image.Reference("sekisho", "1"))
	a, b := newKey(t), newKey(t)
	var text []byte
	for _, k := range []*ecdsa.PrivateKey{a, b} {
		der, err := x509.MarshalPKIXPublicKey(k.Public())
		if err != nil {
			t.Fatal(err)
		}
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})...)
	}
	approvers, err := approval.ParseApprovers(text, 2)
	if err != nil {
		t.Fatal(err)
	}
	s.service.Approvers = approvers
	p := newLaptop(t, s, m, newState(t, s.ticket()))
	p.untilState(gate.StateAffirming)
	device := s.enrolled()[0].ID

	permit := func(device attest.Digest, by ...*ecdsa.PrivateKey) *approval.Signed {
		t.Helper()
		signed, err := approval.New(attest.ApproveCard, attest.CardPermit{Serial: rand.Text(), Device: device, User: "taro", Do: attest.CardUnblock, Reason: "forgot it", Expires: time.Now().Add(time.Hour)})
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range by {
			if err := signed.Sign(k); err != nil {
				t.Fatal(err)
			}
		}
		return signed
	}
	for name, bad := range map[string]*approval.Signed{"one signature": permit(device, a), "twice one": permit(device, a, a), "no such device": permit(attest.Digest{2}, a, b)} {
		if _, err := s.service.AddCardPermit(t.Context(), bad); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	good := permit(device, a, b)
	if _, err := s.service.AddCardPermit(t.Context(), good); err != nil {
		t.Fatal(err)
	}
	if _, err := s.service.AddCardPermit(t.Context(), good); err == nil {
		t.Error("presented twice")
	}

	event := attest.LogonEvent{Number: 7, Time: time.Now().UTC().Truncate(time.Second), User: "taro", What: "9A", Factor: "finger+pin", Reason: "open", Result: "r"}
	for range 2 { // as if the first answer was lost
		answer, err := p.client.ReportLogon(t.Context(), attest.LogonNews{Events: []attest.LogonEvent{event}, Request: []byte(`{"csr":"AA=="}`)})
		if err != nil || answer.Stored != 7 || len(answer.Permits) != 1 {
			t.Fatalf("answer %+v, %v", answer, err)
		}
		if signed, err := approval.Parse(answer.Permits[0]); err != nil || signed.ID() != good.ID() {
			t.Errorf("the permit is %v", err)
		} else if _, _, err := approvers.Verify(attest.ApproveCard, signed); err != nil {
			t.Error(err)
		}
	}
	list, err := s.service.Logons(t.Context(), device)
	if err != nil || len(list) != 1 || list[0] != event {
		t.Errorf("the audit has %+v, %v", list, err)
	}
	if c, err := s.service.CardOf(t.Context(), device); err != nil || string(c.Request) != `{"csr":"AA=="}` {
		t.Errorf("card %+v, %v", c, err)
	}

	key := newKey(t)
	cert, err := s.service.Issuer.Issue(device, &key.PublicKey, "0123456789abcdef0123456789abcdef", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		device attest.Digest
		by     *ecdsa.PrivateKey
	}{"another device's name": {attest.Digest{2}, key}, "another key": {device, a}} {
		r := attest.LogonReport{Chain: [][]byte{cert}}
		if r.News, err = json.Marshal(attest.LogonNews{Device: c.device, Events: []attest.LogonEvent{event}}); err != nil {
			t.Fatal(err)
		}
		digest := attest.LogonDigest(r.News)
		if r.Signature, err = ecdsa.SignASN1(rand.Reader, c.by, digest[:]); err != nil {
			t.Fatal(err)
		}
		var why *attest.Refusal
		if _, _, err := s.service.Logon(t.Context(), r); !errors.As(err, &why) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
