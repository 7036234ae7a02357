// Package approval is the signature of several persons under one decision: a
// permit for a device, the release of a recovery key. It does no I/O.
package approval

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"slices"

	"sekisho/attest"
)

// Profile is of Signed.
const Profile = "urn:sekisho:approval:1"

// Limits of a Signed.
const (
	maxSigned     = 64 << 10
	maxSignatures = 16
	minNeed       = 2 // one person's signature is no approval
)

// Signed is a decision with the signatures under it.
type Signed struct {
	Profile    string      `json:"profile"`
	Type       string      `json:"type"`    // what kind of decision; signed too
	Payload    []byte      `json:"payload"` // the decision in JSON
	Signatures []Signature `json:"signatures"`
}

// Signature is one person's.
type Signature struct {
	Key       attest.Digest `json:"key"`       // SHA-256 of the SubjectPublicKeyInfo
	Signature []byte        `json:"signature"` // ECDSA, SHA-256, ASN.1
}

// New makes a Signed without signatures.
func New(kind string, decision any) (*Signed, error) {
	payload, err := json.Marshal(decision)
	if err != nil {
		return nil, fmt.Errorf("approval: %w", err)
	}
	return &Signed{Profile: Profile, Type: kind, Payload: payload}, nil
}

// Parse reads a Signed. Nothing in it counts before Verify.
func Parse(data []byte) (*Signed, error) {
	if len(data) > maxSigned {
		return nil, fmt.Errorf("approval: %d bytes, at most %d: %w", len(data), maxSigned, attest.ErrTooLarge)
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	var s Signed
	if err := d.Decode(&s); err != nil {
		return nil, fmt.Errorf("approval: %w", err)
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("approval: data after the document")
	}
	if s.Profile != Profile || len(s.Signatures) > maxSignatures {
		return nil, fmt.Errorf("approval: profile %.64q with %d signatures, want %q with at most %d", s.Profile, len(s.Signatures), Profile, maxSignatures)
	}
	return &s, nil
}

// digest is what is signed: type and payload, each with its length.
func (s *Signed) digest() attest.Digest {
	b := []byte("sekisho/approval/1")
	for _, f := range [][]byte{[]byte(s.Type), s.Payload} {
		b = append(binary.BigEndian.AppendUint32(b, uint32(len(f))), f...)
	}
	return sha256.Sum256(b)
}

// ID names the decision: the same for all signatures under it.
func (s *Signed) ID() attest.Digest { return s.digest() }

// Sign adds a signature. Who signs twice counts once.
func (s *Signed) Sign(signer crypto.Signer) error {
	id, err := fingerprint(signer.Public())
	if err != nil {
		return err
	}
	if len(s.Signatures) >= maxSignatures {
		return fmt.Errorf("approval: %d signatures, at most %d", len(s.Signatures), maxSignatures)
	}
	d := s.digest()
	sig, err := signer.Sign(rand.Reader, d[:], crypto.SHA256)
	if err != nil {
		return fmt.Errorf("approval: %w", err)
	}
	s.Signatures = append(s.Signatures, Signature{id, sig})
	return nil
}

func fingerprint(key crypto.PublicKey) (attest.Digest, error) {
	k, ok := key.(*ecdsa.PublicKey)
	if !ok || k.Curve != elliptic.P256() {
		return attest.Digest{}, fmt.Errorf("approver's key of type %T: want ECDSA on P-256", key)
	}
	spki, err := x509.MarshalPKIXPublicKey(k)
	if err != nil {
		return attest.Digest{}, fmt.Errorf("approver's key: %w", err)
	}
	return sha256.Sum256(spki), nil
}

// Approvers are those whose signatures count. The zero value approves nothing.
type Approvers struct {
	keys map[attest.Digest]*ecdsa.PublicKey
	need int
}

// ParseApprovers reads their public keys from PEM; need of them must sign, two
// at least. The same key twice is an error: it would be one person.
func ParseApprovers(data []byte, need int) (*Approvers, error) {
	if len(data) > maxSigned {
		return nil, fmt.Errorf("approvers: %d bytes, at most %d: %w", len(data), maxSigned, attest.ErrTooLarge)
	}
	a := &Approvers{make(map[attest.Digest]*ecdsa.PublicKey), need}
	for {
		var b *pem.Block
		if b, data = pem.Decode(data); b == nil {
			break
		}
		key, err := x509.ParsePKIXPublicKey(b.Bytes)
		if err != nil {
			return nil, fmt.Errorf("approvers: block %q: %w", b.Type, err)
		}
		id, err := fingerprint(key)
		if err != nil {
			return nil, err
		}
		if a.keys[id] != nil {
			return nil, fmt.Errorf("approvers: key %s stands there twice", id)
		}
		a.keys[id] = key.(*ecdsa.PublicKey)
	}
	if need < minNeed || len(a.keys) < need {
		return nil, fmt.Errorf("approvers: %d of %d keys: want at least %d keys, and as many as must sign", need, len(a.keys), minNeed)
	}
	return a, nil
}

// ErrNotApproved is returned by Verify for too few valid signatures.
var ErrNotApproved = errors.New("not approved")

// Verify returns the decision and who signed it. A nil error proves: s is of
// that type, and enough different approvers have signed exactly this payload.
func (a *Approvers) Verify(kind string, s *Signed) (payload []byte, who []string, err error) {
	if a == nil || a.need < minNeed {
		return nil, nil, fmt.Errorf("%w: no approvers are configured", ErrNotApproved)
	}
	if s.Type != kind {
		return nil, nil, fmt.Errorf("%w: approval is for %.64q, want %q", ErrNotApproved, s.Type, kind)
	}
	d := s.digest()
	for _, sig := range s.Signatures[:min(len(s.Signatures), maxSignatures)] {
		key := a.keys[sig.Key]
		if id := sig.Key.String(); key != nil && !slices.Contains(who, id) && ecdsa.VerifyASN1(key, d[:], sig.Signature) {
			who = append(who, id)
		}
	}
	if len(who) < a.need {
		return nil, nil, fmt.Errorf("%w: %d valid signatures of different approvers, want %d", ErrNotApproved, len(who), a.need)
	}
	return s.Payload, who, nil
}
