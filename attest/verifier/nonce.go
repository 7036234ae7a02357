package verifier

import (
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"sync"
	"time"

	"sekisho/attest"
)

// NonceLife is how long a nonce may be answered.
const NonceLife = 60 * time.Second

// A nonce is random (16) ‖ issue time in ms since 1970 (8) ‖ device id (32) ‖
// HMAC-SHA-256 (32) over these and the verifier's name. Making one stores
// nothing, so asking for nonces costs the verifier nothing.
const (
	nonceRandom = 16
	nonceBody   = nonceRandom + 8 + 32
	nonceSize   = nonceBody + sha256.Size
)

// maxUsed bounds the memory of used nonces, per generation.
const maxUsed = 1 << 20

// Nonces makes nonces and lets each be used once. It is safe for concurrent
// use.
type Nonces struct {
	verifier string
	key      [32]byte

	// Used nonces in two generations of NonceLife each: what leaves the older
	// one has expired.
	mu       sync.Mutex
	turned   time.Time
	now, old map[[nonceRandom]byte]struct{}
}

// NewNonces returns a source of nonces for the verifier of that name. Its key
// is new: nonces do not outlive the process.
func NewNonces(verifier string) *Nonces {
	n := &Nonces{verifier: verifier, now: make(map[[nonceRandom]byte]struct{})}
	rand.Read(n.key[:])
	return n
}

// New returns a nonce for one attestation of device.
func (n *Nonces) New(device attest.Digest, now time.Time) []byte {
	nonce := make([]byte, nonceRandom, nonceSize)
	rand.Read(nonce)
	nonce = binary.BigEndian.AppendUint64(nonce, uint64(now.UnixMilli()))
	nonce = append(nonce, device[:]...)
	return append(nonce, n.mac(nonce)...)
}

// Use judges a nonce and uses it up. A nil error proves that we made it for
// device less than NonceLife ago and that it was not used before. Errors are
// *attest.Refusal.
func (n *Nonces) Use(nonce []byte, device attest.Digest, now time.Time) error {
	if len(nonce) != nonceSize || !hmac.Equal(n.mac(nonce[:nonceBody]), nonce[nonceBody:]) {
		return attest.Refuse(attest.ReasonNonceInvalid, "nonce is not one of this verifier's; ask for a new challenge")
	}
	issued := time.UnixMilli(int64(binary.BigEndian.Uint64(nonce[nonceRandom:])))
	switch age := now.Sub(issued); {
	case !bytes.Equal(nonce[nonceRandom+8:nonceBody], device[:]):
		return attest.Refuse(attest.ReasonDeviceMismatch, "nonce was given to another device")
	case age > NonceLife || age < -NonceLife:
		return attest.Refuse(attest.ReasonNonceExpired, "nonce is %s old, at most %s; ask for a new challenge", age.Round(time.Second), NonceLife)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if now.Sub(n.turned) > NonceLife {
		n.turned, n.old, n.now = now, n.now, make(map[[nonceRandom]byte]struct{})
	}
	id := [nonceRandom]byte(nonce)
	_, again := n.now[id]
	_, before := n.old[id]
	switch {
	case again || before:
		return attest.Refuse(attest.ReasonNonceReused, "nonce was used before; ask for a new challenge")
	case len(n.now) >= maxUsed:
		return attest.Refuse(attest.ReasonBusy, "%d attestations within %s; try again", maxUsed, NonceLife)
	}
	n.now[id] = struct{}{}
	return nil
}

func (n *Nonces) mac(body []byte) []byte {
	h := hmac.New(sha256.New, n.key[:])
	fmt.Fprintf(h, "sekisho/nonce/1 %d %s", len(n.verifier), n.verifier)
	h.Write(body)
	return h.Sum(nil)
}
