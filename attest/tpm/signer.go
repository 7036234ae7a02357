package tpm

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	_ "crypto/sha1"   // quotes of old machines
	_ "crypto/sha512" // quotes in SHA-384
	"crypto/x509"
	"encoding/asn1"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"

	"github.com/google/go-tpm/tpm2"

	"sekisho/attest"
)

// Signer is the public key of an attestation key of anyone's: to judge samples,
// not to admit devices.
type Signer struct {
	Key crypto.PublicKey // *ecdsa.PublicKey or *rsa.PublicKey
	// Area is the TPM's public area, nil if the key came as PEM: then nothing
	// says that the key is restricted to signing what a TPM made.
	Area *Public
}

// ParseSigner reads a public key as SubjectPublicKeyInfo or certificate, in PEM
// or DER, as TPMT_PUBLIC, as TPM2B_PUBLIC, or from a key blob of Windows' Platform
// Crypto Provider (PCP_KEY_BLOB_WIN8 of the TSS.MSR sources: a header that
// states its length, then TPM2B_PUBLIC).
func ParseSigner(data []byte) (*Signer, error) {
	if len(data) > attest.MaxTPMBytes {
		return nil, fmt.Errorf("attestation key: %d bytes, at most %d: %w", len(data), attest.MaxTPMBytes, attest.ErrTooLarge)
	}
	if b, _ := pem.Decode(data); b != nil {
		return parsePEM(b)
	}
	if len(data) > 0 && data[0] == 0x30 { // SEQUENCE, which begins nothing of a TPM's
		b := &pem.Block{Type: "PUBLIC KEY", Bytes: data}
		if _, err := x509.ParseCertificate(data); err == nil {
			b.Type = "CERTIFICATE"
		}
		return parsePEM(b)
	}
	if bytes.HasPrefix(data, []byte("PCPM")) && len(data) >= 8 {
		head := binary.LittleEndian.Uint32(data[4:])
		if head < 8 || uint64(head)+2 > uint64(len(data)) {
			return nil, fmt.Errorf("attestation key: Windows key blob with a header of %d bytes", head)
		}
		data = data[head:]
		size := int(binary.BigEndian.Uint16(data))
		if size > len(data)-2 {
			return nil, fmt.Errorf("attestation key: public area of %d bytes, %d left", size, len(data)-2)
		}
		data = data[:2+size]
	}
	if len(data) > 2 && int(binary.BigEndian.Uint16(data)) == len(data)-2 {
		data = data[2:]
	}
	area, err := parse[tpm2.TPMTPublic](data)
	if err != nil {
		return nil, fmt.Errorf("attestation key: neither PEM, DER nor a public area: %w", err)
	}
	key, err := tpm2.Pub(*area)
	if err != nil {
		return nil, fmt.Errorf("attestation key: %w", err)
	}
	return newSigner(key, &Public{Bytes: bytes.Clone(data), area: *area})
}

// newSigner refuses keys that sign no quotes, and points off their curve.
func newSigner(key crypto.PublicKey, area *Public) (*Signer, error) {
	switch k := key.(type) {
	case *rsa.PublicKey:
		return &Signer{key, area}, nil
	case *ecdsa.PublicKey:
		if _, err := k.Bytes(); err != nil {
			return nil, fmt.Errorf("attestation key: %w", err)
		}
		return &Signer{key, area}, nil
	}
	return nil, fmt.Errorf("attestation key of type %T, want ECDSA or RSA", key)
}

func parsePEM(b *pem.Block) (*Signer, error) {
	var key crypto.PublicKey
	var err error
	switch b.Type {
	case "CERTIFICATE":
		var c *x509.Certificate
		if c, err = x509.ParseCertificate(b.Bytes); err == nil {
			key = c.PublicKey
		}
	case "RSA PUBLIC KEY":
		key, err = x509.ParsePKCS1PublicKey(b.Bytes)
	default:
		key, err = x509.ParsePKIXPublicKey(b.Bytes)
	}
	if err != nil {
		return nil, fmt.Errorf("attestation key: %w", err)
	}
	return newSigner(key, nil)
}

// Restricted reports whether the key is known to sign only what its TPM made,
// and to be bound to that TPM.
func (s *Signer) Restricted() bool {
	if s.Area == nil {
		return false
	}
	a := s.Area.area.ObjectAttributes
	return a.Restricted && a.SignEncrypt && !a.Decrypt && a.FixedTPM && a.FixedParent
}

// Signature is a TPM's signature of one of the schemes that attestation keys
// use.
type Signature struct {
	Hash   crypto.Hash
	Scheme string // "ecdsa", "rsassa" or "rsapss"
	r, s   *big.Int
	rsa    []byte
}

// ParseSignature reads a TPMT_SIGNATURE (TPM 2.0 Library, Part 2, section
// 11.3.4): ECDSA, RSASSA or RSAPSS.
func ParseSignature(data []byte) (*Signature, error) {
	v, err := parse[tpm2.TPMTSignature](data)
	if err != nil {
		return nil, fmt.Errorf("tpm signature: %w", err)
	}
	out := &Signature{}
	var hash tpm2.TPMIAlgHash
	switch v.SigAlg {
	case tpm2.TPMAlgECDSA:
		e, err := v.Signature.ECDSA()
		if err != nil {
			return nil, fmt.Errorf("tpm signature: %w", err)
		}
		out.Scheme, hash = "ecdsa", e.Hash
		out.r, out.s = new(big.Int).SetBytes(e.SignatureR.Buffer), new(big.Int).SetBytes(e.SignatureS.Buffer)
	case tpm2.TPMAlgRSASSA, tpm2.TPMAlgRSAPSS:
		out.Scheme = "rsassa"
		get := v.Signature.RSASSA
		if v.SigAlg == tpm2.TPMAlgRSAPSS {
			out.Scheme, get = "rsapss", v.Signature.RSAPSS
		}
		e, err := get()
		if err != nil {
			return nil, fmt.Errorf("tpm signature: %w", err)
		}
		hash, out.rsa = e.Hash, e.Sig.Buffer
	default:
		return nil, fmt.Errorf("tpm signature: scheme 0x%04x, want ECDSA, RSASSA or RSAPSS", uint16(v.SigAlg))
	}
	if out.Hash, err = hash.Hash(); err != nil || !out.Hash.Available() {
		return nil, fmt.Errorf("tpm signature: hash 0x%04x cannot be used", uint16(hash))
	}
	return out, nil
}

// ParseSignature reads a TPMT_SIGNATURE, or the plain form of tpm2-tools and
// others, which is over hash: an RSASSA signature as long as the modulus, or an
// ECDSA signature in DER.
func (s *Signer) ParseSignature(data []byte, hash crypto.Hash) (*Signature, error) {
	sig, err := ParseSignature(data)
	if err == nil {
		return sig, nil
	}
	if plain := s.PlainSignature(data, hash); plain != nil {
		return plain, nil
	}
	return nil, err
}

// PlainSignature reads a signature that does not say how it was made: an RSASSA
// one as long as the modulus, or an ECDSA one in DER. It is nil for neither.
func (s *Signer) PlainSignature(data []byte, hash crypto.Hash) *Signature {
	switch key := s.Key.(type) {
	case *rsa.PublicKey:
		if len(data) == key.Size() {
			return &Signature{Hash: hash, Scheme: "rsassa", rsa: data}
		}
	case *ecdsa.PublicKey:
		var v struct{ R, S *big.Int }
		if rest, bad := asn1.Unmarshal(data, &v); bad == nil && len(rest) == 0 {
			return &Signature{Hash: hash, Scheme: "ecdsa", r: v.R, s: v.S}
		}
	}
	return nil
}

// Verify checks sig over data.
func (s *Signer) Verify(data []byte, sig *Signature) error {
	h := sig.Hash.New()
	h.Write(data)
	digest := h.Sum(nil)
	wrong := errors.New("not by this key over these bytes")
	switch key := s.Key.(type) {
	case *ecdsa.PublicKey:
		if sig.Scheme != "ecdsa" || !ecdsa.Verify(key, digest, sig.r, sig.s) {
			return wrong
		}
		return nil
	case *rsa.PublicKey:
		switch sig.Scheme {
		case "rsassa":
			if rsa.VerifyPKCS1v15(key, sig.Hash, digest, sig.rsa) == nil {
				return nil
			}
		case "rsapss":
			if rsa.VerifyPSS(key, sig.Hash, digest, sig.rsa, nil) == nil {
				return nil
			}
		}
		return wrong
	}
	return fmt.Errorf("key of type %T cannot verify", s.Key)
}
