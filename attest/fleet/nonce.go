package fleet

import (
	"slices"
	"time"

	"sekisho/attest"
	"sekisho/attest/verifier"
)

// maxUsed is how many nonces of one device are remembered as used: how often
// it may attest within usedFor. A laptop attests every few minutes.
const (
	maxUsed = 16
	usedFor = 2 * verifier.NonceLife
)

// usedNonce is a nonce that evidence was bound to.
type usedNonce struct {
	ID []byte `json:"id"`
	At int64  `json:"at"` // when it was made, ms since 1970
}

// unused judges whether a device may use a nonce: that it has not before, with
// any verifier. Errors are *attest.Refusal.
func (s Seen) unused(n verifier.Nonce) error {
	for _, u := range s.Used {
		if string(u.ID) == string(n.ID[:]) {
			return attest.Refuse(attest.ReasonNonceReused, "nonce was used before; ask for a new challenge")
		}
	}
	return nil
}

// use notes a nonce as used and forgets those that have long expired. The
// times are those of the verifiers that made the nonces; should one's clock
// jump and make others forget too early, evidence that was answered is still
// refused for its TPM's clock.
func (s *Seen) use(n verifier.Nonce, now time.Time) error {
	s.Used = slices.DeleteFunc(s.Used, func(u usedNonce) bool { return now.Sub(time.UnixMilli(u.At)).Abs() > usedFor })
	if len(s.Used) >= maxUsed {
		return attest.Refuse(attest.ReasonBusy, "%d attestations of this device within %s; try again", len(s.Used), usedFor)
	}
	s.Used = append(s.Used, usedNonce{n.ID[:], n.Issued.UnixMilli()})
	return nil
}
