package tpm_test

import (
	"testing"

	"sekisho/attest"
	"sekisho/attest/seal"
)

// TestOwnLockout: the authorisation is set once, and nobody clears the TPM
// with the empty one after it.
func TestOwnLockout(t *testing.T) {
	l := newLaptop(t)
	for _, want := range []bool{true, false} {
		if set, err := l.dev.OwnLockout([]byte("of the organisation")); err != nil || set != want {
			t.Fatalf("set: %v, %v; want %v", set, err, want)
		}
	}
	if err := l.dev.ClearTPM(); err == nil {
		t.Error("the TPM was cleared with the empty authorisation")
	}
	v, key := l.provision(l.release(first, seal.FirstEpoch))
	l.boot(first)
	l.mustOpen(v, l.release(first, seal.FirstEpoch), key)
	if _, err := l.dev.Attest(attest.Digest{1}); err != nil {
		t.Error(err)
	}
}
