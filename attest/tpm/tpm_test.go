package tpm_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"path/filepath"
	"testing"

	"sekisho/attest"
	"sekisho/attest/tpm"
	"sekisho/attest/tpm/tpmtest"
)

func open(t *testing.T, e *tpmtest.Emulator) *tpm.TPM {
	t.Helper()
	dev, err := tpm.Open(e.Socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := dev.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return dev
}

func public(t *testing.T, data []byte) *tpm.Public {
	t.Helper()
	p, err := tpm.ParsePublic(data)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestOpenWithoutTPM(t *testing.T) {
	if _, err := tpm.Open(filepath.Join(t.TempDir(), "none")); !errors.Is(err, tpm.ErrNoTPM) {
		t.Errorf("got %v, want ErrNoTPM", err)
	}
}

func TestKeys(t *testing.T) {
	e := tpmtest.Start(t)
	dev := open(t, e)
	id := dev.Identity()
	if len(id.EKCertificate) == 0 {
		t.Error("no EK certificate")
	}
	if err := public(t, id.EK).CheckEK(); err != nil {
		t.Error(err)
	}
	ak, key := public(t, id.AK), public(t, dev.Identity().Key)
	if err := ak.CheckAK(); err != nil {
		t.Error(err)
	}
	if err := key.CheckCredentialKey(); err != nil {
		t.Error(err)
	}
	if ak.CheckCredentialKey() == nil || key.CheckAK() == nil {
		t.Error("AK and credential key are taken for one another")
	}
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
	again := open(t, e)
	if !bytes.Equal(again.Identity().AK, id.AK) {
		t.Error("the AK is another one after reopening")
	}
	if bytes.Equal(again.Identity().Key, key.Bytes) {
		t.Error("the credential key is the same after reopening")
	}
}

// TestCAsOfTheTPM reads the CAs that a TPM brings along, as Intel's do.
func TestCAsOfTheTPM(t *testing.T) {
	e := tpmtest.Start(t)
	plain, err := tpm.Open(e.Socket)
	if err != nil {
		t.Fatal(err)
	}
	cert := plain.Identity().EKCertificate
	for i, data := range [][]byte{bytes.Repeat([]byte{1}, 700), bytes.Repeat([]byte{2}, 1400)} {
		if err := plain.DefineCA(i, data); err != nil {
			t.Fatal(err)
		}
		cert = append(bytes.Clone(cert), data...)
	}
	if err := plain.Close(); err != nil {
		t.Fatal(err)
	}
	if got := open(t, e).Identity().EKCertificate; !bytes.Equal(got, cert) {
		t.Errorf("%d bytes, want %d", len(got), len(cert))
	}
}

func TestActivate(t *testing.T) {
	dev := open(t, tpmtest.Start(t))
	id := dev.Identity()
	secret := sha256.Sum256([]byte("secret"))
	ek, ak := public(t, id.EK), public(t, id.AK)
	blob, enc, err := tpm.MakeCredential(ek, ak.Name(), secret[:])
	if err != nil {
		t.Fatal(err)
	}
	got, err := dev.Activate(blob, enc)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, secret[:]) {
		t.Error("another secret came back")
	}
	other := bytes.Clone(ak.Name())
	other[5] ^= 1
	if blob, enc, err = tpm.MakeCredential(ek, other, secret[:]); err != nil {
		t.Fatal(err)
	}
	if _, err := dev.Activate(blob, enc); err == nil {
		t.Error("a credential for another AK was activated")
	}
	// Nothing leaks: the TPM has few slots for keys and sessions.
	for range 8 {
		if _, err := dev.Activate(blob, enc); err == nil {
			t.Error("a credential for another AK was activated")
		}
	}
	if _, err := dev.Attest(attest.Digest{1}); err != nil {
		t.Error(err)
	}
}

func TestAttest(t *testing.T) {
	dev := open(t, tpmtest.Start(t))
	extra := attest.Digest{1, 2, 3}
	if err := dev.Extend(11, attest.Digest{9}); err != nil {
		t.Fatal(err)
	}
	p, err := dev.Attest(extra)
	if err != nil {
		t.Fatal(err)
	}
	if p.PCRs[11] == (attest.Digest{}) || len(p.PCRs) != len(attest.QuotedPCRs) {
		t.Errorf("PCRs: %v", p.PCRs)
	}
	ak, key := public(t, dev.Identity().AK), public(t, dev.Identity().Key)
	if err := tpm.VerifySignature(ak, p.Quote, p.QuoteSig); err != nil {
		t.Error(err)
	}
	if err := tpm.VerifySignature(key, p.Quote, p.QuoteSig); err == nil {
		t.Error("the quote verifies with the credential key")
	}
	s, err := tpm.ParseStatement(p.Quote)
	if err != nil {
		t.Fatal(err)
	}
	if !s.ExactlyQuoted() || !s.IsSigner(ak) || s.IsSigner(key) || !bytes.Equal(s.ExtraData, extra[:]) {
		t.Errorf("quote: %+v", s)
	}
	c, err := tpm.ParseStatement(p.Certify)
	if err != nil {
		t.Fatal(err)
	}
	if err := tpm.VerifySignature(ak, p.Certify, p.CertifySig); err != nil {
		t.Error(err)
	}
	if !c.Certifies(key) || c.Certifies(ak) || !c.IsSigner(ak) {
		t.Errorf("certify: %+v", c)
	}
}

func TestSign(t *testing.T) {
	dev := open(t, tpmtest.Start(t))
	digest := sha256.Sum256([]byte("message"))
	sig, err := dev.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	if !ecdsa.VerifyASN1(dev.Public().(*ecdsa.PublicKey), digest[:], sig) {
		t.Error("the signature does not verify")
	}
	if _, err := dev.Sign(rand.Reader, digest[:20], crypto.SHA1); err == nil {
		t.Error("a SHA-1 digest was signed")
	}
}
