package tpm

import (
	"crypto"
	"errors"
	"fmt"
	"io"
	"math/big"
	"os"

	"crypto/x509"
	"encoding/asn1"

	"github.com/google/go-tpm/tpm2"

	"sekisho/attest"
)

// EventLogFile is where Linux shows the firmware's event log
// (Documentation/security/tpm/tpm_event_log.rst of the kernel).
const EventLogFile = "/sys/kernel/security/tpm0/binary_bios_measurements"

// Public returns the credential key's public key. It makes *TPM a
// crypto.Signer with the credential key.
func (t *TPM) Public() crypto.PublicKey {
	key, err := t.key.public.ecdsaKey()
	if err != nil {
		return nil // ParsePublic and the template exclude it
	}
	return key
}

// Sign signs a SHA-256 digest with the credential key and returns an ASN.1
// ECDSA signature.
func (t *TPM) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if opts.HashFunc() != crypto.SHA256 || len(digest) != crypto.SHA256.Size() {
		return nil, fmt.Errorf("tpm: sign: %d byte digest of %v, want SHA-256", len(digest), opts.HashFunc())
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	rsp, err := tpm2.Sign{
		KeyHandle:  tpm2.AuthHandle{Handle: t.key.handle, Name: t.key.name, Auth: tpm2.PasswordAuth(nil)},
		Digest:     tpm2.TPM2BDigest{Buffer: digest},
		InScheme:   tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
		Validation: tpm2.TPMTTKHashCheck{Tag: tpm2.TPMSTHashCheck, Hierarchy: tpm2.TPMRHNull},
	}.Execute(t.conn)
	if err != nil {
		return nil, fmt.Errorf("tpm: sign: %w", err)
	}
	r, s, err := parseSignature(tpm2.Marshal(rsp.Signature))
	if err != nil {
		return nil, fmt.Errorf("tpm: sign: %w", err)
	}
	return asn1.Marshal(struct{ R, S *big.Int }{r, s})
}

// SPKI returns the SubjectPublicKeyInfo of p in DER.
func (p *Public) SPKI() ([]byte, error) {
	key, err := p.Key()
	if err != nil {
		return nil, err
	}
	return x509.MarshalPKIXPublicKey(key)
}

// ReadEventLog reads a firmware event log of at most attest.MaxEventLog bytes.
func ReadEventLog(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("event log: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, attest.MaxEventLog+1))
	if err != nil {
		return nil, fmt.Errorf("event log: %w", err)
	}
	if len(data) > attest.MaxEventLog {
		return nil, fmt.Errorf("event log %s: over %d bytes: %w", path, attest.MaxEventLog, attest.ErrTooLarge)
	}
	if len(data) == 0 {
		return nil, errors.New("event log is empty; the firmware measured nothing")
	}
	return data, nil
}
