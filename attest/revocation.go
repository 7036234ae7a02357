package attest

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
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

// Revocation is the end of a device, or its return.
type Revocation struct {
	Device   Digest `json:"device_id"`
	Sequence uint64 `json:"sequence"`
	Revoked  bool   `json:"revoked"`
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
