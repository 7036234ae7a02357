// Package login decides whether the smart card's key may be used, and runs the
// card: attestation, fingerprint and PIN open it together, and a lapse of the
// first takes it out of the reader.
package login

import (
	"time"

	"sekisho/attest"
	"sekisho/attest/gate"
	"sekisho/hostos/login/piv"
)

// Facts are all that the gate before the card's key knows. The zero value is
// shut.
type Facts struct {
	Policy      attest.Logon
	Attestation gate.Status
	PIN         bool      // verified on the card
	PINLeft     int       // tries
	Finger      time.Time // of a match that was not used yet, zero without one
	Locked      time.Time // until when fingers are locked out
	PINOnly     time.Time // until when a permit lets the PIN stand alone
}

// Reason is why the gate is shut, or that it is open. The zero value is shut
// for no reason that is known.
type Reason string

// The reasons.
const (
	Open         Reason = "open"
	NotSet       Reason = "not-set-up"   // no user, key or certificate
	NotAttested  Reason = "not-attested" // no affirming result in force
	PINBlocked   Reason = "pin-blocked"
	PINWrong     Reason = "pin-wrong"
	PINWanted    Reason = "pin-wanted"
	FingerLocked Reason = "finger-locked"
	FingerWanted Reason = "finger-wanted"
	NoReader     Reason = "no-reader"
)

// words are the reasons for people, Japanese and English.
var words = map[Reason][2]string{
	Open:         {"サインインできます。", "ready for sign-in"},
	NotSet:       {"カードはまだ準備されていません。管理者に依頼してください。", "the card is not set up yet; ask an administrator"},
	NotAttested:  {"この端末の状態が確認されていないため、サインインできません。", "this laptop is not attested, so nobody can sign in"},
	PINBlocked:   {"PIN がロックされています。管理者に解除を依頼してください。", "the PIN is blocked; ask an administrator to unblock it"},
	PINWrong:     {"PIN が違います。", "wrong PIN"},
	PINWanted:    {"PIN を入力してください。", "enter the PIN"},
	FingerLocked: {"指紋の不一致が続いたため、しばらく使えません。", "too many fingers that did not match; wait"},
	FingerWanted: {"指紋センサーに指を置いてください。", "put your finger on the reader"},
	NoReader:     {"指紋センサーが使えません。管理者に連絡してください。", "the fingerprint reader does not work; call an administrator"},
}

// Words returns the reason for people.
func (r Reason) Words() (ja, en string) {
	w, ok := words[r]
	if !ok {
		return "サインインできません。", "nobody can sign in"
	}
	return w[0], w[1]
}

// Status is what the card answers where the gate is shut for r: the PIN has
// words of its own in SP 800-73-4, part 2, table 3; all else is a security
// status that is not satisfied.
func (r Reason) Status() piv.Status {
	switch r {
	case Open:
		return piv.OK
	case PINBlocked:
		return piv.Blocked
	}
	return piv.SecurityStatus
}

// Decide says whether the key may be used once, now. It is open only if
//
//   - the attestation result is affirming and has not lapsed,
//   - the PIN was verified and is not blocked, where the organisation wants it,
//   - a finger matched within the time that the organisation allows, for this
//     operation, where it wants fingers and no permit lets the PIN stand alone.
//
// A permit for the PIN alone makes the PIN wanted.
func Decide(f Facts, now time.Time) Reason {
	if _, open := gate.Open(f.Attestation, gate.Logon, now); !open {
		return NotAttested
	}
	pinOnly := now.Before(f.PINOnly)
	if f.Policy.PIN || pinOnly || !f.Policy.Finger {
		switch {
		case f.PINLeft <= 0:
			return PINBlocked
		case !f.PIN:
			return PINWanted
		}
	}
	if !f.Policy.Finger || pinOnly {
		return Open
	}
	age := now.Sub(f.Finger)
	switch {
	case now.Before(f.Locked):
		return FingerLocked
	case f.Finger.IsZero() || age < 0 || age > f.Policy.FingerAge():
		return FingerWanted
	}
	return Open
}
