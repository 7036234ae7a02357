package tpm_test

import (
	"bytes"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"slices"
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/attest/seal"
	"sekisho/attest/tpm"
	"sekisho/attest/tpm/tpmtest"
)

// TestLogonKeys: keys of the card sign, decrypt and agree, bound to the release
// or to the TPM alone, and the attestation key vouches for them.
func TestLogonKeys(t *testing.T) {
	l := newLaptop(t)
	r := l.release(first, seal.FirstEpoch)
	if err := l.dev.CreateRollbackCounter(r, l.key); err != nil {
		t.Fatal(err)
	}
	// A logon key is used after the disk's.
	if err := l.dev.Extend(15, attest.Digest{1}); err != nil {
		t.Fatal(err)
	}
	ak := public(t, l.dev.Identity().AK)
	for name, b := range map[string]tpm.Boot{"release": {Release: r, Key: l.key}, "TPM alone": {}} {
		for _, c := range []struct {
			kind  string
			agree bool
		}{{attest.LogonP256, false}, {attest.LogonRSA2048, false}, {attest.LogonP256, true}} {
			k, err := l.dev.CreateLogonKey(b, c.kind, c.agree)
			if err != nil {
				t.Fatalf("%s: %s: %v", name, c.kind, err)
			}
			use := func(op attest.LogonOperation, input []byte) ([]byte, error) {
				return l.dev.UseLogonKey(b, k.Sealed, op, input)
			}
			spki, err := x509.ParsePKIXPublicKey(k.SPKI)
			if err != nil {
				t.Fatal(err)
			}
			checkOperation(t, spki, c.agree, use)
			st, err := tpm.ParseStatement(k.Certify)
			if err != nil {
				t.Fatal(err)
			}
			if err := tpm.VerifySignature(ak, k.Certify, k.CertifySig); err != nil || !st.IsSigner(ak) {
				t.Errorf("%s: %s: certify: %v", name, c.kind, err)
			}
		}
	}
}

// checkOperation does what the key is for and checks the result in software.
func checkOperation(t *testing.T, spki any, agree bool, use func(attest.LogonOperation, []byte) ([]byte, error)) {
	t.Helper()
	digest := sha256.Sum256([]byte("sekisho"))
	switch key := spki.(type) {
	case *rsa.PublicKey:
		// What EncryptPKCS1v15 would take is padded here by hand: the card
		// gets whole blocks.
		block := append([]byte{0, 1}, bytes.Repeat([]byte{0xff}, 256-3-51)...)
		block = append(append(block, 0, 0x30, 0x31, 0x30, 0x0d, 6, 9, 0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, 1, 5, 0, 4, 0x20), digest[:]...)
		sig, err := use(attest.LogonRSA, block)
		if err != nil {
			t.Fatal(err)
		}
		if err := rsa.VerifyPKCS1v15(key, crypto.SHA256, digest[:], sig); err != nil {
			t.Error(err)
		}
	case *ecdsa.PublicKey:
		if !agree {
			for _, n := range []int{32, 20} {
				sig, err := use(attest.LogonSign, digest[:n])
				if err != nil {
					t.Fatal(err)
				}
				if !ecdsa.VerifyASN1(key, digest[:n], sig) {
					t.Errorf("the signature over %d bytes does not verify", n)
				}
			}
			return
		}
		peer, err := ecdh.P256().GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		ours, err := key.ECDH()
		if err != nil {
			t.Fatal(err)
		}
		want, err := peer.ECDH(ours)
		if err != nil {
			t.Fatal(err)
		}
		got, err := use(attest.LogonECDH, peer.PublicKey().Bytes())
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("agreement: %v", err)
		}
		if _, err := use(attest.LogonECDH, []byte{4}); err == nil {
			t.Error("agreed with no point")
		}
	}
}

// TestLogonKeyRefuses: another image and another release key get nothing out
// of a logon key, and what is sealed beside it stays sealed.
func TestLogonKeyRefuses(t *testing.T) {
	l := newLaptop(t)
	r := l.release(first, seal.FirstEpoch)
	if err := l.dev.CreateRollbackCounter(r, l.key); err != nil {
		t.Fatal(err)
	}
	b := tpm.Boot{Release: r, Key: l.key}
	k, err := l.dev.CreateLogonKey(b, attest.LogonP256, false)
	if err != nil {
		t.Fatal(err)
	}
	secret := seal.NewSecret([]byte("templates"))
	s, err := l.dev.SealState(b, secret)
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256(nil)
	use := func(b tpm.Boot) error {
		_, err := l.dev.UseLogonKey(b, k.Sealed, attest.LogonSign, digest[:])
		_, uerr := l.dev.UnsealState(b, s)
		if (err == nil) != (uerr == nil) {
			t.Errorf("the key says %v, the sealed secret %v", err, uerr)
		}
		return err
	}
	if err := use(b); err != nil {
		t.Fatal(err)
	}
	if err := use(tpm.Boot{}); err == nil {
		t.Error("used without the release's approval")
	}
	other := newLaptopKey(t, l)
	if err := use(tpm.Boot{Release: other.release(first, seal.FirstEpoch), Key: other.key}); err == nil {
		t.Error("used by another release key's approval")
	}
	l.boot(second)
	if err := use(b); pcrOf(err) != 11 {
		t.Errorf("another image: %v, want PCR 11 named", err)
	}
	next := tpm.Boot{Release: l.release(second, seal.FirstEpoch+1), Key: l.key}
	if err := use(next); err != nil {
		t.Errorf("the signed update: %v", err)
	}
	if err := l.dev.RaiseRollback(next.Release, l.key); err != nil {
		t.Fatal(err)
	}
	l.boot(first)
	if err := use(b); !errors.Is(err, seal.ErrRolledBack) {
		t.Errorf("the older image after the counter was raised: %v", err)
	}
	l.boot(image{attest.Digest{0xff}, second.uki})
	if err := use(next); pcrOf(err) != 7 {
		t.Errorf("secure boot off: %v, want PCR 7 named", err)
	}
}

// BenchmarkRatioLogon is how many signatures the card's key makes, storage key
// and load included, for each bare TPM2_Sign: medians of five rounds of each.
func BenchmarkRatioLogon(b *testing.B) {
	dev, err := tpm.Open(tpmtest.Start(b).Socket)
	if err != nil {
		b.Fatal(err)
	}
	defer dev.Close()
	digest := sha256.Sum256(nil)
	for _, kind := range []string{attest.LogonP256, attest.LogonRSA2048} {
		k, err := dev.CreateLogonKey(tpm.Boot{}, kind, false)
		if err != nil {
			b.Fatal(err)
		}
		op, input := attest.LogonSign, digest[:]
		if kind == attest.LogonRSA2048 {
			op, input = attest.LogonRSA, append(make([]byte, 224), digest[:]...)
		}
		b.Run(kind, func(b *testing.B) {
			card := func() error { _, err := dev.UseLogonKey(tpm.Boot{}, k.Sealed, op, input); return err }
			bare := func() error { _, err := dev.Sign(nil, digest[:], crypto.SHA256); return err }
			for b.Loop() {
				var took [2][]time.Duration
				for range 5 {
					for i, f := range []func() error{card, bare} {
						begin := time.Now()
						for range 8 {
							if err := f(); err != nil {
								b.Fatal(err)
							}
						}
						took[i] = append(took[i], time.Since(begin)/8)
					}
				}
				for i := range took {
					slices.Sort(took[i])
				}
				b.ReportMetric(float64(took[0][2].Microseconds()), "µs/card")
				b.ReportMetric(float64(took[1][2].Microseconds()), "µs/sign")
				b.ReportMetric(float64(took[1][2])/float64(took[0][2]), "ratio")
			}
		})
	}
}
