// Package faketpm is a TPM in software for tests that need no privilege. Its
// keys are made to the same templates, written here a second time, and it can
// sign statements that no real TPM would.
package faketpm

import (
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/big"
	"time"

	"github.com/google/go-tpm/tpm2"

	"sekisho/attest"
	"sekisho/attest/tpm"
)

// TPM is a TPM in software. The zero value is of no use; see New.
type TPM struct {
	PCRs  map[int]attest.Digest // of the next quote
	Clock tpm.Clock             // of the next statement; it rises by itself

	ek, ak, key *ecdsa.PrivateKey
	id          tpm.Identity
}

// New returns a TPM with keys of its own and PCRs in their reset state. It
// has no EK certificate; see Certify.
func New() *TPM {
	t := &TPM{PCRs: make(map[int]attest.Digest), Clock: tpm.Clock{Clock: 1000, ResetCount: 1, Safe: true}}
	for _, i := range attest.QuotedPCRs {
		t.PCRs[i] = attest.Digest{}
	}
	for _, k := range []**ecdsa.PrivateKey{&t.ek, &t.ak, &t.key} {
		var err error
		if *k, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			panic(err) // rand.Reader does not fail
		}
	}
	t.describe()
	return t
}

// describe makes the public areas of the keys.
func (t *TPM) describe() {
	ek := tpm2.ECCEKTemplate
	ek.Unique = point(&t.ek.PublicKey)
	t.id.EK, t.id.AK, t.id.Key = tpm2.Marshal(ek), public(&t.ak.PublicKey, true), public(&t.key.PublicKey, false)
}

// Certify gives the TPM an EK certificate by ca.
func (t *TPM) Certify(ca *x509.Certificate, key crypto.Signer, change func(*x509.Certificate)) error {
	template := &x509.Certificate{
		SerialNumber: big.NewInt(3), KeyUsage: x509.KeyUsageKeyAgreement,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	if change != nil {
		change(template)
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, ca, t.ek.Public(), key)
	t.id.EKCertificate = cert
	return err
}

// Renew gives the TPM another attestation key, as no real TPM can.
func (t *TPM) Renew() {
	t.ak = New().ak
	t.describe()
}

// Identity is as of a real TPM.
func (t *TPM) Identity() tpm.Identity { return t.id }

func point(k *ecdsa.PublicKey) tpm2.TPMUPublicID {
	raw, err := k.Bytes()
	if err != nil {
		panic(err) // the key was generated here
	}
	return tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
		X: tpm2.TPM2BECCParameter{Buffer: raw[1:33]}, Y: tpm2.TPM2BECCParameter{Buffer: raw[33:]},
	})
}

// public is the TPMT_PUBLIC of a signing key.
func public(k *ecdsa.PublicKey, restricted bool) []byte {
	return tpm2.Marshal(tpm2.TPMTPublic{
		Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, NoDA: true,
			Restricted: restricted, SignEncrypt: true,
		},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
			Scheme: tpm2.TPMTECCScheme{
				Scheme:  tpm2.TPMAlgECDSA,
				Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256}),
			},
			CurveID: tpm2.TPMECCNistP256,
		}),
		Unique: point(k),
	})
}

// Activate is TPM2_ActivateCredential (TPM 2.0 Library, Part 1, section 24).
func (t *TPM) Activate(blob, encSecret []byte) ([]byte, error) {
	eph, err := tpm2.Unmarshal[tpm2.TPMSECCPoint](encSecret)
	if err != nil {
		return nil, err
	}
	raw := append([]byte{4}, append(eph.X.Buffer, eph.Y.Buffer...)...)
	peer, err := ecdh.P256().NewPublicKey(raw)
	if err != nil {
		return nil, err
	}
	ek, err := t.ek.ECDH()
	if err != nil {
		return nil, err
	}
	z, err := ek.ECDH(peer)
	if err != nil {
		return nil, err
	}
	seed := tpm2.KDFe(crypto.SHA256, z, "IDENTITY", eph.X.Buffer, ek.PublicKey().Bytes()[1:33], 256)
	if len(blob) < 34 {
		return nil, errors.New("credential is too short")
	}
	mac, enc, name := blob[2:34], blob[34:], t.name(t.Identity().AK)
	h := hmac.New(sha256.New, tpm2.KDFa(crypto.SHA256, seed, "INTEGRITY", nil, nil, 256))
	h.Write(enc)
	h.Write(name)
	if !hmac.Equal(h.Sum(nil), mac) {
		return nil, errors.New("credential is not for this attestation key")
	}
	block, err := aes.NewCipher(tpm2.KDFa(crypto.SHA256, seed, "STORAGE", name, nil, 128))
	if err != nil {
		return nil, err
	}
	plain := make([]byte, len(enc))
	cipher.NewCFBDecrypter(block, make([]byte, 16)).XORKeyStream(plain, enc) // the TPM's mode
	if len(plain) < 2 || int(binary.BigEndian.Uint16(plain)) != len(plain)-2 {
		return nil, errors.New("credential of a wrong length")
	}
	return plain[2:], nil
}

// Selection is a TPMS_PCR_SELECTION.
type Selection struct {
	Bank uint16
	Mask []byte
}

// Quote is what a quote says.
type Quote struct {
	Magic      uint32
	Signer     []byte
	Selections []Selection
	Digest     []byte
}

// Quote makes a quote bound to extra; change may alter it before it is signed.
func (t *TPM) Quote(extra attest.Digest, change func(*Quote)) (quote, sig []byte) {
	q := Quote{Magic: tpm.Generated, Signer: t.qualified(tpm2.TPMRHEndorsement, t.Identity().AK)}
	mask := make([]byte, 3)
	h := sha256.New()
	for _, i := range attest.QuotedPCRs {
		mask[i/8] |= 1 << (i % 8)
		v := t.PCRs[i]
		h.Write(v[:])
	}
	q.Selections, q.Digest = []Selection{{0x000b, mask}}, h.Sum(nil)
	if change != nil {
		change(&q)
	}
	b := t.head(q.Magic, tpm.TypeQuote, q.Signer, extra[:])
	b = binary.BigEndian.AppendUint32(b, uint32(len(q.Selections)))
	for _, s := range q.Selections {
		b = binary.BigEndian.AppendUint16(b, s.Bank)
		b = append(append(b, byte(len(s.Mask))), s.Mask...)
	}
	b = sized(b, q.Digest)
	return b, t.sign(b)
}

// Attest is as of a real TPM.
func (t *TPM) Attest(extra attest.Digest) (*tpm.Proof, error) {
	id := t.Identity()
	c := t.head(tpm.Generated, tpm.TypeCertify, t.qualified(tpm2.TPMRHEndorsement, id.AK), extra[:])
	c = sized(sized(c, t.name(id.Key)), t.qualified(tpm2.TPMRHOwner, id.Key))
	p := &tpm.Proof{PCRs: make(map[int]attest.Digest), Certify: c, CertifySig: t.sign(c)}
	p.Quote, p.QuoteSig = t.Quote(extra, nil)
	for _, i := range attest.QuotedPCRs {
		p.PCRs[i] = t.PCRs[i]
	}
	return p, nil
}

// LogonKey makes a key of the card under policy, as a real TPM would, and
// certifies it; change may alter it before.
func (t *TPM) LogonKey(policy attest.Digest, change func(*tpm2.TPMTPublic)) (*ecdsa.PrivateKey, tpm.Certified) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err) // rand.Reader does not fail
	}
	area := tpm2.TPMTPublic{
		Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA256, AuthPolicy: tpm2.TPM2BDigest{Buffer: policy[:]},
		ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, NoDA: true, SignEncrypt: true},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{CurveID: tpm2.TPMECCNistP256, Scheme: tpm2.TPMTECCScheme{
			Scheme:  tpm2.TPMAlgECDSA,
			Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256}),
		}}),
		Unique: point(&key.PublicKey),
	}
	if change != nil {
		change(&area)
	}
	c := tpm.Certified{Key: tpm2.Marshal(area), Storage: t.name([]byte("storage key"))}
	parent := t.name(append(binary.BigEndian.AppendUint32(nil, uint32(tpm2.TPMRHOwner)), c.Storage...))
	s := t.head(tpm.Generated, tpm.TypeCertify, t.qualified(tpm2.TPMRHEndorsement, t.Identity().AK), nil)
	c.Statement = sized(sized(s, t.name(c.Key)), t.name(append(parent, t.name(c.Key)...)))
	c.Signature = t.sign(c.Statement)
	return key, c
}

// head is a TPMS_ATTEST up to what it attests.
func (t *TPM) head(magic uint32, kind uint16, signer, extra []byte) []byte {
	t.Clock.Clock++
	b := binary.BigEndian.AppendUint32(nil, magic)
	b = binary.BigEndian.AppendUint16(b, kind)
	b = sized(sized(b, signer), extra)
	b = binary.BigEndian.AppendUint64(b, t.Clock.Clock)
	b = binary.BigEndian.AppendUint32(b, t.Clock.ResetCount)
	b = binary.BigEndian.AppendUint32(b, t.Clock.RestartCount)
	safe := byte(0)
	if t.Clock.Safe {
		safe = 1
	}
	return binary.BigEndian.AppendUint64(append(b, safe), 0x0102030405060708)
}

func sized(b, field []byte) []byte {
	return append(binary.BigEndian.AppendUint16(b, uint16(len(field))), field...)
}

func (t *TPM) name(data []byte) []byte {
	h := sha256.Sum256(data)
	return append([]byte{0, 0x0b}, h[:]...)
}

func (t *TPM) qualified(hierarchy tpm2.TPMHandle, public []byte) []byte {
	return t.name(append(binary.BigEndian.AppendUint32(nil, uint32(hierarchy)), t.name(public)...))
}

// sign returns a TPMT_SIGNATURE by the attestation key.
func (t *TPM) sign(data []byte) []byte {
	digest := sha256.Sum256(data)
	r, s, err := ecdsa.Sign(rand.Reader, t.ak, digest[:])
	if err != nil {
		panic(err) // a P-256 key and rand.Reader do not fail
	}
	b := []byte{0, 0x18, 0, 0x0b} // ECDSA, SHA-256
	return sized(sized(b, r.FillBytes(make([]byte, 32))), s.FillBytes(make([]byte, 32)))
}

// Public returns the credential key's public key.
func (t *TPM) Public() crypto.PublicKey { return t.key.Public() }

// Sign signs with the credential key.
func (t *TPM) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if opts.HashFunc() != crypto.SHA256 {
		return nil, fmt.Errorf("hash %v", opts.HashFunc())
	}
	return ecdsa.SignASN1(rand.Reader, t.key, digest)
}

// Close does nothing.
func (t *TPM) Close() error { return nil }

// Extend is as of a real TPM.
func (t *TPM) Extend(pcr int, digest attest.Digest) error {
	v, ok := t.PCRs[pcr]
	if !ok {
		return fmt.Errorf("PCR %d is not among the quoted ones", pcr)
	}
	t.PCRs[pcr] = sha256.Sum256(append(v[:], digest[:]...))
	return nil
}

// ReadPCRs is as of a real TPM.
func (t *TPM) ReadPCRs(want []int) (map[int]attest.Digest, error) {
	values := make(map[int]attest.Digest, len(want))
	for _, i := range want {
		values[i] = t.PCRs[i]
	}
	return values, nil
}
