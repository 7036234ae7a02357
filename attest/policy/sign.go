package policy

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"

	"github.com/veraison/go-cose"

	"sekisho/attest"
)

const (
	maxSignatures = 16
	maxKeyFile    = 16 << 10
)

// Kind is a sort of document that the organisation's keys sign.
type Kind struct {
	Name        string // in errors
	ContentType string
	// External is the external_aad of each signature (RFC 9052, section 4.3): a
	// signature over one kind is none over anything else.
	External string
	Max      int // bytes, with the signatures
}

// bundles are the signed policies.
func bundles() Kind {
	return Kind{"policy", "application/vnd.sekisho.policy+cbor", "sekisho/policy/1", MaxBundle}
}

// KeyID is SHA-256 over a key's SubjectPublicKeyInfo.
func KeyID(key *ecdsa.PublicKey) (attest.Digest, error) {
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return attest.Digest{}, fmt.Errorf("key: %w", err)
	}
	return sha256.Sum256(der), nil
}

// ParseKey reads a P-256 public key from PEM: a public key or a certificate.
func ParseKey(data []byte) (*ecdsa.PublicKey, error) {
	if len(data) > maxKeyFile {
		return nil, fmt.Errorf("key: %d bytes, at most %d: %w", len(data), maxKeyFile, attest.ErrTooLarge)
	}
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, errors.New("key: no PEM in it")
	}
	var key any
	var err error
	switch block.Type {
	case "CERTIFICATE":
		var c *x509.Certificate
		if c, err = x509.ParseCertificate(block.Bytes); err == nil {
			key = c.PublicKey
		}
	case "PUBLIC KEY":
		key, err = x509.ParsePKIXPublicKey(block.Bytes)
	default:
		return nil, fmt.Errorf("key: PEM of type %.32q, want PUBLIC KEY or CERTIFICATE", block.Type)
	}
	if err != nil {
		return nil, fmt.Errorf("key: %w", err)
	}
	ec, ok := key.(*ecdsa.PublicKey)
	if !ok || ec.Curve != elliptic.P256() {
		return nil, fmt.Errorf("key: %T, want ECDSA on P-256", key)
	}
	return ec, nil
}

// Keyring holds the keys of which a number must have signed.
type Keyring struct {
	keys      map[attest.Digest]*ecdsa.PublicKey
	threshold int
}

// NewKeyring returns a ring of which threshold distinct keys must sign.
func NewKeyring(threshold int, keys ...*ecdsa.PublicKey) (*Keyring, error) {
	r := &Keyring{make(map[attest.Digest]*ecdsa.PublicKey), threshold}
	for _, k := range keys {
		id, err := KeyID(k)
		if err != nil {
			return nil, err
		}
		r.keys[id] = k
	}
	if threshold < 1 || threshold > len(r.keys) {
		return nil, fmt.Errorf("%d of %d policy keys must sign: want 1 to all of them, each key once", threshold, len(r.keys))
	}
	return r, nil
}

// Sign signs content with key. data is the signed bundle so far, or nil for
// the first signature: then content is b's.
func Sign(b *Bundle, data []byte, key crypto.Signer) ([]byte, error) {
	var payload []byte
	if data == nil {
		var err error
		if payload, err = b.Encode(); err != nil {
			return nil, err
		}
	}
	return bundles().Sign(payload, data, key)
}

// Sign adds a signature to the signed document data or, if it is nil, makes one
// of payload.
func (k Kind) Sign(payload, data []byte, key crypto.Signer) ([]byte, error) {
	public, ok := key.Public().(*ecdsa.PublicKey)
	if !ok || public.Curve != elliptic.P256() {
		return nil, fmt.Errorf("sign: key of type %T, want ECDSA on P-256", key.Public())
	}
	id, err := KeyID(public)
	if err != nil {
		return nil, err
	}
	m := cose.NewSignMessage()
	if data != nil {
		if m, err = k.message(data); err != nil {
			return nil, err
		}
		for _, s := range m.Signatures {
			if keyID(s) == id {
				return nil, fmt.Errorf("sign: key %s has signed already", id)
			}
		}
	} else {
		m.Payload = payload
		m.Headers.Protected[cose.HeaderLabelContentType] = k.ContentType
	}
	signer, err := cose.NewSigner(cose.AlgorithmES256, key)
	if err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	s := cose.NewSignature()
	s.Headers.Protected.SetAlgorithm(cose.AlgorithmES256)
	s.Headers.Protected[cose.HeaderLabelKeyID] = id[:]
	protected, err := m.Headers.MarshalProtected()
	if err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	if err := s.Sign(rand.Reader, signer, protected, m.Payload, []byte(k.External)); err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	m.Signatures = append(m.Signatures, s)
	return m.MarshalCBOR()
}

// Signed is a bundle whose signatures were judged.
type Signed struct {
	Bundle  *Bundle
	ID      attest.PolicyID
	Data    []byte          // as signed
	Signers []attest.Digest // keys of the ring that signed, in order
}

// Read reads a signed bundle without judging its signatures.
func Read(data []byte) (*Signed, error) {
	payload, err := bundles().Read(data)
	if err != nil {
		return nil, err
	}
	return read(payload, data)
}

// Read returns what is signed, without judging the signatures.
func (k Kind) Read(data []byte) ([]byte, error) {
	m, err := k.message(data)
	if err != nil {
		return nil, err
	}
	return m.Payload, nil
}

func read(payload, data []byte) (*Signed, error) {
	b, err := decode(payload)
	if err != nil {
		return nil, err
	}
	id := attest.PolicyID{Organization: b.Organization, Version: b.Version, Digest: sha256.Sum256(payload)}
	return &Signed{Bundle: b, ID: id, Data: data}, nil
}

// ErrUnsigned is returned by Open for a policy that enough keys of the ring
// have not signed, or one of them wrongly.
var ErrUnsigned = errors.New("policy: not signed")

// Open reads a bundle and verifies its signatures, as OpenKind.
func (r *Keyring) Open(data []byte) (*Signed, error) {
	payload, signers, err := r.OpenKind(bundles(), data)
	if err != nil {
		return nil, err
	}
	signed, err := read(payload, data)
	if err != nil {
		return nil, err
	}
	signed.Signers = signers
	return signed, nil
}

// OpenKind returns the content of a signed document and who signed it. A nil
// error proves that as many distinct keys of the ring as its threshold have
// signed exactly this content as one of this kind, and that no signature in the
// name of one of its keys is wrong.
func (r *Keyring) OpenKind(k Kind, data []byte) (payload []byte, signers []attest.Digest, err error) {
	m, err := k.message(data)
	if err != nil {
		return nil, nil, err
	}
	protected, err := m.Headers.MarshalProtected()
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", k.Name, err)
	}
	seen := make(map[attest.Digest]bool)
	for _, s := range m.Signatures {
		id := keyID(s)
		key, known := r.keys[id]
		if !known || seen[id] {
			continue
		}
		v, err := cose.NewVerifier(cose.AlgorithmES256, key)
		if err != nil {
			return nil, nil, fmt.Errorf("%s: %w", k.Name, err)
		}
		if err := s.Verify(v, protected, m.Payload, []byte(k.External)); err != nil {
			return nil, nil, fmt.Errorf("%w: signature of key %s: %w", ErrUnsigned, id, err)
		}
		seen[id] = true
		signers = append(signers, id)
	}
	if len(signers) < r.threshold {
		return nil, nil, fmt.Errorf("%w by enough: %d of the organisation's keys, %d must sign", ErrUnsigned, len(signers), r.threshold)
	}
	return m.Payload, signers, nil
}

func (k Kind) message(data []byte) (*cose.SignMessage, error) {
	if len(data) > k.Max {
		return nil, fmt.Errorf("%s: %d bytes, at most %d: %w", k.Name, len(data), k.Max, attest.ErrTooLarge)
	}
	m := cose.NewSignMessage()
	if err := m.UnmarshalCBOR(data); err != nil {
		return nil, fmt.Errorf("%s: %w", k.Name, err)
	}
	if t, _ := m.Headers.Protected[cose.HeaderLabelContentType].(string); t != k.ContentType {
		return nil, fmt.Errorf("%s: content type %.64q, want %q", k.Name, t, k.ContentType)
	}
	if len(m.Signatures) > maxSignatures {
		return nil, fmt.Errorf("%s: %d signatures, at most %d", k.Name, len(m.Signatures), maxSignatures)
	}
	return m, nil
}

// keyID returns the key that a signature names, zero if none.
func keyID(s *cose.Signature) attest.Digest {
	kid, _ := s.Headers.Protected[cose.HeaderLabelKeyID].([]byte)
	if len(kid) != len(attest.Digest{}) {
		return attest.Digest{}
	}
	return attest.Digest(kid)
}
