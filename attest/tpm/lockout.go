package tpm

import (
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
)

// OwnLockout gives the lock-out hierarchy an authorisation. Whoever has it may
// clear the TPM, and with it every key here, and forgive wrong guesses (Part 3,
// sections 24.6 and 25.2); the empty one of a new TPM is everybody's who can
// send it a command. It does nothing, and reports false, where the hierarchy
// has an authorisation already.
func (t *TPM) OwnLockout(auth []byte) (set bool, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	fail := func(err error) (bool, error) { return false, fmt.Errorf("tpm: lock-out authorisation: %w", err) }
	owned, err := t.lockoutOwned()
	if err != nil || owned {
		return false, err
	}
	parent, err := t.storage(nil)
	if err != nil {
		return fail(err)
	}
	defer func() { err = errors.Join(err, t.flush(parent.handle)) }()
	// A session of its own encrypts: the answer's authorisation is by the new
	// value already (section 24.8), which go-tpm does not expect.
	if _, err := (tpm2.HierarchyChangeAuth{
		AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHLockout, Auth: tpm2.PasswordAuth(nil)},
		NewAuth:    tpm2.TPM2BAuth{Buffer: auth},
	}).Execute(t.conn, tpm2.HMAC(tpm2.TPMAlgSHA256, 16, salted(parent), tpm2.AESEncryption(128, tpm2.EncryptIn))); err != nil {
		return fail(err)
	}
	return true, nil
}

// lockoutOwned reports lockoutAuthSet of TPMA_PERMANENT (Part 2, section 8.6).
func (t *TPM) lockoutOwned() (bool, error) {
	const lockoutAuthSet = 1 << 2
	rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapTPMProperties, Property: uint32(tpm2.TPMPTPermanent), PropertyCount: 1}.Execute(t.conn)
	if err != nil {
		return false, fmt.Errorf("tpm: properties: %w", err)
	}
	list, err := rsp.CapabilityData.Data.TPMProperties()
	if err != nil || len(list.TPMProperty) != 1 || list.TPMProperty[0].Property != tpm2.TPMPTPermanent {
		return false, errors.Join(errors.New("tpm: no TPM_PT_PERMANENT"), err)
	}
	return list.TPMProperty[0].Value&lockoutAuthSet != 0, nil
}
