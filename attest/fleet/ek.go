package fleet

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"fmt"
	"time"

	"sekisho/attest"
	"sekisho/attest/tpm"
)

// maxEKCertificate bounds an EK certificate in bytes.
const maxEKCertificate = 4 << 10

// ParseRoots reads the PEM certificates that EK certificates may chain to.
// Each is an anchor by itself, a vendor's intermediate as well as its root.
func ParseRoots(pool *x509.CertPool, data []byte) error {
	n := 0
	for {
		var b *pem.Block
		if b, data = pem.Decode(data); b == nil {
			break
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return fmt.Errorf("EK root: %w", err)
		}
		pool.AddCert(c)
		n++
	}
	if n == 0 {
		return fmt.Errorf("EK root: no PEM certificate in %d bytes", len(data))
	}
	return nil
}

// checkEK judges an endorsement key. A nil error proves: the key is of a TCG
// template, and the certificate is for that key, is not a CA's, and chains to
// roots. An expired certificate is no reason to refuse: vendors' certificates
// expire while their TPMs live on. Errors are *attest.Refusal.
func checkEK(ek *tpm.Public, raw []byte, roots *x509.CertPool, now time.Time) error {
	if err := ek.CheckEK(); err != nil {
		return attest.Refuse(attest.ReasonEKAttributes, "%v", err)
	}
	if len(raw) == 0 {
		return attest.Refuse(attest.ReasonEKMissing, "the TPM has no EK certificate that this verifier can use")
	}
	cert, err := parseEKCertificate(raw)
	if err != nil {
		return attest.Refuse(attest.ReasonEKUntrusted, "EK certificate: %v", err)
	}
	if cert.IsCA {
		return attest.Refuse(attest.ReasonEKUntrusted, "EK certificate of %q is a CA's", cert.Subject)
	}
	key, err := ek.Key()
	if err != nil {
		return attest.Refuse(attest.ReasonEKAttributes, "endorsement key: %v", err)
	}
	if k, ok := key.(interface{ Equal(crypto.PublicKey) bool }); !ok || !k.Equal(cert.PublicKey) {
		return attest.Refuse(attest.ReasonEKMismatch, "EK certificate is for another key")
	}
	// The TPM's model stands in a critical alternative name that crypto/x509
	// does not read (TCG EK Credential Profile 2.5, section 3.2.9).
	cert.UnhandledCriticalExtensions = nil
	at := now
	if at.After(cert.NotAfter) {
		at = cert.NotAfter
	}
	if _, err := cert.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		return attest.Refuse(attest.ReasonEKUntrusted, "EK certificate by %q: %v; add its CA to ek_roots if you trust it", cert.Issuer, err)
	}
	return nil
}

// parseEKCertificate reads a certificate as TPMs keep it: with or without the
// TCG's header (PC Client Implementation Specification for TPM 1.2, section
// 7.3.2), and with padding behind it.
func parseEKCertificate(raw []byte) (*x509.Certificate, error) {
	if len(raw) > maxEKCertificate {
		return nil, fmt.Errorf("%d bytes, at most %d", len(raw), maxEKCertificate)
	}
	const header = 7 // tag 0x1001, type, length, tag 0x1002
	if len(raw) > header && bytes.HasPrefix(raw, []byte{0x10, 0x01}) {
		raw = raw[header:]
	}
	var outer asn1.RawValue
	if _, err := asn1.Unmarshal(raw, &outer); err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(outer.FullBytes)
	if err != nil {
		return nil, err
	}
	if cert.PublicKey == nil {
		return nil, fmt.Errorf("key of algorithm %s cannot be used", cert.PublicKeyAlgorithm)
	}
	return cert, nil
}
