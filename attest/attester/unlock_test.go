package attester_test

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/attest/attester"
	"sekisho/attest/eventlog/logtest"
	"sekisho/attest/gate"
	"sekisho/attest/seal"
	"sekisho/attest/tpm"
	"sekisho/attest/tpm/tpmtest"
)

// TestUnlock takes a disk's key from attestd on a real TPM: it comes once in a
// boot, only for the volume's own header, its use is measured, and the
// verifier sees it and still affirms.
func TestUnlock(t *testing.T) {
	e := tpmtest.Start(t)
	boot := image.Boot()
	dev, err := tpm.Open(e.Socket)
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range boot.Extensions {
		if err := dev.Extend(x.PCR, x.Digest); err != nil {
			t.Fatal(err)
		}
	}
	signer := newKey(t)
	key, err := seal.NewReleaseKey(signer.Public())
	if err != nil {
		t.Fatal(err)
	}
	pcrs := boot.PCRs()
	release, err := seal.SignPolicy(signer, &attest.ReferenceValues{Image: "sekisho", Version: "1", PCRs: pcrs}, seal.FirstEpoch)
	if err != nil {
		t.Fatal(err)
	}
	if err := dev.CreateRollbackCounter(release, key); err != nil {
		t.Fatal(err)
	}
	header := attest.Digest{0xbe}
	volume, want, _, err := seal.NewVolume(seal.PurposeDisk, header, func(s seal.Secret) (seal.Sealed, error) {
		return dev.Seal(key, seal.PurposeDisk, nil, s)
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}

	m := machine{boot: boot, roots: e.Roots, open: func() (attester.Hardware, error) { return tpm.Open(e.Socket) }, events: writeFile(t, "")}
	s := newSite(t, m.roots, time.Hour, image.Reference("sekisho", "1"))
	p := newLaptop(t, s, m, newState(t, s.ticket()))
	p.untilState(gate.StateAffirming)
	req := gate.UnlockRequest{Header: header}
	if req.Volume, err = volume.Encode(); err != nil {
		t.Fatal(err)
	}
	if req.Release, err = release.Encode(); err != nil {
		t.Fatal(err)
	}
	swapped := req
	swapped.Header = attest.Digest{0xef}
	if _, err := p.client.Unlock(t.Context(), swapped); err == nil || !strings.Contains(err.Error(), "header") {
		t.Errorf("swapped header: %v", err)
	}
	before := len(s.service.Results())
	got, err := p.client.Unlock(t.Context(), req)
	if err != nil || !bytes.Equal(got, want.Reveal()) {
		t.Fatalf("unlock: %v", err)
	}
	if r := s.resultAfter(before); r.Status != attest.StatusAffirming {
		t.Errorf("the quote after it: %s %s", r.Reason, r.Detail)
	}
	if _, err := p.client.Unlock(t.Context(), req); err == nil || !strings.Contains(err.Error(), "PCR 15") {
		t.Errorf("a second time: %v", err)
	}
}

// TestUnlockNeedsMeasuring: where nothing can be measured no key is given.
func TestUnlockNeedsMeasuring(t *testing.T) {
	m := software(t, logtest.New())
	m.events = ""
	s := newSite(t, m.roots, time.Hour)
	a := attester.ForTest(t, s.organization(), func() (attester.Hardware, error) {
		hw, err := m.open()
		return opened{hw}, err
	}, nil, newState(t, attest.Ticket{}))
	signer := newKey(t)
	release, err := seal.SignPolicy(signer, &attest.ReferenceValues{PCRs: map[int]attest.Digest{7: {}, 11: {}}}, seal.FirstEpoch)
	if err != nil {
		t.Fatal(err)
	}
	data, err := release.Encode()
	if err != nil {
		t.Fatal(err)
	}
	v, _, _, err := seal.NewVolume(seal.PurposeDisk, attest.Digest{}, func(s seal.Secret) (seal.Sealed, error) {
		return seal.Sealed{Storage: make([]byte, 34), Private: bytes.Clone(s.Reveal())}, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if key, err := a.Unlock(v, attest.Digest{}, data); err == nil || !strings.Contains(err.Error(), "measured") {
		t.Errorf("%v, %v", key, err)
	}
}

// opened is a TPM that gives what was sealed to anyone.
type opened struct{ attester.Hardware }

func (opened) Unseal(s seal.Sealed, _ *seal.Release, _ seal.ReleaseKey, _ string) (seal.Secret, error) {
	return seal.NewSecret(bytes.Clone(s.Private)), nil
}
