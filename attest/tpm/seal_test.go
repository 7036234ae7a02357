package tpm_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"testing"

	"sekisho/attest"
	"sekisho/attest/seal"
	"sekisho/attest/tpm"
	"sekisho/attest/tpm/tpmtest"
)

// image is what a boot of one release extends.
type image struct{ secureBoot, uki attest.Digest }

var (
	secureBootOn = attest.Digest{7}
	first        = image{secureBootOn, attest.Digest{1}}
	second       = image{secureBootOn, attest.Digest{2}}
)

// laptop is a TPM and what boots on it.
type laptop struct {
	t      *testing.T
	tpm    *tpmtest.Emulator
	dev    *tpm.TPM
	signer *ecdsa.PrivateKey
	key    seal.ReleaseKey
}

func newLaptop(t *testing.T) *laptop {
	t.Helper()
	signer, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	key, err := seal.NewReleaseKey(signer.Public())
	if err != nil {
		t.Fatal(err)
	}
	l := &laptop{t: t, tpm: tpmtest.Start(t), signer: signer, key: key}
	l.boot(first)
	t.Cleanup(func() { l.dev.Close() })
	return l
}

// boot is a power cut and a boot of i.
func (l *laptop) boot(i image) {
	l.t.Helper()
	if l.dev != nil {
		l.dev.Close() // the power was cut: nothing needs to be flushed
		l.tpm.Restart()
	}
	dev, err := tpm.Open(l.tpm.Socket)
	if err != nil {
		l.t.Fatal(err)
	}
	l.dev = dev
	for pcr, d := range map[int]attest.Digest{7: i.secureBoot, 11: i.uki} {
		if err := dev.Extend(pcr, d); err != nil {
			l.t.Fatal(err)
		}
	}
}

// release signs image i, as the release side does.
func (l *laptop) release(i image, epoch uint64) *seal.Release {
	l.t.Helper()
	refs := &attest.ReferenceValues{Image: "sekisho", Version: "x", PCRs: map[int]attest.Digest{
		7: extended(i.secureBoot), 11: extended(i.uki),
	}}
	r, err := seal.SignPolicy(l.signer, refs, epoch)
	if err != nil {
		l.t.Fatal(err)
	}
	data, err := r.Encode()
	if err != nil {
		l.t.Fatal(err)
	}
	if r, err = seal.ParseRelease(data, l.key); err != nil {
		l.t.Fatal(err)
	}
	return r
}

// extended is a PCR that was extended once.
func extended(d attest.Digest) attest.Digest {
	return sum(append(make([]byte, 32), d[:]...))
}

var header = attest.Digest{0xbe}

// provision makes the counter and a volume.
func (l *laptop) provision(r *seal.Release) (*seal.Volume, seal.Secret) {
	l.t.Helper()
	if err := errors.Join(l.dev.CreateRollbackCounter(r, l.key), l.dev.RaiseRollback(r, l.key)); err != nil {
		l.t.Fatal(err)
	}
	pinned, err := l.dev.StorageName()
	if err != nil {
		l.t.Fatal(err)
	}
	v, key, _, err := seal.NewVolume(seal.PurposeDisk, header, func(s seal.Secret) (seal.Sealed, error) {
		return l.dev.Seal(l.key, seal.PurposeDisk, pinned, s)
	})
	if err != nil {
		l.t.Fatal(err)
	}
	data, err := v.Encode()
	if err != nil {
		l.t.Fatal(err)
	}
	if v, err = seal.ParseVolume(data); err != nil {
		l.t.Fatal(err)
	}
	return v, key
}

func (l *laptop) open(v *seal.Volume, r *seal.Release) (seal.Secret, error) {
	secret, err := l.dev.Unseal(v.Sealed, r, l.key, v.Purpose)
	if err != nil {
		return seal.Secret{}, err
	}
	return v.Open(secret, header)
}

func (l *laptop) mustOpen(v *seal.Volume, r *seal.Release, want seal.Secret) {
	l.t.Helper()
	got, err := l.open(v, r)
	if err != nil {
		l.t.Fatal(err)
	}
	if !bytes.Equal(got.Reveal(), want.Reveal()) {
		l.t.Fatal("another key came out")
	}
}

func (l *laptop) counter() uint64 {
	l.t.Helper()
	n, err := l.dev.Counter()
	if err != nil {
		l.t.Fatal(err)
	}
	return n
}

func pcrOf(err error) int {
	var m *seal.Mismatch
	if errors.As(err, &m) {
		return m.PCR
	}
	return 0
}

// TestUpdate: a signed update unseals without re-sealing; once the counter is
// raised, the older image does not, for all its valid signature.
func TestUpdate(t *testing.T) {
	l := newLaptop(t)
	old, next := l.release(first, seal.FirstEpoch), l.release(second, seal.FirstEpoch+1)
	v, key := l.provision(old)
	l.mustOpen(v, old, key)

	l.boot(second)
	l.mustOpen(v, next, key)
	l.boot(first) // the update is not committed: back again
	l.mustOpen(v, old, key)

	l.boot(second)
	if err := l.dev.RaiseRollback(next, l.key); err != nil {
		t.Fatal(err)
	}
	l.mustOpen(v, next, key)
	l.boot(first)
	if _, err := l.open(v, old); !errors.Is(err, seal.ErrRolledBack) {
		t.Errorf("the older image: %v, want ErrRolledBack", err)
	}
	// The older release cannot claim the newer epoch: that is signed too.
	old.Epoch = next.Epoch
	if _, err := l.open(v, old); err == nil {
		t.Error("the older image with a newer epoch was opened")
	}
	if err := l.dev.RaiseRollback(old, l.key); err != nil && !errors.Is(err, seal.ErrRolledBack) {
		t.Log(err)
	}
}

// TestUnsealRefuses: each deviation keeps the key shut and is named.
func TestUnsealRefuses(t *testing.T) {
	l := newLaptop(t)
	r := l.release(first, seal.FirstEpoch)
	v, key := l.provision(r)
	for name, c := range map[string]struct {
		boot image
		pcr  int
	}{
		"Secure Boot off":         {image{attest.Digest{0xff}, first.uki}, 7},
		"wrong command line":      {image{secureBootOn, attest.Digest{0xcc}}, 11},
		"unsigned newer image":    {second, 11},
		"PCR 15 already extended": {first, 15},
	} {
		l.boot(c.boot)
		if c.pcr == 15 {
			if err := l.dev.Extend(15, attest.Digest{1}); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := l.open(v, r); pcrOf(err) != c.pcr {
			t.Errorf("%s: %v, want PCR %d named", name, err, c.pcr)
		}
	}
	l.boot(first)
	l.mustOpen(v, r, key)

	// Once used, shut: PCR 15 is extended with what tells nothing of the key.
	if err := l.dev.Extend(15, seal.Measurement(key, attest.Digest{1})); err != nil {
		t.Fatal(err)
	}
	if _, err := l.open(v, r); pcrOf(err) != 15 {
		t.Errorf("a second time in one boot: %v", err)
	}

	l.boot(first)
	// A signature for the disk opens no logon key.
	if _, err := l.dev.Unseal(v.Sealed, r, l.key, seal.PurposeLogin); err == nil {
		t.Error("opened for another purpose")
	}
	// A swapped header gets no key.
	secret, err := l.dev.Unseal(v.Sealed, r, l.key, v.Purpose)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.Open(secret, attest.Digest{0xef}); !errors.Is(err, seal.ErrHeader) {
		t.Errorf("swapped header: %v", err)
	}
	// Another release key's policies open nothing.
	other := newLaptopKey(t, l)
	if _, err := l.dev.Unseal(v.Sealed, other.release(first, seal.FirstEpoch), other.key, v.Purpose); err == nil {
		t.Error("opened for another release key")
	}
	// Another storage key is noticed before anything is asked of it.
	s := v.Sealed
	s.Storage = bytes.Clone(s.Storage)
	s.Storage[5] ^= 1
	if _, err := l.dev.Unseal(s, r, l.key, v.Purpose); !errors.Is(err, tpm.ErrStorageKey) {
		t.Errorf("another storage key: %v", err)
	}
	if _, err := l.dev.Seal(l.key, v.Purpose, s.Storage, seal.NewSecret(make([]byte, 32))); !errors.Is(err, tpm.ErrStorageKey) {
		t.Errorf("seal to another storage key: %v", err)
	}
	l.mustOpen(v, r, key) // and no slot of the TPM is left in use
}

// newLaptopKey is l with another release key.
func newLaptopKey(t *testing.T, l *laptop) *laptop {
	t.Helper()
	signer, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	key, err := seal.NewReleaseKey(signer.Public())
	if err != nil {
		t.Fatal(err)
	}
	return &laptop{t: t, tpm: l.tpm, dev: l.dev, signer: signer, key: key}
}

// TestCounterNeverGoesBack: not by password, not by a release of a lower
// epoch, not by whoever may undefine it.
func TestCounterNeverGoesBack(t *testing.T) {
	l := newLaptop(t)
	old, next := l.release(first, seal.FirstEpoch), l.release(second, seal.FirstEpoch+2)
	v, key := l.provision(old)
	if n := l.counter(); n != seal.FirstEpoch {
		t.Fatalf("counter %d, want %d", n, seal.FirstEpoch)
	}
	if l.dev.IncrementPlain() == nil {
		t.Error("the counter was incremented without the release key's approval")
	}
	if err := l.dev.RaiseRollback(next, l.key); err != nil {
		t.Fatal(err)
	}
	if err := l.dev.RaiseRollback(next, l.key); err != nil || l.counter() != seal.FirstEpoch+2 {
		t.Errorf("raising twice: %v, counter %d", err, l.counter())
	}
	if err := l.dev.RaiseRollback(old, l.key); !errors.Is(err, seal.ErrRolledBack) {
		t.Errorf("raising to a lower epoch: %v", err)
	}
	if err := l.dev.UndefineCounter(); err != nil {
		t.Fatal(err)
	}
	if _, err := l.open(v, old); err == nil {
		t.Error("opened without a counter")
	}
	if err := l.dev.CreateRollbackCounter(old, l.key); !errors.Is(err, seal.ErrRolledBack) {
		t.Errorf("made again for the old release: %v", err)
	}
	if n := l.counter(); n < seal.FirstEpoch+2 {
		t.Errorf("the counter went back to %d", n)
	}
	if _, err := l.open(v, old); !errors.Is(err, seal.ErrRolledBack) {
		t.Errorf("opened after the counter was made again: %v", err)
	}
	_ = key
}

// TestPowerCuts cuts the power at every command of provisioning and of the
// raise, boots again, and finds that the running slot opens its disk and that
// the work can be finished.
func TestPowerCuts(t *testing.T) {
	l := newLaptop(t)
	old := l.release(first, seal.FirstEpoch)

	// Making the counter: begun again at every boot until it is there.
	for step, done := 0, false; !done; step += 7 {
		l.dev.CutAfter(step)
		err := l.dev.CreateRollbackCounter(old, l.key)
		if done = err == nil; !done && !errors.Is(err, tpm.ErrCut) {
			t.Fatalf("cut after %d commands: %v", step, err)
		}
		l.boot(first)
	}
	v, key := l.provision(old)

	epoch := uint64(seal.FirstEpoch)
	for step := range 40 {
		// The update is in the other slot, boots, and is marked good. Between
		// that and the raised counter, the power goes.
		epoch += 3
		next := l.release(second, epoch)
		slot := seal.Slot{Epoch: epoch}
		l.boot(second)
		l.mustOpen(v, next, key)
		if _, raise := seal.RaiseTo(slot, l.counter()); raise {
			t.Fatal("raised before the slot is good")
		}
		slot.Good = true
		l.dev.CutAfter(step)
		err := l.dev.RaiseRollback(next, l.key)
		l.boot(second)
		l.mustOpen(v, next, key)
		to, raise := seal.RaiseTo(slot, l.counter())
		if err == nil {
			if raise {
				t.Errorf("after a whole raise the counter is %d, want %d", l.counter(), epoch)
			}
			if step < 5 {
				t.Errorf("a raise of %d commands", step)
			}
			return
		}
		if !errors.Is(err, tpm.ErrCut) {
			t.Fatal(err)
		}
		// A cut after the last count, while keys are unloaded, leaves nothing to do.
		if n := l.counter(); n != epoch && (!raise || to != epoch) {
			t.Errorf("cut after %d commands: the raise is not begun again (counter %d)", step, l.counter())
		}
		if err := l.dev.RaiseRollback(next, l.key); err != nil {
			t.Fatal(err)
		}
		l.mustOpen(v, next, key)
	}
}

func sum(b []byte) attest.Digest { return sha256.Sum256(b) }

// BenchmarkUnseal is the time to a disk key on swtpm, header check included.
func BenchmarkUnseal(b *testing.B) {
	signer, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	key, err := seal.NewReleaseKey(signer.Public())
	if err != nil {
		b.Fatal(err)
	}
	dev, err := tpm.Open(tpmtest.Start(b).Socket)
	if err != nil {
		b.Fatal(err)
	}
	defer dev.Close()
	r, err := seal.SignPolicy(signer, &attest.ReferenceValues{PCRs: map[int]attest.Digest{7: {}, 11: {}}}, seal.FirstEpoch)
	if err != nil {
		b.Fatal(err)
	}
	if err := dev.CreateRollbackCounter(r, key); err != nil {
		b.Fatal(err)
	}
	v, _, _, err := seal.NewVolume(seal.PurposeDisk, header, func(s seal.Secret) (seal.Sealed, error) {
		return dev.Seal(key, seal.PurposeDisk, nil, s)
	})
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		secret, err := dev.Unseal(v.Sealed, r, key, v.Purpose)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := v.Open(secret, header); err != nil {
			b.Fatal(err)
		}
	}
}
