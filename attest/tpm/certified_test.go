package tpm_test

import (
	"errors"
	"testing"

	"sekisho/attest"
	"sekisho/attest/seal"
	"sekisho/attest/tpm"
)

// TestCertified has one case for each line of CheckCertified's list.
func TestCertified(t *testing.T) {
	l := newLaptop(t)
	dev, ak := l.dev, public(t, l.dev.Identity().AK)
	boot := tpm.Boot{Release: l.release(first, seal.FirstEpoch), Key: l.key}
	policy, err := l.key.Authorized(seal.PurposeLogin)
	if err != nil {
		t.Fatal(err)
	}
	template := func(kind string, agreement bool, policy attest.Digest) tpm.Template {
		t.Helper()
		w, err := tpm.LogonKey(kind, agreement, policy)
		if err != nil {
			t.Fatal(err)
		}
		return w
	}
	create := func(on *tpm.TPM, b tpm.Boot, kind string, agreement bool) tpm.Certified {
		t.Helper()
		k, err := on.CreateLogonKey(b, kind, agreement)
		if err != nil {
			t.Fatal(err)
		}
		return k.Certified()
	}
	logon := template(attest.LogonP256, false, policy)
	c := create(dev, boot, attest.LogonP256, false)
	for name, good := range map[string]struct {
		want tpm.Template
		c    tpm.Certified
	}{
		"P-256":        {logon, c},
		"agreement":    {template(attest.LogonP256, true, policy), create(dev, boot, attest.LogonP256, true)},
		"RSA":          {template(attest.LogonRSA2048, false, policy), create(dev, boot, attest.LogonRSA2048, false)},
		"bound to TPM": {template(attest.LogonP256, false, attest.Digest{}), create(dev, tpm.Boot{}, attest.LogonP256, false)},
	} {
		if key, err := tpm.CheckCertified(ak, good.want, nil, good.c); err != nil || key == nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	extra := attest.Digest{1}
	proof, err := dev.Attest(extra)
	if err != nil {
		t.Fatal(err)
	}
	credential := tpm.Certified{Key: dev.Identity().Key, Statement: proof.Certify, Signature: proof.CertifySig}
	if _, err := tpm.CheckCertified(ak, tpm.CredentialKey(), extra[:], credential); err != nil {
		t.Error(err)
	}
	other, bare, elsewhere := create(dev, boot, attest.LogonP256, false), create(dev, tpm.Boot{}, attest.LogonP256, false), newLaptop(t)
	primary, moved := c, c
	primary.Storage = nil
	moved.Storage = append([]byte(nil), c.Storage...)
	moved.Storage[5] ^= 1
	for _, x := range []struct {
		name     string
		want     tpm.Template
		extra    []byte
		c        tpm.Certified
		template bool
	}{
		{"another policy", template(attest.LogonP256, false, attest.Digest{9}), nil, c, true},
		{"a key that a password opens", logon, nil, bare, true},
		{"another kind", template(attest.LogonRSA2048, false, policy), nil, c, true},
		{"a logon key as the certificate's", tpm.CredentialKey(), nil, c, true},
		{"no key", logon, nil, tpm.Certified{Statement: c.Statement, Signature: c.Signature}, true},
		{"for another session", logon, extra[:], c, false},
		{"not a primary", logon, nil, primary, false},
		{"under another key", logon, nil, moved, false},
		{"certification of another key", logon, nil, tpm.Certified{Key: c.Key, Storage: c.Storage, Statement: other.Statement, Signature: other.Signature}, false},
		{"a quote for a certification", tpm.CredentialKey(), extra[:], tpm.Certified{Key: credential.Key, Statement: proof.Quote, Signature: proof.QuoteSig}, false},
		{"another TPM's", logon, nil, create(elsewhere.dev, boot, attest.LogonP256, false), false},
	} {
		if _, err := tpm.CheckCertified(ak, x.want, x.extra, x.c); err == nil || errors.Is(err, tpm.ErrTemplate) != x.template {
			t.Errorf("%s: %v", x.name, err)
		}
	}
}
