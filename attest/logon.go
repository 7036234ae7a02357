package attest

import (
	"errors"
	"fmt"
	"time"
)

// Kinds of logon keys.
const (
	LogonRSA2048 = "rsa-2048"
	LogonP256    = "p-256"
)

// LogonOperation is what the card's private key does. The numbers are those of
// attestd's socket. The zero value is none.
type LogonOperation int

// The operations.
const (
	LogonSign LogonOperation = 1 // ECDSA over a digest
	LogonRSA  LogonOperation = 2 // private operation on a padded block
	LogonECDH LogonOperation = 3 // agreement with a point
)

// Logon says how people log on to the work domain with the laptop as their
// smart card. Absent from an Organization, the work domain has no card reader.
type Logon struct {
	Key    string `json:"key"`    // LogonRSA2048 or LogonP256
	PIN    bool   `json:"pin"`    // the PIN as second factor
	Finger bool   `json:"finger"` // false only where the work domain has biometrics of its own
	// FingerSeconds is how long a match is good for, for one operation.
	FingerSeconds int `json:"finger_seconds"`
	PINTries      int `json:"pin_tries"`
	// FingerTries is how many touches in a row may not match before fingers
	// are locked out for LockSeconds.
	FingerTries int `json:"finger_tries"`
	LockSeconds int `json:"lock_seconds"`
	// Approvers are the public keys (PEM) of those whose permits the card
	// obeys, two of them each (attest/approval). Without it no permit counts.
	Approvers string `json:"approvers,omitempty"`
}

// DefaultLogon is finger and PIN.
func DefaultLogon() Logon {
	return Logon{Key: LogonRSA2048, PIN: true, Finger: true, FingerSeconds: 30, PINTries: 5, FingerTries: 5, LockSeconds: 300}
}

// FingerAge is FingerSeconds as a duration.
func (l Logon) FingerAge() time.Duration { return time.Duration(l.FingerSeconds) * time.Second }

// Lock is LockSeconds as a duration.
func (l Logon) Lock() time.Duration { return time.Duration(l.LockSeconds) * time.Second }

// Validate reports every fault of l, joined.
func (l Logon) Validate() error {
	var errs []error
	if l.Key != LogonRSA2048 && l.Key != LogonP256 {
		errs = append(errs, fmt.Errorf("logon: key %q: want %q or %q", l.Key, LogonRSA2048, LogonP256))
	}
	if !l.PIN && !l.Finger {
		errs = append(errs, errors.New("logon: neither pin nor finger: want at least one"))
	}
	for _, f := range []struct {
		name       string
		value      int
		least, max int
	}{
		{"finger_seconds", l.FingerSeconds, 5, 300},
		{"pin_tries", l.PINTries, 3, 15},
		{"finger_tries", l.FingerTries, 3, 20},
		{"lock_seconds", l.LockSeconds, 30, 86400},
	} {
		if f.value < f.least || f.value > f.max {
			errs = append(errs, fmt.Errorf("logon: %s is %d: want %d to %d", f.name, f.value, f.least, f.max))
		}
	}
	return errors.Join(errs...)
}
