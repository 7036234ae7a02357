package tpm_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"testing"

	"sekisho/attest"
	"sekisho/attest/tpm"
	"sekisho/attest/tpm/faketpm"
)

// TestPlainSignatures verifies what other tools write: the bare signature.
func TestPlainSignatures(t *testing.T) {
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rs, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	message := []byte("message")
	digest := sha256.Sum256(message)
	for _, key := range []crypto.Signer{ec, rs} {
		der, err := x509.MarshalPKIXPublicKey(key.Public())
		if err != nil {
			t.Fatal(err)
		}
		s, err := tpm.ParseSigner(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
		if err != nil {
			t.Fatal(err)
		}
		plain, err := key.Sign(rand.Reader, digest[:], crypto.SHA256)
		if err != nil {
			t.Fatal(err)
		}
		sig, err := s.ParseSignature(plain)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Verify(message, sig); err != nil {
			t.Error(err)
		}
		if s.Verify([]byte("another"), sig) == nil || s.Restricted() {
			t.Error("another message was accepted, or a PEM key taken for restricted")
		}
		if _, err := s.ParseSignature(plain[:len(plain)-1]); err == nil {
			t.Error("a truncated signature was read")
		}
	}
}

// TestSignerForms reads the same key in all its forms.
func TestSignerForms(t *testing.T) {
	area := faketpm.New().Identity().AK
	sized := append([]byte{byte(len(area) >> 8), byte(len(area))}, area...)
	for name, data := range map[string][]byte{"TPMT_PUBLIC": area, "TPM2B_PUBLIC": sized, "Windows": append([]byte{'P', 'C', 'P', 'M', 8, 0, 0, 0}, append(sized, 1, 2, 3)...)} {
		if s, err := tpm.ParseSigner(data); err != nil || !s.Restricted() {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, data := range map[string][]byte{"nothing": nil, "too large": make([]byte, attest.MaxTPMBytes+1), "Windows without a key": []byte("PCPM\xff\xff\xff\xff")} {
		if _, err := tpm.ParseSigner(data); err == nil {
			t.Errorf("%s was read", name)
		}
	}
	for _, name := range []string{"guard-win-dell-bootctrs.pcpkey-Windows AIK.bin", "guard-win-supermicro-wbclquote.pcpkey-bla.bin"} {
		data, err := os.ReadFile("../../../shared/corpus/attest/eventlog-with-pcrs/" + name)
		if errors.Is(err, os.ErrNotExist) {
			t.Skip("needs the corpus beside the repository")
		}
		if s, err := tpm.ParseSigner(data); err != nil || !s.Restricted() {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzParseSigner(f *testing.F) {
	dev := faketpm.New()
	p, err := dev.Attest(attest.Digest{})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(dev.Identity().AK, p.QuoteSig)
	f.Add([]byte("PCPM\x08\x00\x00\x00\x00\x01x"), []byte{0x30, 0})
	f.Fuzz(func(t *testing.T, key, sig []byte) {
		s, err := tpm.ParseSigner(key)
		if err != nil {
			return
		}
		if v, err := s.ParseSignature(sig); err == nil && s.Verify([]byte("never signed"), v) == nil {
			t.Error("a forged signature was accepted")
		}
	})
}
