package tpm

import (
	"bytes"
	"crypto"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"

	"sekisho/attest"
)

// Certified is a key with what an attestation key of the same TPM says of it
// (TPM2_Certify; TPM 2.0 Library, Part 3, section 18.2).
type Certified struct {
	Key       []byte // TPMT_PUBLIC
	Storage   []byte // TPM Name of the storage key that it lies under; nil: it is a primary
	Statement []byte // TPMS_ATTEST
	Signature []byte // TPMT_SIGNATURE
}

// Template is what a certified key must be. The zero value is no key.
type Template struct {
	name string
	area tpm2.TPMTPublic
}

// CredentialKey is the template of the certificate's key: a primary.
func CredentialKey() Template {
	return Template{"credential key", credentialTemplate([32]byte{})}
}

// LogonKey is the template of a key of the smart card, as CreateLogonKey makes
// it, under the storage key. policy is the release key's for logon
// (seal.ReleaseKey.Authorized), which alone opens the key; zero stands for a
// key that is bound to its TPM and no boot.
func LogonKey(kind string, agreement bool, policy attest.Digest) (Template, error) {
	area, err := logonTemplate(kind, agreement)
	if err != nil {
		return Template{}, fmt.Errorf("logon key: %w", err)
	}
	if policy == (attest.Digest{}) {
		area.ObjectAttributes.UserWithAuth = true
	} else {
		area.AuthPolicy = tpm2.TPM2BDigest{Buffer: policy[:]}
	}
	return Template{"logon key", area}, nil
}

// Certified is k as one presents it.
func (k CardKey) Certified() Certified {
	return Certified{Key: k.Sealed.Public, Storage: k.Sealed.Storage, Statement: k.Certify, Signature: k.CertifySig}
}

// ErrTemplate is returned by CheckCertified for a key that is certified or
// not, but is not of the template.
var ErrTemplate = errors.New("not of its template")

// ErrPolicy is the case of ErrTemplate in which the key's attributes are right
// and its policy is another.
var ErrPolicy = errors.New("another policy")

// CheckCertified judges a key that a device presents. A nil error proves, for
// an attestation key that a genuine TPM holds:
//
//   - the key is of the template: type, curve, scheme, attributes and policy,
//     so it was made in a TPM, cannot leave it, and opens only as it must;
//   - ak signed the statement, as a primary of its TPM's endorsement hierarchy;
//   - the statement is a certification, made for extra;
//   - it certifies this very key, by name, in the same TPM's owner hierarchy,
//     as a primary or under the storage key of that name.
func CheckCertified(ak *Public, want Template, extra []byte, c Certified) (crypto.PublicKey, error) {
	key, err := ParsePublic(c.Key)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", want.name, ErrTemplate, err)
	}
	if err := key.like(want.area); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", want.name, ErrTemplate, err)
	}
	public, err := key.Key()
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
	// A qualified name is of the path from the hierarchy down (Part 1, section
	// 16.5).
	path := binary.BigEndian.AppendUint32(nil, uint32(tpm2.TPMRHOwner))
	if c.Storage != nil {
		path = name(append(path, c.Storage...))
	}
	if s.Type != TypeCertify || !s.IsSigner(ak) || !bytes.Equal(s.ExtraData, extra) ||
		!bytes.Equal(s.Name, key.Name()) || !bytes.Equal(s.QualifiedName, name(append(path, key.Name()...))) {
		return nil, fmt.Errorf("%s: the certification is of another key, another place or another session", want.name)
	}
	return public, nil
}

// certify certifies a loaded key with the attestation key. Its role is ADMIN,
// for which an empty password does where the template does not ask for policy
// (Part 1, section 19.2). t.mu is held.
func (t *TPM) certify(key loaded, extra []byte) (statement, signature []byte, err error) {
	rsp, err := tpm2.Certify{
		ObjectHandle:   tpm2.AuthHandle{Handle: key.handle, Name: key.name, Auth: tpm2.PasswordAuth(nil)},
		SignHandle:     tpm2.AuthHandle{Handle: t.ak.handle, Name: t.ak.name, Auth: tpm2.PasswordAuth(nil)},
		QualifyingData: tpm2.TPM2BData{Buffer: extra},
		InScheme:       tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
	}.Execute(t.conn)
	if err != nil {
		return nil, nil, fmt.Errorf("certify: %w", err)
	}
	return rsp.CertifyInfo.Bytes(), tpm2.Marshal(rsp.Signature), nil
}
