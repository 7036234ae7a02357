package tpm_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"testing"

	"github.com/google/go-tpm/tpm2"

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
		if bare, err := tpm.ParseSigner(der); err != nil || !key.Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(bare.Key) {
			t.Errorf("in DER: %v", err)
		}
		plain, err := key.Sign(rand.Reader, digest[:], crypto.SHA256)
		if err != nil {
			t.Fatal(err)
		}
		sig, err := s.ParseSignature(plain, crypto.SHA256)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Verify(message, sig); err != nil {
			t.Error(err)
		}
		if s.Verify([]byte("another"), sig) == nil || s.Restricted() {
			t.Error("another message was accepted, or a PEM key taken for restricted")
		}
		if _, err := s.ParseSignature(plain[:len(plain)-1], crypto.SHA256); err == nil {
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

// TestSignerP384 is a key of machines that work in SHA-384 throughout.
func TestSignerP384(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	point, err := key.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	area := tpm2.TPMTPublic{
		Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA384,
		ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, Restricted: true, SignEncrypt: true},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{CurveID: tpm2.TPMECCNistP384, Scheme: tpm2.TPMTECCScheme{
			Scheme: tpm2.TPMAlgECDSA, Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA384})}}),
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{X: tpm2.TPM2BECCParameter{Buffer: point[1:49]}, Y: tpm2.TPM2BECCParameter{Buffer: point[49:]}}),
	}
	s, err := tpm.ParseSigner(tpm2.Marshal(area))
	if err != nil || !s.Restricted() || !key.PublicKey.Equal(s.Key) {
		t.Fatal(err)
	}
	digest := sha512.Sum384([]byte("message"))
	r, v, err := ecdsa.Sign(rand.Reader, key, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	sig, err := s.ParseSignature(tpm2.Marshal(tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgECDSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA, &tpm2.TPMSSignatureECC{
		Hash: tpm2.TPMAlgSHA384, SignatureR: tpm2.TPM2BECCParameter{Buffer: r.Bytes()}, SignatureS: tpm2.TPM2BECCParameter{Buffer: v.Bytes()}})}), crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Verify([]byte("message"), sig); err != nil {
		t.Error(err)
	}
	if s.Verify([]byte("another"), sig) == nil {
		t.Error("another message was accepted")
	}
	if err := s.Area.CheckAK(); err == nil {
		t.Error("a P-384 key is taken for an attestation key of ours")
	}
	off, _ := area.Unique.ECC()
	off.Y.Buffer[0] ^= 1
	if _, err := tpm.ParseSigner(tpm2.Marshal(area)); err == nil {
		t.Error("a point off the curve was read")
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
		if v, err := s.ParseSignature(sig, crypto.SHA256); err == nil && s.Verify([]byte("never signed"), v) == nil {
			t.Error("a forged signature was accepted")
		}
	})
}
