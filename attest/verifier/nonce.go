package verifier

import (
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"time"

	"sekisho/attest"
)

// NonceLife is how long a nonce may be answered.
const NonceLife = 60 * time.Second

// A nonce is random (16) ‖ issue time in ms since 1970 (8) ‖ device (8) ‖
// verifier (8) ‖ MAC (24), 64 bytes, the most that an EAT carries (RFC 9711,
// section 4.1). Device and verifier are the first bytes of the device id and
// of the SHA-256 of the verifier's name; the MAC, HMAC-SHA-256 cut to 192 bits
// (RFC 2104, section 5), covers both in full. Making one stores nothing, so
// asking for nonces costs the verifier nothing.
const (
	nonceRandom   = 16
	nonceDevice   = nonceRandom + 8
	nonceVerifier = nonceDevice + 8
	nonceBody     = nonceVerifier + 8
	nonceSize     = nonceBody + 24
)

// NonceKeySize is the size in bytes of the key that the verifiers of an
// organisation share.
const NonceKeySize = 32

// Nonces makes and judges nonces. Every verifier of that name which has the
// key judges them alike, also after a restart. That each is used only once is
// for the caller to see to, by Nonce. It is safe for concurrent use.
type Nonces struct {
	verifier string
	key      [NonceKeySize]byte
}

// Nonce tells nonces apart that Check has passed.
type Nonce struct {
	ID     [nonceRandom]byte
	Issued time.Time
}

// NewNonces returns a source of nonces for the verifier of that name, with the
// key of its organisation.
func NewNonces(verifier string, key [NonceKeySize]byte) *Nonces {
	return &Nonces{verifier: verifier, key: key}
}

// New returns a nonce for one attestation of device.
func (n *Nonces) New(device attest.Digest, now time.Time) []byte {
	nonce := make([]byte, nonceRandom, nonceSize)
	rand.Read(nonce)
	nonce = binary.BigEndian.AppendUint64(nonce, uint64(now.UnixMilli()))
	nonce = append(nonce, device[:8]...)
	tag := verifierTag(n.verifier)
	nonce = append(nonce, tag[:]...)
	return append(nonce, n.mac(nonce, n.verifier, device)...)
}

// Check judges a nonce. A nil error proves that a verifier of our name made it
// for device at most NonceLife ago. Errors are *attest.Refusal.
func (n *Nonces) Check(nonce []byte, device attest.Digest, now time.Time) (Nonce, error) {
	if len(nonce) != nonceSize {
		return Nonce{}, attest.Refuse(attest.ReasonNonceInvalid, "nonce of %d bytes, want %d; ask for a new challenge", len(nonce), nonceSize)
	}
	if tag := verifierTag(n.verifier); !bytes.Equal(nonce[nonceVerifier:nonceBody], tag[:]) {
		return Nonce{}, attest.Refuse(attest.ReasonVerifierMismatch, "nonce was given by another verifier, this is %q; ask here for a new challenge", n.verifier)
	}
	issued := time.UnixMilli(int64(binary.BigEndian.Uint64(nonce[nonceRandom:])))
	switch age := now.Sub(issued); {
	case !bytes.Equal(nonce[nonceDevice:nonceVerifier], device[:8]):
		return Nonce{}, attest.Refuse(attest.ReasonDeviceMismatch, "nonce was given to another device")
	case !hmac.Equal(n.mac(nonce[:nonceBody], n.verifier, device), nonce[nonceBody:]):
		return Nonce{}, attest.Refuse(attest.ReasonNonceInvalid, "nonce is not one of this organisation's; ask for a new challenge")
	case age > NonceLife || age < -NonceLife:
		return Nonce{}, attest.Refuse(attest.ReasonNonceExpired, "nonce is %s old, at most %s; ask for a new challenge", age.Round(time.Second), NonceLife)
	}
	return Nonce{[nonceRandom]byte(nonce), issued}, nil
}

// Authentic reports whether a verifier of that name, with our key, made nonce
// for device. It says nothing about age and use: those only its maker judges.
func (n *Nonces) Authentic(nonce []byte, verifier string, device attest.Digest) bool {
	return len(nonce) == nonceSize && hmac.Equal(n.mac(nonce[:nonceBody], verifier, device), nonce[nonceBody:])
}

func verifierTag(name string) [8]byte {
	sum := sha256.Sum256([]byte(name))
	return [8]byte(sum[:8])
}

func (n *Nonces) mac(body []byte, verifier string, device attest.Digest) []byte {
	h := hmac.New(sha256.New, n.key[:])
	fmt.Fprintf(h, "sekisho/nonce/2 %d %s", len(verifier), verifier)
	h.Write(device[:])
	h.Write(body)
	return h.Sum(nil)[:nonceSize-nonceBody]
}
