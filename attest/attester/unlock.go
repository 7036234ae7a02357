package attester

import (
	"errors"
	"fmt"

	"sekisho/attest"
	"sekisho/attest/seal"
)

// maxUnlock bounds a request for a key in bytes.
const maxUnlock = 128 << 10

// Unsealer opens what is sealed; *tpm.TPM has it.
type Unsealer interface {
	Unseal(s seal.Sealed, r *seal.Release, key seal.ReleaseKey, purpose string) (seal.Secret, error)
}

// Unlock returns the key of a volume whose header has this SHA-256. When it
// returns, the use of the key is measured: PCR 15 holds what shows which
// volume it was, the log says so, a new quote follows, and no second key can
// be had in this boot. A key whose use could not be measured is not given.
//
// Whose key signed the release is not asked here: a sealed object opens for
// one release key only, and the TPM sees to that.
func (a *Attester) Unlock(v *seal.Volume, header attest.Digest, release []byte) (seal.Secret, error) {
	r, signer, err := seal.ReadRelease(release)
	if err != nil {
		return seal.Secret{}, err
	}
	if err := a.openTPM(); err != nil {
		return seal.Secret{}, err
	}
	a.mu.Lock()
	hw, device := a.hw, a.device
	a.mu.Unlock()
	u, ok := hw.(Unsealer)
	if !ok {
		return seal.Secret{}, errors.New("unlock: the TPM was closed, or cannot unseal; try again")
	}
	secret, err := u.Unseal(v.Sealed, r, signer, v.Purpose)
	if err != nil {
		return seal.Secret{}, err
	}
	key, err := v.Open(secret, header)
	if err != nil {
		return seal.Secret{}, err
	}
	if err := a.Record(attest.RunEvent{Kind: attest.EventDiskKey, Detail: seal.Measurement(key, device)}); err != nil {
		key.Wipe()
		return seal.Secret{}, fmt.Errorf("unlock: the use of the key could not be measured, so it is not given: %w", err)
	}
	return key, nil
}
