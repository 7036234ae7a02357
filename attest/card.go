package attest

import (
	"bytes"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"
)

// ApproveCard is the type of a card permit's approval.
const ApproveCard = "card"

// CardAction is what a permit lets happen to the card of one laptop. The zero
// value is nothing.
type CardAction string

// The actions.
const (
	CardSetup   CardAction = "setup"    // a new key for a user; what the card was before is gone
	CardImport  CardAction = "import"   // the certificate of that key
	CardPIN     CardAction = "pin"      // a PIN, with all its tries
	CardUnblock CardAction = "unblock"  // all tries of the PIN that is set
	CardEnrol   CardAction = "enrol"    // a finger
	CardDelete  CardAction = "delete"   // a finger
	CardPINOnly CardAction = "pin-only" // the PIN stands alone for a while
)

// Limits of card permits.
const (
	maxCardPermit   = 32 << 10 // bytes of JSON
	maxCardLife     = 7 * 24 * time.Hour
	maxPINOnly      = 24 * 60 // minutes
	maxCardName     = 128     // bytes of a user or a name
	pinIterations   = 100_000
	pinSize         = 8 // bytes of a PIN, filled up
	pinSaltSize     = 16
	maxLogonEvents  = 64  // of one report
	maxLogonText    = 256 // bytes of one field of an event
	maxLogonRequest = 48 << 10
)

// CardPermit is what two persons of the organisation sign: this laptop may do
// this to the card of this user, once, until it expires.
type CardPermit struct {
	Serial  string       `json:"serial"` // random, so that no two permits are the same
	Device  Digest       `json:"device_id"`
	User    string       `json:"user"` // whose card it is, or for CardSetup will be
	Do      CardAction   `json:"do"`
	Name    string       `json:"name,omitempty"`    // CardSetup: the user's name for people
	Chain   string       `json:"chain,omitempty"`   // CardImport: PEM
	PIN     *CardPINHash `json:"pin,omitempty"`     // CardPIN
	Finger  string       `json:"finger,omitempty"`  // CardEnrol, CardDelete: by fprintd's names
	Minutes int          `json:"minutes,omitempty"` // CardPINOnly; 0 ends it
	Reason  string       `json:"reason"`
	Expires time.Time    `json:"expires"`
}

// ParseCardPermit reads and validates a CardPermit.
func ParseCardPermit(data []byte) (CardPermit, error) {
	var p CardPermit
	if len(data) > maxCardPermit {
		return p, fmt.Errorf("card permit: %d bytes, at most %d: %w", len(data), maxCardPermit, ErrTooLarge)
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(&p); err != nil {
		return p, fmt.Errorf("card permit: %w", err)
	}
	if _, err := d.Token(); err != io.EOF {
		return p, errors.New("card permit: data after the document")
	}
	return p, p.Validate()
}

// Validate reports every fault of p, joined.
func (p CardPermit) Validate() error {
	var errs []error
	fail := func(format string, a ...any) { errs = append(errs, fmt.Errorf("card permit: "+format, a...)) }
	if p.Serial == "" || len(p.Serial) > 64 || p.User == "" || len(p.User) > maxCardName || len(p.Name) > maxCardName {
		fail("want a serial, a user and a name of at most %d bytes", maxCardName)
	}
	if p.Reason == "" || len(p.Reason) > MaxName {
		fail("reason of %d bytes, want 1 to %d", len(p.Reason), MaxName)
	}
	fits := map[CardAction]bool{
		CardSetup: true, CardUnblock: true,
		CardImport:  p.Chain != "",
		CardPIN:     p.PIN != nil && len(p.PIN.Salt) == pinSaltSize && len(p.PIN.Hash) == sha256.Size,
		CardEnrol:   p.Finger != "" && len(p.Finger) <= 64,
		CardDelete:  p.Finger != "" && len(p.Finger) <= 64,
		CardPINOnly: p.Minutes >= 0 && p.Minutes <= maxPINOnly,
	}
	if ok, known := fits[p.Do]; !known {
		fail("action %.32q: want setup, import, pin, unblock, enrol, delete or pin-only", string(p.Do))
	} else if !ok {
		fail("%s: want a certificate (import), a PIN (pin), a finger (enrol, delete) or 0 to %d minutes (pin-only)", p.Do, maxPINOnly)
	}
	return errors.Join(errs...)
}

// InForce reports whether p may be used on device at now. A permit of a long
// life is none: who signed it may have left.
func (p CardPermit) InForce(device Digest, now time.Time) error {
	switch left := p.Expires.Sub(now); {
	case p.Device != device:
		return fmt.Errorf("card permit: for device %s, this is %s", p.Device, device)
	case left <= 0:
		return fmt.Errorf("card permit: expired at %s", p.Expires.Format(time.RFC3339))
	case left > maxCardLife:
		return fmt.Errorf("card permit: expires at %s: want at most %s from now", p.Expires.Format(time.RFC3339), maxCardLife)
	}
	return nil
}

// CardPINHash is a PIN as it is kept and as a permit carries it. Six digits are
// soon guessed from it, whatever the hash is: a PIN in a permit is one that its
// user changes at the first sign-in.
type CardPINHash struct {
	Salt []byte `json:"salt"`
	Hash []byte `json:"hash"` // PBKDF2-HMAC-SHA-256 of the PIN's eight bytes
}

// NewCardPINHash hashes a PIN's eight bytes under a new salt.
func NewCardPINHash(padded []byte) (CardPINHash, error) {
	h := CardPINHash{Salt: make([]byte, pinSaltSize)}
	rand.Read(h.Salt)
	var err error
	h.Hash, err = HashCardPIN(padded, h.Salt)
	return h, err
}

// HashCardPIN is the hash of a PIN's eight bytes. Ten million PINs are few
// whatever the iterations are: what stops guessing is the counter, and the TPM
// that keeps the hash.
func HashCardPIN(padded, salt []byte) ([]byte, error) {
	return pbkdf2.Key(sha256.New, string(padded), salt, pinIterations, sha256.Size)
}

// PadCardPIN returns a PIN of six to eight digits as eight bytes, filled up
// with 0xFF (NIST SP 800-73-4, part 1, section 2.4.3).
func PadCardPIN(pin string) ([]byte, error) {
	if len(pin) < 6 || len(pin) > pinSize {
		return nil, errors.New("PIN is not six to eight digits")
	}
	padded := bytes.Repeat([]byte{0xff}, pinSize)
	for i := range len(pin) {
		if pin[i] < '0' || pin[i] > '9' {
			return nil, errors.New("PIN is not six to eight digits")
		}
	}
	copy(padded, pin)
	return padded, nil
}

// LogonEvent is one use of a card, or one that was refused, for the
// organisation's audit.
type LogonEvent struct {
	Number uint64    `json:"number"` // rises by one with each event of a laptop
	Time   time.Time `json:"time"`
	User   string    `json:"user"`
	What   string    `json:"what"`             // key that was used, such as "9A", or action of a permit
	Factor string    `json:"factor,omitempty"` // "finger+pin", "finger", "pin"; empty when refused
	Reason string    `json:"reason"`           // "open", or why it was refused
	Result string    `json:"result"`           // device and end of the attestation result it was made under
	Permit string    `json:"permit,omitempty"` // approval by which it was done
}

// PathLogon is where a laptop reports to a verifier: POST LogonReport →
// LogonAnswer.
const PathLogon = "/v1/logon"

// LogonReport carries a LogonNews, signed by the credential in force.
type LogonReport struct {
	News      []byte   `json:"news"`  // LogonNews in JSON
	Chain     [][]byte `json:"chain"` // DER, the device's certificate first
	Signature []byte   `json:"signature"`
}

// LogonNews is what is new of a laptop's card. Empty of events and request, it
// asks for permits.
type LogonNews struct {
	Device  Digest       `json:"device_id"`
	Events  []LogonEvent `json:"events,omitempty"`  // oldest first
	Request []byte       `json:"request,omitempty"` // gate.CardRequest in JSON, while the card wants a certificate
}

// LogonAnswer is the verifier's.
type LogonAnswer struct {
	Stored  uint64   `json:"stored"`            // number of the newest event that is kept
	Permits [][]byte `json:"permits,omitempty"` // approvals in JSON, in force; for the laptop to verify
}

// LogonDigest is what the credential key signs for a report.
func LogonDigest(news []byte) Digest {
	h := sha256.New()
	h.Write([]byte("sekisho/logon/1"))
	h.Write(news)
	return Digest(h.Sum(nil))
}

// ParseLogonNews reads a LogonNews within its bounds.
func ParseLogonNews(data []byte) (LogonNews, error) {
	var n LogonNews
	if len(data) > MaxMessage {
		return n, fmt.Errorf("logon news: %d bytes, at most %d: %w", len(data), MaxMessage, ErrTooLarge)
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(&n); err != nil {
		return n, fmt.Errorf("logon news: %w", err)
	}
	if len(n.Events) > maxLogonEvents || len(n.Request) > maxLogonRequest {
		return n, fmt.Errorf("logon news: %d events and a request of %d bytes, at most %d and %d", len(n.Events), len(n.Request), maxLogonEvents, maxLogonRequest)
	}
	for _, e := range n.Events {
		for _, text := range []string{e.User, e.What, e.Factor, e.Reason, e.Result, e.Permit} {
			if len(text) > maxLogonText {
				return n, fmt.Errorf("logon news: event %d has a field of %d bytes, at most %d", e.Number, len(text), maxLogonText)
			}
		}
	}
	return n, nil
}
