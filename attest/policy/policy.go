// Package policy is an organisation's appraisal policy (RFC 9334, section
// 8.5): reference values and small typed rules, as a versioned bundle that
// offline keys have signed. It decides and does no I/O.
package policy

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/fxamacker/cbor/v2"

	"sekisho/attest"
)

// Profile names the format of a bundle's content.
const Profile = "urn:sekisho:attest:policy:1"

// Limits of a bundle, checked before anything is parsed or evaluated.
const (
	MaxBundle     = 1 << 20 // bytes, with its signatures
	maxRules      = 256
	maxValues     = 8192 // of one rule: a dbx has some hundreds
	maxReferences = 256
	maxName       = 128
	maxText       = 400 // bytes of a sentence or a value: results carry them
)

// Bundle is one version of an organisation's policy. Each version names the
// one that it supersedes, so that versions form a chain without forks.
type Bundle struct {
	Profile      string        `json:"profile"`
	Organization string        `json:"organization"`
	Version      uint64        `json:"version"`              // from 1, rising
	NotBefore    int64         `json:"not_before"`           // seconds since 1970; the older version is in force until then
	Supersedes   attest.Digest `json:"supersedes"`           // Digest of the version before; zero for the first
	Rules        []Rule        `json:"rules,omitempty"`      // all are evaluated
	References   []Reference   `json:"references,omitempty"` // images that are accepted
}

// Reference is one accepted image. Old and new images stand side by side for as
// long as an update takes; Until ends the old one.
type Reference struct {
	Values attest.ReferenceValues `json:"values"`
	Until  int64                  `json:"until,omitempty"` // seconds since 1970; 0: no end
}

// Parse reads a bundle's content from JSON, as people write it. Unknown fields
// are errors.
func Parse(data []byte) (*Bundle, error) {
	if len(data) > MaxBundle {
		return nil, fmt.Errorf("policy: %d bytes, at most %d: %w", len(data), MaxBundle, attest.ErrTooLarge)
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	var b Bundle
	if err := d.Decode(&b); err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("policy: data after the document")
	}
	if b.Profile == "" {
		b.Profile = Profile
	}
	return &b, b.validate()
}

// Encode returns b in deterministic CBOR (RFC 8949, section 4.2.1): what is
// signed.
func (b *Bundle) Encode() ([]byte, error) {
	if err := b.validate(); err != nil {
		return nil, err
	}
	enc, err := cbor.CoreDetEncOptions().EncMode()
	if err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	data, err := enc.Marshal(b)
	if err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	if len(data) > MaxBundle {
		return nil, fmt.Errorf("policy: %d bytes, at most %d: %w", len(data), MaxBundle, attest.ErrTooLarge)
	}
	return data, nil
}

// decode is the inverse of Encode and refuses every other encoding.
func decode(data []byte) (*Bundle, error) {
	dec, err := cbor.DecOptions{
		DupMapKey: cbor.DupMapKeyEnforcedAPF, IndefLength: cbor.IndefLengthForbidden, TagsMd: cbor.TagsForbidden,
		ExtraReturnErrors: cbor.ExtraDecErrorUnknownField, MaxNestedLevels: 8, MaxArrayElements: maxValues, MaxMapPairs: 64,
	}.DecMode()
	if err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	var b Bundle
	if err := dec.Unmarshal(data, &b); err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	again, err := b.Encode()
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(again, data) {
		return nil, errors.New("policy: encoding is not deterministic CBOR (RFC 8949, section 4.2.1)")
	}
	return &b, nil
}

// ID names b in results.
func (b *Bundle) ID() (attest.PolicyID, error) {
	data, err := b.Encode()
	if err != nil {
		return attest.PolicyID{}, err
	}
	return attest.PolicyID{Organization: b.Organization, Version: b.Version, Digest: sha256.Sum256(data)}, nil
}

// Accepted returns the reference values that hold at a time.
func (b *Bundle) Accepted(now time.Time) []attest.ReferenceValues {
	var list []attest.ReferenceValues
	for _, r := range b.References {
		if r.Until == 0 || now.Unix() < r.Until {
			list = append(list, r.Values)
		}
	}
	return list
}

func (b *Bundle) validate() error {
	var errs []error
	fail := func(format string, a ...any) { errs = append(errs, fmt.Errorf("policy: "+format, a...)) }
	if b.Profile != Profile {
		fail("profile %.64q, want %q", b.Profile, Profile)
	}
	if b.Organization == "" || len(b.Organization) > maxName {
		fail("organization %.64q: want 1 to %d bytes", b.Organization, maxName)
	}
	if b.Version == 0 || (b.Version == 1) != (b.Supersedes == attest.Digest{}) {
		fail("version %d: the first is 1 and supersedes nothing, each later one names the digest that it supersedes", b.Version)
	}
	if b.NotBefore < 0 {
		fail("not_before %d is before 1970", b.NotBefore)
	}
	if len(b.Rules) > maxRules || len(b.References) > maxReferences {
		fail("%d rules and %d references, at most %d and %d", len(b.Rules), len(b.References), maxRules, maxReferences)
		return errors.Join(errs...)
	}
	seen := make(map[string]bool)
	for i, r := range b.Rules {
		if err := r.validate(); err != nil {
			fail("rules[%d]: %w", i, err)
		}
		if seen[r.ID] {
			fail("rules[%d]: id %q comes twice", i, r.ID)
		}
		seen[r.ID] = true
	}
	for i, r := range b.References {
		// A reference that names none of these would accept any image.
		for _, pcr := range []int{4, 7, 11} {
			if _, ok := r.Values.PCRs[pcr]; !ok {
				fail("references[%d] %.64q: no value for PCR %d", i, r.Values.Image, pcr)
			}
		}
	}
	return errors.Join(errs...)
}
