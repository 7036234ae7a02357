package tpm

import (
	"bytes"
	"crypto/ecdsa"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"

	"sekisho/attest"
)

// Certified is a key with what an attestation key of the same TPM says of it
// (TPM2_Certify; TPM 2.0 Library, Part 3, section 18.2).
type Certified struct {
	Key       []byte // TPMT_PUBLIC
	Statement []byte // TPMS_ATTEST
	Signature []byte // TPMT_SIGNATURE
}

// Template is what a certified key must be. The zero value is no key.
type Template struct {
	name string
	area tpm2.TPMTPublic
}

// CredentialKey is the template of the certificate's key.
func CredentialKey() Template {
	return Template{"credential key", credentialTemplate([32]byte{})}
}

// LogonKey is the template of a logon key (slot 9A of the smart card): an
// ECDSA P-256 primary of the owner hierarchy that no password opens, only
// policy, such as seal.ReleaseKey.Authorized("logon") gives. unique makes one
// key of many; the same value gives the same key again.
func LogonKey(policy attest.Digest, unique [32]byte) Template {
	area := signingTemplate(false, unique)
	area.ObjectAttributes.UserWithAuth = false
	area.AuthPolicy = tpm2.TPM2BDigest{Buffer: policy[:]}
	return Template{"logon key", area}
}

// ErrTemplate is returned by CheckCertified for a key that is certified or
// not, but is not of the template.
var ErrTemplate = errors.New("not of its template")

// CheckCertified judges a key that a device presents. A nil error proves, for
// an attestation key that a genuine TPM holds:
//
//   - the key is of the template: type, curve, scheme, attributes and policy,
//     so it was made in a TPM, cannot leave it, and opens only as it must;
//   - ak signed the statement, as a primary of its TPM's endorsement hierarchy;
//   - the statement is a certification, made for extra;
//   - it certifies this very key, by name, as a primary of the same TPM's
//     owner hierarchy.
func CheckCertified(ak *Public, want Template, extra attest.Digest, c Certified) (*ecdsa.PublicKey, error) {
	key, err := ParsePublic(c.Key)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", want.name, ErrTemplate, err)
	}
	if err := key.like(want.area); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", want.name, ErrTemplate, err)
	}
	public, err := key.ecdsaKey()
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", want.name, ErrTemplate, err)
	}
	if err := VerifySignature(ak, c.Statement, c.Signature); err != nil {
		return nil, fmt.Errorf("%s: not certified by this attestation key: %w", want.name, err)
	}
	s, err := ParseStatement(c.Statement)
	if err != nil {
		return nil, fmt.Errorf("%s: certification: %w", want.name, err)
	}
	if !s.IsSigner(ak) || !s.Certifies(key) || !bytes.Equal(s.ExtraData, extra[:]) {
		return nil, fmt.Errorf("%s: the certification is of another key or for another session", want.name)
	}
	return public, nil
}

// Certify makes the key of a template and certifies it for extra. The key does
// not stay loaded.
func (t *TPM) Certify(template Template, extra attest.Digest) (c Certified, err error) {
	fail := func(err error) (Certified, error) {
		return Certified{}, fmt.Errorf("tpm: certify %s: %w", template.name, err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	key, err := t.primary(tpm2.TPMRHOwner, template.area)
	if err != nil {
		return fail(err)
	}
	defer func() { err = errors.Join(err, t.flush(key.handle)) }()
	if c, err = t.certify(key, extra); err != nil {
		return fail(err)
	}
	return c, nil
}

// certify certifies a loaded key with the attestation key. Its role is ADMIN,
// for which an empty password does where the template does not ask for policy
// (Part 1, section 19.2). t.mu is held.
func (t *TPM) certify(key loaded, extra attest.Digest) (Certified, error) {
	rsp, err := tpm2.Certify{
		ObjectHandle:   tpm2.AuthHandle{Handle: key.handle, Name: key.name, Auth: tpm2.PasswordAuth(nil)},
		SignHandle:     tpm2.AuthHandle{Handle: t.ak.handle, Name: t.ak.name, Auth: tpm2.PasswordAuth(nil)},
		QualifyingData: tpm2.TPM2BData{Buffer: extra[:]},
		InScheme:       tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
	}.Execute(t.conn)
	if err != nil {
		return Certified{}, err
	}
	return Certified{key.public.Bytes, rsp.CertifyInfo.Bytes(), tpm2.Marshal(rsp.Signature)}, nil
}
