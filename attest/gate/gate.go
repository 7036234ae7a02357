// Package gate says which attestation result opens what and for how long, and
// is the client of attestd's socket, through which the rest of the host domain
// learns the state and uses the credential. A gate is shut unless it can name
// the moment until which it is open.
package gate

import (
	"encoding/json"
	"fmt"
	"time"
)

// States of attestation, as attestd reports them in Status.State. The zero
// value is closed, as is every state but StateAffirming.
const (
	StateNoTPM       = "no-tpm"      // no usable TPM in this machine
	StateUnenrolled  = "unenrolled"  // no enrolment record and no ticket
	StateEnrolling   = "enrolling"   // enrolment with a ticket is under way
	StateAttesting   = "attesting"   // enrolled, no result in force yet
	StateAffirming   = "affirming"   // a credential is in force until Status.NotAfter
	StateRefused     = "refused"     // the verifier appraised and refused; Reason says why
	StateUnreachable = "unreachable" // no verifier answers
)

// Status is what attestd knows about this device's attestation.
type Status struct {
	Version  uint64    `json:"version"`            // rises with every change
	State    string    `json:"state"`              // one of the State constants
	Since    time.Time `json:"since"`              // when State was entered
	Reason   string    `json:"reason"`             // reason code (attest.Reason), empty when all is well
	Detail   string    `json:"detail"`             // one sentence for people
	DeviceID string    `json:"device_id"`          // hexadecimal, empty while unknown
	NotAfter time.Time `json:"not_after,omitzero"` // end of the credential in force, zero when there is none
}

// Gate is something that attestation opens.
type Gate int

// The gates, numbered by hand. The zero value names no gate and never opens.
const (
	Tunnel     Gate = 1 // the tunnel's mutual TLS
	Office     Gate = 2 // the office beacon and 802.1X
	Logon      Gate = 3 // the virtual smart card's authentication key
	Credential Gate = 4 // signatures with the credential key
)

var names = map[Gate]string{Tunnel: "tunnel", Office: "office", Logon: "logon", Credential: "credential"}

func (g Gate) String() string {
	if n, ok := names[g]; ok {
		return n
	}
	return fmt.Sprintf("gate(%d)", int(g))
}

// ParseGate is the inverse of Gate.String.
func ParseGate(s string) (Gate, error) {
	for g, n := range names {
		if n == s {
			return g, nil
		}
	}
	return 0, fmt.Errorf("unknown gate %q", s)
}

// Open returns until when g is open under s, and whether it is open at now.
// Every gate is open while a credential is in force, and only then: a verifier
// that is away does not shorten what it granted, a refusal ends it at once.
func Open(s Status, g Gate, now time.Time) (until time.Time, open bool) {
	if _, known := names[g]; known && s.State == StateAffirming && now.Before(s.NotAfter) {
		return s.NotAfter, true
	}
	return time.Time{}, false
}

// ParseStatus reads a Status from attestd's JSON.
func ParseStatus(data []byte) (Status, error) {
	var s Status
	if len(data) > maxBody {
		return s, fmt.Errorf("attestation status: %d bytes, at most %d", len(data), maxBody)
	}
	if err := json.Unmarshal(data, &s); err != nil {
		return Status{}, fmt.Errorf("attestation status: %w", err)
	}
	return s, nil
}
