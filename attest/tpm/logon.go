package tpm

import (
	"cmp"
	"crypto"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"

	"github.com/google/go-tpm/tpm2"

	"sekisho/attest"
	"sekisho/attest/seal"
)

// Boot is what a logon key, or the key of another daemon's state, is bound to:
// the release key's policy for a purpose, which any boot opens that the release
// signed. The zero Boot binds to this TPM alone; it is for images that carry no
// signed policies.
type Boot struct {
	Release *seal.Release
	Key     seal.ReleaseKey
	Purpose string // empty is seal.PurposeLogin
}

func (b Boot) purpose() string { return cmp.Or(b.Purpose, seal.PurposeLogin) }

// CardKey is a new logon key: what to keep of it, and the proof by the
// attestation key that it is in this TPM.
type CardKey struct {
	Sealed              seal.Sealed
	SPKI                []byte // SubjectPublicKeyInfo
	Certify, CertifySig []byte // TPM2_Certify by the attestation key, without extra data
}

// CreateLogonKey makes a key of the smart card in the TPM, from which it
// cannot be taken. kind is attest.LogonRSA2048 or attest.LogonP256; agreement
// asks for a key that agrees on secrets, and not for one that signs.
func (t *TPM) CreateLogonKey(b Boot, kind string, agreement bool) (out CardKey, err error) {
	fail := func(err error) (CardKey, error) { return CardKey{}, fmt.Errorf("tpm: logon key: %w", err) }
	template, err := logonTemplate(kind, agreement)
	if err != nil {
		return fail(err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if out.Sealed, err = t.createChild(b, template, nil); err != nil {
		return fail(err)
	}
	public, err := parse[tpm2.TPMTPublic](out.Sealed.Public)
	if err != nil {
		return fail(err)
	}
	key, err := logonPublic(*public)
	if err != nil {
		return fail(err)
	}
	if out.SPKI, err = x509.MarshalPKIXPublicKey(key); err != nil {
		return fail(err)
	}
	if out.Certify, out.CertifySig, err = t.certifyChild(out.Sealed); err != nil {
		return fail(err)
	}
	return out, nil
}

// UseLogonKey does one operation with a logon key: LogonSign of a digest,
// LogonRSA of a padded block, LogonECDH with an uncompressed point.
func (t *TPM) UseLogonKey(b Boot, key seal.Sealed, op attest.LogonOperation, input []byte) (out []byte, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	// A signature is no secret, and its answer begins with nothing that a
	// session can encrypt.
	var answer []tpm2.AuthOption
	if op != attest.LogonSign {
		answer = append(answer, encrypted())
	}
	err = t.withChild(b, key, answer, func(handle tpm2.AuthHandle) (err error) {
		switch op {
		case attest.LogonSign:
			out, err = t.logonSign(handle, input)
		case attest.LogonRSA:
			out, err = t.logonRSA(handle, input)
		case attest.LogonECDH:
			out, err = t.logonECDH(handle, input)
		default:
			err = fmt.Errorf("operation %d", op)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("tpm: logon key: %w", err)
	}
	return out, nil
}

// logonSign signs a digest of at most 32 bytes, which counts as a number
// (FIPS 186-5, section 6.4.1): a shorter one is filled up at its front.
func (t *TPM) logonSign(handle tpm2.AuthHandle, digest []byte) ([]byte, error) {
	if len(digest) == 0 || len(digest) > 32 {
		return nil, fmt.Errorf("digest of %d bytes, want 1 to 32", len(digest))
	}
	rsp, err := tpm2.Sign{
		KeyHandle:  handle,
		Digest:     tpm2.TPM2BDigest{Buffer: append(make([]byte, 32-len(digest)), digest...)},
		InScheme:   tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
		Validation: tpm2.TPMTTKHashCheck{Tag: tpm2.TPMSTHashCheck, Hierarchy: tpm2.TPMRHNull},
	}.Execute(t.conn)
	if err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	r, s, err := parseSignature(tpm2.Marshal(rsp.Signature))
	if err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	return asn1.Marshal(struct{ R, S *big.Int }{r, s})
}

// logonRSA is the private operation alone: the caller has padded (Part 3,
// section 14.3, with the scheme TPM_ALG_NULL).
func (t *TPM) logonRSA(handle tpm2.AuthHandle, block []byte) ([]byte, error) {
	if len(block) != 256 {
		return nil, fmt.Errorf("block of %d bytes, want 256", len(block))
	}
	rsp, err := tpm2.RSADecrypt{
		KeyHandle:  handle,
		CipherText: tpm2.TPM2BPublicKeyRSA{Buffer: block},
		InScheme:   tpm2.TPMTRSADecrypt{Scheme: tpm2.TPMAlgNull},
	}.Execute(t.conn)
	if err != nil {
		return nil, fmt.Errorf("rsa: %w", err)
	}
	m := rsp.Message.Buffer
	if len(m) > 256 {
		return nil, fmt.Errorf("rsa: %d bytes of answer", len(m))
	}
	return append(make([]byte, 256-len(m)), m...), nil
}

func (t *TPM) logonECDH(handle tpm2.AuthHandle, point []byte) ([]byte, error) {
	if len(point) != 65 || point[0] != 4 {
		return nil, fmt.Errorf("point of %d bytes, want 65, uncompressed", len(point))
	}
	rsp, err := tpm2.ECDHZGen{
		KeyHandle: handle,
		InPoint: tpm2.New2B(tpm2.TPMSECCPoint{
			X: tpm2.TPM2BECCParameter{Buffer: point[1:33]}, Y: tpm2.TPM2BECCParameter{Buffer: point[33:]},
		}),
	}.Execute(t.conn)
	if err != nil {
		return nil, fmt.Errorf("key agreement: %w", err)
	}
	z, err := rsp.OutPoint.Contents()
	if err != nil || len(z.X.Buffer) > 32 {
		return nil, errors.New("key agreement: malformed answer")
	}
	return append(make([]byte, 32-len(z.X.Buffer)), z.X.Buffer...), nil
}

// SealState seals the key of a daemon's state under b, UnsealState opens it.
func (t *TPM) SealState(b Boot, secret seal.Secret) (seal.Sealed, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	template := tpm2.TPMTPublic{
		Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, NoDA: true},
	}
	s, err := t.createChild(b, template, secret.Reveal())
	if err != nil {
		return seal.Sealed{}, fmt.Errorf("tpm: seal: %w", err)
	}
	return s, nil
}

// UnsealState returns what SealState sealed, if this boot is one of b's.
func (t *TPM) UnsealState(b Boot, s seal.Sealed) (secret seal.Secret, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	err = t.withChild(b, s, []tpm2.AuthOption{encrypted()}, func(handle tpm2.AuthHandle) error {
		rsp, err := tpm2.Unseal{ItemHandle: handle}.Execute(t.conn)
		if err == nil {
			secret = seal.NewSecret(rsp.OutData.Buffer)
		}
		return err
	})
	if err != nil {
		return seal.Secret{}, fmt.Errorf("tpm: unseal: %w", err)
	}
	return secret, nil
}

// logonTemplate is a key of the card. An RSA key takes blocks that the reader
// has padded, which is what TPM 2.0 calls decryption.
func logonTemplate(kind string, agreement bool) (tpm2.TPMTPublic, error) {
	p := tpm2.TPMTPublic{
		NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, NoDA: true,
			SignEncrypt: kind == attest.LogonP256 && !agreement,
			Decrypt:     kind == attest.LogonRSA2048 || agreement,
		},
	}
	switch kind {
	case attest.LogonRSA2048:
		p.Type = tpm2.TPMAlgRSA
		p.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{KeyBits: 2048})
		p.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{})
	case attest.LogonP256:
		scheme := tpm2.TPMTECCScheme{
			Scheme:  tpm2.TPMAlgECDSA,
			Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256}),
		}
		if agreement {
			scheme = tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgNull}
		}
		p.Type = tpm2.TPMAlgECC
		p.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{Scheme: scheme, CurveID: tpm2.TPMECCNistP256})
		p.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{})
	default:
		return p, fmt.Errorf("kind %q: want %q or %q", kind, attest.LogonRSA2048, attest.LogonP256)
	}
	return p, nil
}

// logonPublic is the public key of a public area that our TPM has just made.
func logonPublic(area tpm2.TPMTPublic) (crypto.PublicKey, error) {
	return tpm2.Pub(area)
}

// createChild makes an object under the storage key, bound to b. t.mu is held.
func (t *TPM) createChild(b Boot, template tpm2.TPMTPublic, data []byte) (out seal.Sealed, err error) {
	if b.Release == nil {
		template.ObjectAttributes.UserWithAuth = true
	} else {
		policy, err := b.Key.Authorized(b.purpose())
		if err != nil {
			return out, err
		}
		template.AuthPolicy = tpm2.TPM2BDigest{Buffer: policy[:]}
	}
	restore, err := t.makeRoom()
	if err != nil {
		return out, err
	}
	defer func() { err = errors.Join(err, restore()) }()
	parent, err := t.storage(nil)
	if err != nil {
		return out, err
	}
	defer func() { err = errors.Join(err, t.flush(parent.handle)) }()
	create := tpm2.Create{
		ParentHandle: t.underStorage(parent),
		InPublic:     tpm2.New2B(template),
	}
	if data != nil {
		create.InSensitive = tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
			Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: data}),
		}}
	}
	rsp, err := create.Execute(t.conn)
	if err != nil {
		return out, err
	}
	return seal.Sealed{Storage: parent.public.Name(), Public: rsp.OutPublic.Bytes(), Private: rsp.OutPrivate.Buffer}, nil
}

// loadChild loads an object under the storage key, and says how to unload
// both. t.mu is held, and the attestation key put aside.
func (t *TPM) loadChild(s seal.Sealed) (object, parent loaded, err error) {
	if parent, err = t.storage(s.Storage); err != nil {
		return object, parent, err
	}
	if object, err = t.load(parent, s); err != nil {
		return object, parent, errors.Join(err, t.flush(parent.handle))
	}
	return object, parent, nil
}

// certifyChild has the attestation key certify an object. Certifying is of the
// administrator's role, which such an object gives to everybody (Part 1,
// section 19.2): it shows the key and does not use it. t.mu is held.
func (t *TPM) certifyChild(s seal.Sealed) (statement, signature []byte, err error) {
	restore, err := t.makeRoom()
	if err != nil {
		return nil, nil, err
	}
	object, parent, err := t.loadChild(s)
	if err != nil {
		return nil, nil, errors.Join(err, restore())
	}
	// In a TPM with three places the storage key makes room for the
	// attestation key.
	if err := errors.Join(t.flush(parent.handle), restore()); err != nil {
		return nil, nil, errors.Join(err, t.flush(object.handle))
	}
	defer func() { err = errors.Join(err, t.flush(object.handle)) }()
	return t.certify(object, nil)
}

// withChild loads an object that createChild made, calls use with it and the
// authorisation that b gives, with the session's options, and unloads it: no logon key stays in the TPM.
// t.mu is held.
func (t *TPM) withChild(b Boot, s seal.Sealed, options []tpm2.AuthOption, use func(tpm2.AuthHandle) error) (err error) {
	var approved seal.Approved
	var ticket *tpm2.TPMTTKVerified
	if b.Release != nil {
		if approved, err = b.Release.Boot(b.Key, b.purpose()); err != nil {
			return err
		}
		if ticket, err = t.ticket(b.Key, approved); err != nil {
			return err
		}
	}
	restore, err := t.makeRoom()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, restore()) }()
	object, parent, err := t.loadChild(s)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, t.flush(object.handle), t.flush(parent.handle)) }()
	handle := tpm2.AuthHandle{Handle: object.handle, Name: object.name}
	options = append(options, salted(parent))
	if b.Release == nil {
		handle.Auth = tpm2.HMAC(tpm2.TPMAlgSHA256, 16, options...)
		return use(handle)
	}
	err = t.withPolicy(b.Key, approved, ticket, t.bootSteps(b.Release, b.purpose()), func(auth tpm2.Session) error {
		handle.Auth = auth
		return use(handle)
	}, options...)
	if err != nil {
		return errors.Join(t.explain(b.Release, b.purpose()), err)
	}
	return nil
}
