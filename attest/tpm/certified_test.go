package tpm_test

import (
	"errors"
	"testing"

	"sekisho/attest"
	"sekisho/attest/tpm"
	"sekisho/attest/tpm/tpmtest"
)

// TestCertified has one case for each line of CheckCertified's list.
func TestCertified(t *testing.T) {
	dev := open(t, tpmtest.Start(t))
	ak := public(t, dev.Identity().AK)
	extra, opens := attest.Digest{1}, attest.Digest{2}
	logon := tpm.LogonKey(opens, [32]byte{3})
	c, err := dev.Certify(logon, extra)
	if err != nil {
		t.Fatal(err)
	}
	key, err := tpm.CheckCertified(ak, logon, extra, c)
	if err != nil {
		t.Fatal(err)
	}
	again, err := dev.Certify(logon, extra)
	if err != nil {
		t.Fatal(err)
	}
	if same, err := tpm.CheckCertified(ak, logon, extra, again); err != nil || !same.Equal(key) {
		t.Errorf("the same template gave another key: %v", err)
	}
	other, err := dev.Certify(tpm.LogonKey(opens, [32]byte{4}), extra)
	if err != nil {
		t.Fatal(err)
	}
	proof, err := dev.Attest(extra)
	if err != nil {
		t.Fatal(err)
	}
	foreign := open(t, tpmtest.Start(t))
	theirs, err := foreign.Certify(logon, extra)
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		name     string
		want     tpm.Template
		extra    attest.Digest
		c        tpm.Certified
		template bool
	}{
		{"another policy", tpm.LogonKey(attest.Digest{9}, [32]byte{3}), extra, c, true},
		{"a key that a password opens", logon, extra, tpm.Certified{Key: dev.Identity().Key, Statement: proof.Certify, Signature: proof.CertifySig}, true},
		{"a logon key as the certificate's", tpm.CredentialKey(), extra, c, true},
		{"no key", logon, extra, tpm.Certified{Statement: c.Statement, Signature: c.Signature}, true},
		{"for another session", logon, attest.Digest{7}, c, false},
		{"certification of another key", logon, extra, tpm.Certified{Key: c.Key, Statement: other.Statement, Signature: other.Signature}, false},
		{"a quote for a certification", logon, extra, tpm.Certified{Key: c.Key, Statement: proof.Quote, Signature: proof.QuoteSig}, false},
		{"another TPM's", logon, extra, theirs, false},
	} {
		if _, err := tpm.CheckCertified(ak, x.want, x.extra, x.c); err == nil || errors.Is(err, tpm.ErrTemplate) != x.template {
			t.Errorf("%s: %v", x.name, err)
		}
	}
	// Nothing leaks: the TPM has few slots.
	for range 8 {
		if _, err := dev.Certify(logon, extra); err != nil {
			t.Fatal(err)
		}
	}
}
