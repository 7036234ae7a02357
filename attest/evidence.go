package attest

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"

	"github.com/fxamacker/cbor/v2"
)

// Limits of what crosses the network, in bytes. They are checked before
// anything of that size is allocated or parsed.
const (
	MaxEventLog = 512 << 10                         // one event log
	MaxEvidence = MaxEventLog + MaxRunLog + 32<<10  // encoded Evidence
	MaxTPMBytes = 4 << 10                           // any one TPM structure
	MaxNonce    = 256                               // a nonce
	MaxName     = 255                               // a verifier's name
	MaxModel    = 128                               // a machine's model
	Profile     = "urn:sekisho:attest:evidence:1"   // of Evidence
	ResultType  = "urn:sekisho:attest:result:1"     // of Result
	bindingTag  = "sekisho/attest/1"                // domain separation of Binding
	ContentType = "application/vnd.sekisho.ev+cbor" // media type of Evidence
)

// Purpose is what a credential is asked for. It is bound by the quote.
type Purpose uint8

// The purposes, numbered by hand.
const (
	PurposeNetwork Purpose = 1 // certificate for the tunnel and the office
)

func (p Purpose) String() string {
	if p == PurposeNetwork {
		return "network"
	}
	return fmt.Sprintf("purpose(%d)", uint8(p))
}

// ParsePurpose is the inverse of Purpose.String.
func ParsePurpose(s string) (Purpose, error) {
	if s == PurposeNetwork.String() {
		return PurposeNetwork, nil
	}
	return 0, fmt.Errorf("unknown purpose %q", s)
}

// DeviceID is SHA-256 over the TPM Name of the endorsement key: nobody chooses
// it, and two devices share it only if they share a TPM.
func DeviceID(ekName []byte) Digest { return sha256.Sum256(ekName) }

// Evidence is what a device presents (RFC 9334, section 2.2.2). Every field is
// a claim by the device until the verifier has appraised it; the key that
// signed it is on purpose not among them: the verifier takes the attestation
// key from its own record.
type Evidence struct {
	Profile    string         `cbor:"1,keyasint"`
	Device     []byte         `cbor:"2,keyasint"`            // device id, 32 bytes
	Verifier   string         `cbor:"3,keyasint"`            // verifier that gave the nonce
	Purpose    Purpose        `cbor:"4,keyasint"`            // what the credential is for
	Nonce      []byte         `cbor:"5,keyasint"`            // as the verifier gave it
	Quote      []byte         `cbor:"6,keyasint"`            // TPMS_ATTEST of TPM2_Quote
	QuoteSig   []byte         `cbor:"7,keyasint"`            // TPMT_SIGNATURE over Quote
	PCRs       map[int][]byte `cbor:"8,keyasint"`            // SHA-256 bank, by index
	EventLog   []byte         `cbor:"9,keyasint"`            // TCG crypto-agile log, as firmware wrote it
	Key        []byte         `cbor:"10,keyasint"`           // TPMT_PUBLIC of the credential key
	Certify    []byte         `cbor:"11,keyasint"`           // TPMS_ATTEST of TPM2_Certify over Key
	CertifySig []byte         `cbor:"12,keyasint"`           // TPMT_SIGNATURE over Certify
	RunLog     []byte         `cbor:"13,keyasint,omitempty"` // run-time events (attest/runlog), absent while there are none
	Model      string         `cbor:"14,keyasint,omitempty"` // maker and model of the machine, as its firmware says
}

// ErrTooLarge is returned for input over one of this package's limits.
var ErrTooLarge = errors.New("over the size limit")

// codec returns the one way in which this package writes and reads CBOR:
// core deterministic encoding (RFC 8949, section 4.2.1), nothing optional.
func codec() (cbor.EncMode, cbor.DecMode, error) {
	enc, err := cbor.CoreDetEncOptions().EncMode()
	if err != nil {
		return nil, nil, err
	}
	dec, err := cbor.DecOptions{
		DupMapKey:         cbor.DupMapKeyEnforcedAPF,
		IndefLength:       cbor.IndefLengthForbidden,
		TagsMd:            cbor.TagsForbidden,
		ExtraReturnErrors: cbor.ExtraDecErrorUnknownField,
		MaxNestedLevels:   4,
		MaxArrayElements:  64,
		MaxMapPairs:       64,
	}.DecMode()
	return enc, dec, err
}

// Encode returns e in deterministic CBOR.
func (e *Evidence) Encode() ([]byte, error) {
	if err := e.check(); err != nil {
		return nil, err
	}
	enc, _, err := codec()
	if err != nil {
		return nil, fmt.Errorf("evidence: %w", err)
	}
	data, err := enc.Marshal(e)
	if err != nil {
		return nil, fmt.Errorf("evidence: %w", err)
	}
	return data, nil
}

// ParseEvidence reads evidence and refuses every encoding but the one that
// Encode gives, so that equal evidence has equal bytes.
func ParseEvidence(data []byte) (*Evidence, error) {
	if len(data) > MaxEvidence {
		return nil, fmt.Errorf("evidence: %d bytes, at most %d: %w", len(data), MaxEvidence, ErrTooLarge)
	}
	enc, dec, err := codec()
	if err != nil {
		return nil, fmt.Errorf("evidence: %w", err)
	}
	var e Evidence
	if err := dec.Unmarshal(data, &e); err != nil {
		return nil, fmt.Errorf("evidence: %w", err)
	}
	if err := e.check(); err != nil {
		return nil, err
	}
	again := same{data}
	if err := enc.NewEncoder(&again).Encode(&e); err != nil || len(again.left) > 0 {
		return nil, errors.New("evidence: encoding is not deterministic CBOR (RFC 8949, section 4.2.1)")
	}
	return &e, nil
}

// same is a writer of what is left and nothing else: it compares an encoding
// with bytes that are there already.
type same struct{ left []byte }

func (s *same) Write(b []byte) (int, error) {
	rest, ok := bytes.CutPrefix(s.left, b)
	if !ok {
		return 0, errors.New("other bytes")
	}
	s.left = rest
	return len(b), nil
}

// DeviceID returns the device that e claims to come from.
func (e *Evidence) DeviceID() Digest { return Digest(e.Device) }

func (e *Evidence) check() error {
	if e.Profile != Profile {
		return fmt.Errorf("evidence: profile %.64q, want %q", e.Profile, Profile)
	}
	if len(e.Device) != len(Digest{}) {
		return fmt.Errorf("evidence: device id of %d bytes, want %d", len(e.Device), len(Digest{}))
	}
	for name, f := range map[string]struct {
		size, max int
	}{
		"verifier":          {len(e.Verifier), MaxName},
		"nonce":             {len(e.Nonce), MaxNonce},
		"model":             {len(e.Model), MaxModel},
		"quote":             {len(e.Quote), MaxTPMBytes},
		"quote signature":   {len(e.QuoteSig), MaxTPMBytes},
		"event log":         {len(e.EventLog), MaxEventLog},
		"run-time log":      {len(e.RunLog), MaxRunLog},
		"key":               {len(e.Key), MaxTPMBytes},
		"certify":           {len(e.Certify), MaxTPMBytes},
		"certify signature": {len(e.CertifySig), MaxTPMBytes},
		"pcrs":              {len(e.PCRs), 24},
	} {
		if f.size > f.max {
			return fmt.Errorf("evidence: %s: %d, at most %d: %w", name, f.size, f.max, ErrTooLarge)
		}
	}
	for i, v := range e.PCRs {
		if i < 0 || i > 23 || len(v) != len(Digest{}) {
			return fmt.Errorf("evidence: pcr %d of %d bytes, want index 0 to 23 and %d bytes", i, len(v), len(Digest{}))
		}
	}
	return nil
}

// Binding is what one quote speaks for. A quote's extraData is its Digest, so
// none of its parts can be exchanged after the quote was made.
type Binding struct {
	Nonce    []byte
	Device   Digest
	Verifier string
	Purpose  Purpose
	Key      Digest // SHA-256 of the SubjectPublicKeyInfo of the certificate's key
	EventLog Digest // SHA-256 of the event log
	RunLog   []byte // run-time events, as in Evidence
	Model    string // as in Evidence
}

// Digest returns SHA-256("sekisho/attest/1" || deterministic CBOR of the
// fields as an array). CBOR gives each field its type and its length, so no
// two bindings share an encoding. The digest of the run-time log is a seventh
// element, absent while there are no events; the model is a last one, a text,
// absent while it is not known.
func (b Binding) Digest() (Digest, error) {
	enc, _, err := codec()
	if err != nil {
		return Digest{}, fmt.Errorf("binding: %w", err)
	}
	fields := []any{b.Nonce, b.Device[:], b.Verifier, uint8(b.Purpose), b.Key[:], b.EventLog[:]}
	if len(b.RunLog) > 0 {
		run := sha256.Sum256(b.RunLog)
		fields = append(fields, run[:])
	}
	if b.Model != "" {
		fields = append(fields, b.Model)
	}
	tuple, err := enc.Marshal(fields)
	if err != nil {
		return Digest{}, fmt.Errorf("binding: %w", err)
	}
	return sha256.Sum256(append([]byte(bindingTag), tuple...)), nil
}
