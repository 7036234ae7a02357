package attester

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"sync"

	"sekisho/attest/seal"
	"sekisho/attest/tpm"
)

// StateSealer keeps the key under which a daemon's state is encrypted; *tpm.TPM
// has it.
type StateSealer interface {
	SealState(b tpm.Boot, secret seal.Secret) (seal.Sealed, error)
	UnsealState(b tpm.Boot, s seal.Sealed) (seal.Secret, error)
}

// VaultStorage keeps bytes over boots; VaultFile has it.
type VaultStorage interface {
	Load() ([]byte, error) // ErrNoRecord when there are none
	Store([]byte) error
}

// Vault keeps a daemon's bytes over boots, encrypted with AES-256-GCM under a
// key that the TPM opens for Boot alone.
type Vault struct {
	Boot  tpm.Boot
	State VaultStorage

	mu     sync.Mutex
	key    seal.Secret // of the state, once it was unsealed
	sealed *seal.Sealed
}

// keptState is a daemon's state on the disk.
type keptState struct {
	Sealed seal.Sealed `json:"sealed"` // of the key
	Data   []byte      `json:"data"`   // nonce and AES-256-GCM of the state
}

// errDamaged: the state was opened by its key and is not what was written.
var errDamaged = errors.New("the state is damaged")

// aad binds the bytes to what they are for.
func (v *Vault) aad() []byte {
	if v.Boot.Purpose == "" {
		return []byte(seal.PurposeLogin)
	}
	return []byte(v.Boot.Purpose)
}

// load returns the state; ErrNoRecord when there is none. The first call of a
// start has the TPM open it, if this boot is one that may.
func (v *Vault) load(sealer func() (StateSealer, error)) ([]byte, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.open(sealer)
}

// open is load. v.mu is held.
func (v *Vault) open(sealer func() (StateSealer, error)) ([]byte, error) {
	raw, err := v.State.Load()
	if err != nil {
		return nil, err
	}
	var kept keptState
	if err := json.Unmarshal(raw, &kept); err != nil {
		return nil, fmt.Errorf("%w: %w", errDamaged, err)
	}
	if v.sealed == nil {
		s, err := sealer()
		if err != nil {
			return nil, err
		}
		if v.key, err = s.UnsealState(v.Boot, kept.Sealed); err != nil {
			return nil, err
		}
		v.sealed = &kept.Sealed
	}
	aead, err := v.cipher()
	if err != nil {
		return nil, err
	}
	n := aead.NonceSize()
	if len(kept.Data) < n {
		return nil, fmt.Errorf("%w: no nonce", errDamaged)
	}
	state, err := aead.Open(nil, kept.Data[:n], kept.Data[n:], v.aad())
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errDamaged, err)
	}
	return state, nil
}

// save keeps state in place of what is there, opened or not.
func (v *Vault) save(sealer func() (StateSealer, error), state []byte) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.put(sealer, state)
}

// put is save. v.mu is held.
func (v *Vault) put(sealer func() (StateSealer, error), state []byte) error {
	if v.sealed == nil {
		s, err := sealer()
		if err != nil {
			return err
		}
		key := make([]byte, 32)
		rand.Read(key)
		secret := seal.NewSecret(key)
		sealed, err := s.SealState(v.Boot, secret)
		if err != nil {
			return err
		}
		v.key, v.sealed = secret, &sealed
	}
	aead, err := v.cipher()
	if err != nil {
		return err
	}
	nonce := make([]byte, aead.NonceSize())
	rand.Read(nonce)
	raw, err := json.Marshal(keptState{*v.sealed, aead.Seal(nonce, nonce, state, v.aad())})
	if err != nil {
		return err
	}
	return v.State.Store(raw)
}

// cipher is AES-256-GCM with the state's key. v.mu is held.
func (v *Vault) cipher() (cipher.AEAD, error) {
	block, err := aes.NewCipher(v.key.Reveal())
	if err != nil {
		return nil, fmt.Errorf("state: %w", err)
	}
	return cipher.NewGCM(block)
}
