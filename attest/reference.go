package attest

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
)

// Digest is a SHA-256 digest. Its text form is lower-case hexadecimal.
type Digest [32]byte

func (d Digest) String() string { return hex.EncodeToString(d[:]) }

// MarshalText implements encoding.TextMarshaler.
func (d Digest) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Digest) UnmarshalText(b []byte) error {
	if hex.DecodedLen(len(b)) != len(d) {
		return fmt.Errorf("digest of %d characters, want %d", len(b), 2*len(d))
	}
	_, err := hex.Decode(d[:], b)
	return err
}

// QuotedPCRs is the exact PCR selection, SHA-256 bank, of every quote (TCG PC
// Client Platform Firmware Profile, section 3.3.4; PCR 11 and 12 by
// systemd-stub; PCR 14 and 15 by init).
var QuotedPCRs = [...]int{0, 1, 2, 3, 4, 5, 6, 7, 9, 11, 12, 14, 15}

// Component is one measured part of an image.
type Component struct {
	// Name is what people call it: "kernel", "initramfs", "cmdline",
	// "os-release", "uname", "stub", "uki".
	Name string `json:"name"`
	// PCR is where its digest is extended.
	PCR int `json:"pcr"`
	// Digest is the digest in the event log, SHA-256 bank.
	Digest Digest `json:"digest"`
	// Event is how the firmware or stub labels the event (UKI section name
	// such as ".linux"), by which a verifier finds the event to compare.
	Event string `json:"event,omitempty"`
}

// ReferenceValues describe one image that a verifier may accept: computed from
// the files of the release, never learned from a boot.
type ReferenceValues struct {
	Image      string         `json:"image"`   // name of the release
	Version    string         `json:"version"` // version of the release
	PCRs       map[int]Digest `json:"pcrs"`    // final values at the time of the quote
	Components []Component    `json:"components"`
}

// ParseReferenceValues reads reference values from JSON of at most 64 KiB.
func ParseReferenceValues(data []byte) (*ReferenceValues, error) {
	if len(data) > 64<<10 {
		return nil, fmt.Errorf("reference values: %d bytes, at most %d", len(data), 64<<10)
	}
	var r ReferenceValues
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, fmt.Errorf("reference values: %w", err)
	}
	for _, pcr := range []int{4, 7, 11} {
		if _, ok := r.PCRs[pcr]; !ok {
			return nil, fmt.Errorf("reference values %q: no value for PCR %d", r.Image, pcr)
		}
	}
	return &r, nil
}
