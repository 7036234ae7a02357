package seal

import (
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/hpke"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"sekisho/attest"
	"sekisho/attest/approval"
)

// A recovery key is 128 random bits, written as eight groups of six digits.
// Each group is 16 bits times eleven, so that a slip of one digit, or two
// digits exchanged, is noticed before anything is tried.
const (
	recoveryGroups = 8
	recoverySize   = 2 * recoveryGroups
	groupFactor    = 11
)

// Recovery is a recovery key. Printing or logging one shows nothing of it.
type Recovery struct{ secret Secret }

// NewRecovery makes a recovery key.
func NewRecovery() Recovery {
	b := make([]byte, recoverySize)
	rand.Read(b)
	return Recovery{Secret{b}}
}

// ErrRecovery: not a recovery key, or not the volume's.
var ErrRecovery = errors.New("wrong recovery key")

// ParseRecovery reads what Reveal gave; people may put spaces for the hyphens.
func ParseRecovery(text string) (Recovery, error) {
	if len(text) > 128 {
		return Recovery{}, fmt.Errorf("%w: %d characters", ErrRecovery, len(text))
	}
	groups := strings.FieldsFunc(text, func(r rune) bool { return r == '-' || r == ' ' || r == '\n' })
	if len(groups) != recoveryGroups {
		return Recovery{}, fmt.Errorf("%w: %d groups, want %d of six digits", ErrRecovery, len(groups), recoveryGroups)
	}
	var b []byte
	for i, g := range groups {
		n, err := strconv.ParseUint(g, 10, 32)
		if err != nil || len(g) != 6 || n%groupFactor != 0 || n/groupFactor > 0xffff {
			return Recovery{}, fmt.Errorf("%w: group %d is mistyped", ErrRecovery, i+1)
		}
		b = binary.BigEndian.AppendUint16(b, uint16(n/groupFactor))
	}
	return Recovery{Secret{b}}, nil
}

// Reveal returns the text of the key: to be shown once.
func (r Recovery) Reveal() string {
	var groups []string
	for b := r.secret.b; len(b) >= 2; b = b[2:] {
		groups = append(groups, fmt.Sprintf("%06d", int(binary.BigEndian.Uint16(b))*groupFactor))
	}
	return strings.Join(groups, "-")
}

func (r Recovery) String() string { return "[recovery key]" }

// escrowProfile is of Escrow.
const escrowProfile = "urn:sekisho:seal:escrow:1"

const maxEscrow = 4 << 10

// Escrow is a recovery key that only the organisation's escrow key opens:
// HPKE (RFC 9180) with DHKEM(P-256, HKDF-SHA256), HKDF-SHA256 and AES-256-GCM,
// bound to device and volume.
type Escrow struct {
	Profile    string        `json:"profile"`
	Device     attest.Digest `json:"device_id"`
	Volume     []byte        `json:"volume_id"`
	Created    time.Time     `json:"created"`
	Ciphertext []byte        `json:"ciphertext"`
}

func (e *Escrow) info() []byte {
	return append(append([]byte("sekisho/escrow/1"), e.Device[:]...), e.Volume...)
}

// NewEscrow encrypts r, of the volume with this id, to the organisation's
// escrow key.
func NewEscrow(to *ecdsa.PublicKey, device attest.Digest, volume []byte, r Recovery, now time.Time) (*Escrow, error) {
	e := &Escrow{Profile: escrowProfile, Device: device, Volume: volume, Created: now.UTC().Truncate(time.Second)}
	dh, err := to.ECDH()
	if err != nil {
		return nil, fmt.Errorf("escrow key: %w", err)
	}
	if dh.Curve() != ecdh.P256() {
		return nil, fmt.Errorf("escrow key on %v, want P-256", dh.Curve())
	}
	pk, err := hpke.NewDHKEMPublicKey(dh)
	if err != nil {
		return nil, fmt.Errorf("escrow: %w", err)
	}
	if e.Ciphertext, err = hpke.Seal(pk, hpke.HKDFSHA256(), hpke.AES256GCM(), e.info(), r.secret.b); err != nil {
		return nil, fmt.Errorf("escrow: %w", err)
	}
	return e, nil
}

// ParseEscrow reads an Escrow.
func ParseEscrow(data []byte) (*Escrow, error) {
	if len(data) > maxEscrow {
		return nil, fmt.Errorf("escrow: %d bytes, at most %d: %w", len(data), maxEscrow, attest.ErrTooLarge)
	}
	var e Escrow
	if err := json.Unmarshal(data, &e); err != nil {
		return nil, fmt.Errorf("escrow: %w", err)
	}
	if e.Profile != escrowProfile || len(e.Volume) != 16 {
		return nil, fmt.Errorf("escrow: profile %.64q, volume id of %d bytes", e.Profile, len(e.Volume))
	}
	return &e, nil
}

// ApproveRecovery is the type of a release's approval.
const ApproveRecovery = "recovery"

// RecoveryRequest is what the approvers sign: this volume of this device, for
// a short time.
type RecoveryRequest struct {
	Device  attest.Digest `json:"device_id"`
	Volume  []byte        `json:"volume_id"`
	Reason  string        `json:"reason"` // for the audit
	Expires time.Time     `json:"expires"`
}

// Release opens the escrow for a request that enough approvers have signed.
// A nil error proves: the request is for this very device and volume, has not
// expired, and approvers.Verify accepts its signatures. It returns who signed.
func (e *Escrow) Release(key *ecdsa.PrivateKey, signed *approval.Signed, approvers *approval.Approvers, now time.Time) (Recovery, []string, error) {
	payload, who, err := approvers.Verify(ApproveRecovery, signed)
	if err != nil {
		return Recovery{}, nil, fmt.Errorf("release of a recovery key: %w", err)
	}
	var req RecoveryRequest
	if err := json.Unmarshal(payload, &req); err != nil {
		return Recovery{}, nil, fmt.Errorf("release of a recovery key: %w", err)
	}
	switch {
	case req.Device != e.Device || string(req.Volume) != string(e.Volume):
		return Recovery{}, nil, fmt.Errorf("release of a recovery key: the approval is for volume %x of device %s, the escrow holds volume %x of device %s", req.Volume, req.Device, e.Volume, e.Device)
	case !now.Before(req.Expires):
		return Recovery{}, nil, fmt.Errorf("release of a recovery key: the approval expired at %s; ask for a new one", req.Expires.Format(time.RFC3339))
	}
	dh, err := key.ECDH()
	if err != nil {
		return Recovery{}, nil, fmt.Errorf("escrow key: %w", err)
	}
	sk, err := hpke.NewDHKEMPrivateKey(dh)
	if err != nil {
		return Recovery{}, nil, fmt.Errorf("escrow key: %w", err)
	}
	plain, err := hpke.Open(sk, hpke.HKDFSHA256(), hpke.AES256GCM(), e.info(), e.Ciphertext)
	if err != nil {
		return Recovery{}, nil, fmt.Errorf("escrow of device %s was made for another escrow key, or was altered: %w", e.Device, err)
	}
	if len(plain) != recoverySize {
		return Recovery{}, nil, errors.New("escrow: recovery key of a wrong size")
	}
	return Recovery{Secret{plain}}, who, nil
}
