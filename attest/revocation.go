package attest

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"time"
)

// PathRevocations is the verifier's stream of revocations, for gateways that
// show a client certificate: GET, then one SignedRevocations in each line, all
// that is revoked first, changes as they come, and a heartbeat in between.
const PathRevocations = "/v1/revocations"

// Of the stream of revocations.
const (
	RevocationBeat    = 2 * time.Second  // between two messages
	RevocationSilence = 10 * time.Second // after which a gateway admits nobody new

	// MaxRevocations bounds one message in bytes: 100,000 devices.
	MaxRevocations = 16 << 20
)

// Revocations is one message of the stream.
type Revocations struct {
	Organization string       `json:"organization"`
	Sequence     uint64       `json:"sequence"` // of the newest change that is in; it never falls
	Time         int64        `json:"time"`     // ms since 1970
	Full         bool         `json:"full"`     // the first message: Changes is all there is
	Changes      []Revocation `json:"changes,omitempty"`
}

// What a revocation ends.
const (
	RevokeDevice       = ""             // one device
	RevokeKey          = "key"          // one credential key
	RevokePolicy       = "policy"       // credentials issued under a version of the policy
	RevokeUser         = "user"         // the devices where a user has logged on last
	RevokeOrganization = "organization" // all of the organisation's devices
)

// Revocation is the end of what Kind says, or its return.
type Revocation struct {
	Kind     string   `json:"kind,omitempty"` // one of the constants above
	Device   Digest   `json:"device_id,omitzero"`
	Key      Digest   `json:"key,omitzero"` // SHA-256 of its SubjectPublicKeyInfo
	Policy   uint64   `json:"policy,omitempty"`
	From     int64    `json:"from,omitempty"`  // of RevokePolicy: NotBefore of the credentials,
	Until    int64    `json:"until,omitempty"` // both inclusive, in s since 1970
	User     string   `json:"user,omitempty"`
	Devices  []Digest `json:"devices,omitempty"` // of RevokeUser
	Sequence uint64   `json:"sequence"`
	Revoked  bool     `json:"revoked"`

	// For people.
	Reason string `json:"reason,omitempty"`
	Time   int64  `json:"time,omitempty"` // s since 1970
}

// Subject names what a revocation is about, for one record of each.
func (r Revocation) Subject() string {
	switch r.Kind {
	case RevokeDevice:
		return "device/" + r.Device.String()
	case RevokeKey:
		return "key/" + r.Key.String()
	case RevokePolicy:
		return "policy/" + strconv.FormatUint(r.Policy, 10)
	case RevokeUser:
		return "user/" + url.PathEscape(r.User)
	}
	return r.Kind
}

// Holder is who holds a credential.
type Holder struct {
	Device Digest
	Key    Digest    // SHA-256 of the SubjectPublicKeyInfo
	Issued time.Time // NotBefore of the credential; zero: there is none yet
}

// Covers reports whether a revocation ends what h holds. One of a kind that is
// not known ends everything.
func (r Revocation) Covers(h Holder) bool {
	if !r.Revoked {
		return false
	}
	switch r.Kind {
	case RevokeDevice:
		return r.Device == h.Device
	case RevokeKey:
		return r.Key == h.Key
	case RevokePolicy:
		t := h.Issued.Unix()
		return !h.Issued.IsZero() && r.From <= t && t <= r.Until
	case RevokeUser:
		return slices.Contains(r.Devices, h.Device)
	}
	return true
}

// RevocationSet is what is revoked now. The zero value is empty. It is not
// safe for concurrent use.
type RevocationSet struct {
	single map[string]Revocation // of one device or key, by subject
	broad  map[string]Revocation // the others, few
}

// Apply takes in a change.
func (s *RevocationSet) Apply(r Revocation) {
	if s.single == nil {
		s.single, s.broad = make(map[string]Revocation), make(map[string]Revocation)
	}
	in := s.broad
	if r.Kind == RevokeDevice || r.Kind == RevokeKey {
		in = s.single
	}
	if delete(in, r.Subject()); r.Revoked {
		in[r.Subject()] = r
	}
}

// Covers returns a revocation that ends what h holds.
func (s *RevocationSet) Covers(h Holder) (Revocation, bool) {
	for _, r := range s.broad {
		if r.Covers(h) {
			return r, true
		}
	}
	for _, q := range []Revocation{{Device: h.Device}, {Kind: RevokeKey, Key: h.Key}} {
		if r, ok := s.single[q.Subject()]; ok {
			return r, true
		}
	}
	return Revocation{}, false
}

// List is all of it, in no order.
func (s *RevocationSet) List() []Revocation {
	return slices.AppendSeq(slices.Collect(maps.Values(s.broad)), maps.Values(s.single))
}

// SignedRevocations is a message with the verifier's signature.
type SignedRevocations struct {
	Message   []byte `json:"message"`   // Revocations in JSON
	Signature []byte `json:"signature"` // ECDSA with SHA-256 by the verifier's report key
}

func revocationsDigest(message []byte) [32]byte {
	return sha256.Sum256(append([]byte("sekisho/revocations/1\x00"), message...))
}

// SignRevocations signs a message.
func SignRevocations(r Revocations, key *ecdsa.PrivateKey) (*SignedRevocations, error) {
	message, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("revocations: %w", err)
	}
	digest := revocationsDigest(message)
	sig, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
	if err != nil {
		return nil, fmt.Errorf("revocations: %w", err)
	}
	return &SignedRevocations{message, sig}, nil
}

// ParseRevocations reads a line of the stream, which key must have signed.
func ParseRevocations(line []byte, key *ecdsa.PublicKey) (*Revocations, error) {
	if len(line) > MaxRevocations {
		return nil, fmt.Errorf("revocations: %d bytes, at most %d: %w", len(line), MaxRevocations, ErrTooLarge)
	}
	var s SignedRevocations
	if err := json.Unmarshal(line, &s); err != nil {
		return nil, fmt.Errorf("revocations: %w", err)
	}
	digest := revocationsDigest(s.Message)
	if !ecdsa.VerifyASN1(key, digest[:], s.Signature) {
		return nil, errors.New("revocations: not signed by the verifier's report key")
	}
	var r Revocations
	if err := json.Unmarshal(s.Message, &r); err != nil {
		return nil, fmt.Errorf("revocations: %w", err)
	}
	return &r, nil
}
