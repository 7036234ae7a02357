package attester_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"maps"
	"slices"
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/attest/attester"
	"sekisho/attest/gate"
	"sekisho/attest/seal"
	"sekisho/attest/tpm"
	"sekisho/attest/tpm/tpmtest"
)

// TestVolume takes a disk's key through its life on a real TPM: made, its
// recovery key in escrow, bound once, opened at the next boot, and after the
// TPM lost it by the recovery key, which seals it anew.
func TestVolume(t *testing.T) {
	e := tpmtest.Start(t)
	boot := image.Boot()
	open := func() (attester.Hardware, error) { return tpm.Open(e.Socket) }
	extend := func() {
		t.Helper()
		dev, err := tpm.Open(e.Socket)
		if err != nil {
			t.Fatal(err)
		}
		for _, x := range boot.Extensions {
			if err := dev.Extend(x.PCR, x.Digest); err != nil {
				t.Fatal(err)
			}
		}
		if err := dev.Close(); err != nil {
			t.Fatal(err)
		}
	}
	extend()
	signer, escrow := newKey(t), newKey(t)
	r, err := seal.SignPolicy(signer, &attest.ReferenceValues{Image: "sekisho", Version: "1", PCRs: boot.PCRs()}, seal.FirstEpoch)
	if err != nil {
		t.Fatal(err)
	}
	release, err := r.Encode()
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(escrow.Public())
	if err != nil {
		t.Fatal(err)
	}

	m := machine{boot: boot, roots: e.Roots, open: open, events: writeFile(t, "")}
	s := newSite(t, m.roots, time.Hour, image.Reference("sekisho", "1"))
	p := newLaptop(t, s, m, newState(t, s.ticket()))
	p.untilState(gate.StateAffirming)
	var no *gate.KeyRefused
	if _, err := p.client.NewVolume(t.Context(), gate.VolumeRequest{Release: release}); !errors.As(err, &no) || !slices.Equal(no.Codes, []string{gate.CodeNoEscrow}) {
		t.Errorf("without escrow key: %v", err)
	}
	p.stop()

	s.escrowKey = string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
	p = newLaptop(t, s, m, p.state)
	p.untilState(gate.StateAffirming)
	v, err := p.client.NewVolume(t.Context(), gate.VolumeRequest{Release: release})
	if err != nil {
		t.Fatal(err)
	}
	header := attest.Digest{0xbe}
	s.stop()
	if _, err := p.client.BindVolume(t.Context(), gate.BindRequest{ID: v.ID, Header: header}); !errors.Is(err, gate.ErrNotEscrowed) {
		t.Errorf("verifier away: %v", err)
	}
	s.start(s.address)
	bound, err := p.client.BindVolume(t.Context(), gate.BindRequest{ID: v.ID, Header: header})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.client.BindVolume(t.Context(), gate.BindRequest{ID: v.ID, Header: header}); err == nil {
		t.Error("bound twice")
	}
	device := s.enrolled()[0].ID
	list, err := s.service.EscrowsOf(t.Context(), device)
	if err != nil || len(list) != 1 || !bytes.Equal(list[0].Volume, v.ID) {
		t.Fatalf("in escrow: %+v, %v", list, err)
	}
	unlock := gate.UnlockRequest{Volume: bound, Header: header, Release: release}
	if _, err := p.client.Unlock(t.Context(), unlock); !errors.As(err, &no) || !slices.Equal(no.Codes, []string{gate.CodeUsed}) {
		t.Errorf("in the boot that made it: %v", err)
	}
	if err := p.client.RaiseRollback(t.Context(), gate.VolumeRequest{Release: release}); err != nil {
		t.Error(err)
	}
	p.stop()

	e.Restart()
	extend()
	m.events = writeFile(t, "")
	p = newLaptop(t, s, m, p.state)
	p.untilState(gate.StateAffirming)
	other := unlock
	other.Header = attest.Digest{1}
	if _, err := p.client.Unlock(t.Context(), other); !errors.As(err, &no) || !slices.Equal(no.Codes, []string{gate.CodeHeader}) {
		t.Errorf("another header: %v", err)
	}
	if key, err := p.client.Unlock(t.Context(), unlock); err != nil || !bytes.Equal(key, v.Key) {
		t.Errorf("next boot: %v", err)
	}
	if _, err := p.client.Recover(t.Context(), gate.RecoverRequest{UnlockRequest: unlock, Recovery: "000011"}); !errors.As(err, &no) || !slices.Equal(no.Codes, []string{gate.CodeRecovery}) {
		t.Errorf("a mistyped recovery key: %v", err)
	}
	got, err := p.client.Recover(t.Context(), gate.RecoverRequest{UnlockRequest: unlock, Recovery: v.Recovery})
	if err != nil || !bytes.Equal(got.Key, v.Key) {
		t.Fatalf("recovery key: %v", err)
	}
	if again, err := seal.ParseVolume(got.Volume); err != nil || bytes.Equal(got.Volume, bound) || !bytes.Equal(again.ID, v.ID) {
		t.Errorf("sealed anew: %v", err)
	}
	checkUpdates(t, p.client, release, signer, newKey(t), boot.PCRs())
}

// checkUpdates asks for releases that may follow the running one, whose epoch
// the counter has reached, and that may not.
func checkUpdates(t *testing.T, c *gate.Client, running []byte, signer, stranger *ecdsa.PrivateKey, pcrs map[int]attest.Digest) {
	t.Helper()
	release := func(key *ecdsa.PrivateKey, epoch uint64, change int) []byte {
		values := maps.Clone(pcrs)
		if change > 0 {
			values[change] = attest.Digest{1}
		}
		r, err := seal.SignPolicy(key, &attest.ReferenceValues{Image: "sekisho", Version: "2", PCRs: values}, epoch)
		if err != nil {
			t.Fatal(err)
		}
		data, err := r.Encode()
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	ask := func(next []byte) []string {
		t.Helper()
		err := c.CheckUpdate(t.Context(), gate.UpdateRequest{Running: running, Next: next})
		var no *gate.KeyRefused
		if err != nil && !errors.As(err, &no) {
			t.Fatal(err)
		}
		if no == nil {
			return nil
		}
		return no.Codes
	}
	for name, x := range map[string]struct {
		next []byte
		want []string
	}{
		"the next image":          {release(signer, seal.FirstEpoch+1, 11), nil},
		"another release key":     {release(stranger, seal.FirstEpoch+1, 11), []string{gate.CodePolicy}},
		"other Secure Boot keys":  {release(signer, seal.FirstEpoch+1, 7), []string{gate.CodeSecureBoot}},
		"no release":              {[]byte("{}"), []string{gate.CodePolicy}},
		"a release with one flip": {bytes.Replace(release(signer, seal.FirstEpoch+1, 11), []byte(`"epoch": 17`), []byte(`"epoch": 18`), 1), []string{gate.CodePolicy}},
	} {
		if got := ask(x.next); !slices.Equal(got, x.want) {
			t.Errorf("%s: %q, want %q", name, got, x.want)
		}
	}
	newer := release(signer, seal.FirstEpoch+2, 0)
	if err := c.RaiseRollback(t.Context(), gate.VolumeRequest{Release: newer}); err != nil {
		t.Fatal(err)
	}
	if got := ask(release(signer, seal.FirstEpoch+1, 11)); !slices.Equal(got, []string{gate.CodeRolledBack}) {
		t.Errorf("older than the counter: %q", got)
	}
}

// TestEscrowIsTheDevicesOwn: nobody stores a recovery key in another's name,
// and none is exchanged.
func TestEscrowIsTheDevicesOwn(t *testing.T) {
	boot := image.Boot()
	m := software(t, boot)
	s := newSite(t, m.roots, time.Hour, image.Reference("sekisho", "1"))
	newLaptop(t, s, m, newState(t, s.ticket())).untilState(gate.StateAffirming)
	key, stranger := newKey(t), newKey(t)
	device := s.enrolled()[0].ID
	cert, err := s.service.Issuer.Issue(device, &key.PublicKey, "0123456789abcdef0123456789abcdef", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	request := func(device attest.Digest, volume byte, by *ecdsa.PrivateKey) attest.EscrowRequest {
		t.Helper()
		e, err := seal.NewEscrow(&stranger.PublicKey, device, bytes.Repeat([]byte{volume}, 16), seal.NewRecovery(), time.Now())
		if err != nil {
			t.Fatal(err)
		}
		r := attest.EscrowRequest{Chain: [][]byte{cert}}
		if r.Escrow, err = json.Marshal(e); err != nil {
			t.Fatal(err)
		}
		digest := attest.EscrowDigest(r.Escrow)
		if r.Signature, err = ecdsa.SignASN1(rand.Reader, by, digest[:]); err != nil {
			t.Fatal(err)
		}
		return r
	}
	good := request(device, 1, key)
	if err := s.service.Escrow(t.Context(), good); err != nil {
		t.Fatal(err)
	}
	if err := s.service.Escrow(t.Context(), request(device, 1, key)); err != nil {
		t.Errorf("the same volume again: %v", err)
	}
	if list, err := s.service.EscrowsOf(t.Context(), device); err != nil || len(list) != 1 || !bytes.Contains(good.Escrow, []byte(`"created"`)) {
		t.Errorf("%d in escrow, %v", len(list), err)
	} else if kept, err := json.Marshal(list[0]); err != nil || !bytes.Equal(kept, good.Escrow) {
		t.Error("the escrow was exchanged")
	}
	none := good
	none.Chain = nil
	foreign := good
	foreign.Chain = [][]byte{s.servers.cert.Raw}
	for name, r := range map[string]attest.EscrowRequest{
		"another device's name": request(attest.Digest{2}, 2, key),
		"another key":           request(device, 3, stranger),
		"no certificate":        none,
		"another CA":            foreign,
		"nothing":               {},
	} {
		var why *attest.Refusal
		if err := s.service.Escrow(t.Context(), r); !errors.As(err, &why) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if list, err := s.service.EscrowsOf(t.Context(), attest.Digest{2}); err != nil || len(list) != 0 {
		t.Errorf("stored for another device: %+v, %v", list, err)
	}
}
