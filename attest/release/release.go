// Package release holds the signed manifest by which an organisation gives its
// laptops a new image of the host domain. It is pure.
//
// The manifest says which image it is, and what a laptop must be to take it;
// what the image may open is said by the signed policies inside it
// (attest/seal), which the TPM checks.
package release

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"sekisho/attest"
	"sekisho/attest/policy"
)

// Profile names the format of a manifest.
const Profile = "urn:sekisho:release:1"

const (
	// MaxManifest bounds a manifest with its signatures in bytes.
	MaxManifest = 64 << 10
	// MaxImage bounds an image in bytes.
	MaxImage = 1 << 30
	maxName  = 64
)

// Manifest is one release.
type Manifest struct {
	Profile      string                `json:"profile"`
	Organization string                `json:"organization"`
	Image        string                `json:"image"`
	Version      string                `json:"version"`
	Epoch        uint64                `json:"epoch"` // rollback epoch, as in the image's signed policies
	SHA256       attest.Digest         `json:"sha256"`
	Size         int64                 `json:"size"` // bytes
	PCRs         map[int]attest.Digest `json:"pcrs"` // after a boot of it
	// MinimumFrom is the oldest version from which a laptop may go to this one
	// directly; empty: any.
	MinimumFrom string `json:"minimum_from,omitempty"`
	Expires     int64  `json:"expires"` // seconds since 1970; no laptop takes it later
}

// Kind is what a signature over a manifest is over.
func Kind() policy.Kind {
	return policy.Kind{Name: "release", ContentType: "application/vnd.sekisho.release+json", External: "sekisho/release/1", Max: MaxManifest}
}

// Parse reads a manifest from JSON. Unknown fields are errors.
func Parse(data []byte) (*Manifest, error) {
	if len(data) > MaxManifest {
		return nil, fmt.Errorf("release: %d bytes, at most %d: %w", len(data), MaxManifest, attest.ErrTooLarge)
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	var m Manifest
	if err := d.Decode(&m); err != nil {
		return nil, fmt.Errorf("release: %w", err)
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("release: data after the document")
	}
	return &m, m.Validate()
}

// Validate reports all faults.
func (m *Manifest) Validate() error {
	var errs []error
	fail := func(format string, a ...any) { errs = append(errs, fmt.Errorf("release: "+format, a...)) }
	if m.Profile != Profile {
		fail("profile %.64q, want %q", m.Profile, Profile)
	}
	for what, s := range map[string]string{"organization": m.Organization, "image": m.Image, "version": m.Version} {
		if s == "" || len(s) > maxName {
			fail("%s of %d bytes, want 1 to %d", what, len(s), maxName)
		}
	}
	if len(m.MinimumFrom) > maxName {
		fail("minimum_from of %d bytes, at most %d", len(m.MinimumFrom), maxName)
	}
	if m.Size <= 0 || m.Size > MaxImage {
		fail("size %d, want 1 to %d", m.Size, int64(MaxImage))
	}
	if m.SHA256 == (attest.Digest{}) {
		fail("no sha256 of the image")
	}
	for _, i := range []int{4, 7, 11} {
		if m.PCRs[i] == (attest.Digest{}) {
			fail("no value of PCR %d", i)
		}
	}
	if m.Epoch == 0 {
		fail("no epoch")
	}
	if m.Expires <= 0 {
		fail("no time at which it expires")
	}
	return errors.Join(errs...)
}

// Sign adds a signature to the signed manifest data or, if it is nil, signs m.
func Sign(m *Manifest, data []byte, key crypto.Signer) ([]byte, error) {
	var payload []byte
	if data == nil {
		if err := m.Validate(); err != nil {
			return nil, err
		}
		var err error
		if payload, err = json.Marshal(m); err != nil {
			return nil, fmt.Errorf("release: %w", err)
		}
	}
	return Kind().Sign(payload, data, key)
}

// Read reads a signed manifest without judging its signatures.
func Read(data []byte) (*Manifest, error) {
	payload, err := Kind().Read(data)
	if err != nil {
		return nil, err
	}
	return Parse(payload)
}

// Open reads a signed manifest. A nil error proves that enough keys of the ring
// have signed it, that it is of this organisation, and that it has not expired.
func Open(ring *policy.Keyring, organization string, data []byte, now time.Time) (*Manifest, error) {
	payload, _, err := ring.OpenKind(Kind(), data)
	if err != nil {
		return nil, err
	}
	m, err := Parse(payload)
	if err != nil {
		return nil, err
	}
	if m.Organization != organization {
		return nil, fmt.Errorf("release: of %.64q, this is %q", m.Organization, organization)
	}
	if at := time.Unix(m.Expires, 0); !now.Before(at) {
		return nil, fmt.Errorf("release: %s expired on %s; sign a newer manifest", m.Version, at.UTC().Format(time.RFC3339))
	}
	return m, nil
}

// Ring is the device's place from 0 to 99 among the organisation's: a release
// that is rolled out to so many percent goes to the devices below that number,
// always the same ones first.
func Ring(device attest.Digest) int {
	h := sha256.Sum256(append([]byte("sekisho/ring/1"), device[:]...))
	return int(binary.BigEndian.Uint64(h[:]) % 100)
}
