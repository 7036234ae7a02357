package login

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"

	"sekisho/attest"
	"sekisho/attest/gate"
)

// Request makes a certificate request, signed by the card's key.
func (e *Engine) Request(ctx context.Context) (gate.CardRequest, error) {
	st := e.store.get()
	public, err := st.public()
	if err != nil {
		return gate.CardRequest{}, errors.New("the card is not set up yet")
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: st.User, Organization: []string{e.Agency}},
	}, signer{ctx, e.Attestd, st.Key, public})
	if err != nil {
		return gate.CardRequest{}, fmt.Errorf("certificate request: %w", err)
	}
	return gate.CardRequest{
		CSR: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}),
		Key: st.Key.Area, Storage: st.Key.Storage,
		AK: st.Key.AK, Certify: st.Key.Certify, CertifySig: st.Key.CertifySig, Bound: st.Key.Bound,
	}, nil
}

// signer is the card's key for its own certificate request.
type signer struct {
	ctx     context.Context
	attestd Attestd
	key     *gate.LogonKey
	public  crypto.PublicKey
}

func (s signer) Public() crypto.PublicKey { return s.public }

// Sign signs a SHA-256 digest: ECDSA, or RSA after PKCS #1 v1.5 padding (RFC
// 8017, section 9.2), which the TPM leaves to its caller here.
func (s signer) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if opts.HashFunc() != crypto.SHA256 || len(digest) != 32 {
		return nil, fmt.Errorf("sign: %d byte digest of %v, want SHA-256", len(digest), opts.HashFunc())
	}
	use := gate.UseLogonKey{Key: s.key.Key, Operation: attest.LogonSign, Input: digest}
	switch k := s.public.(type) {
	case *ecdsa.PublicKey:
	case *rsa.PublicKey:
		use.Operation, use.Input = attest.LogonRSA, padSHA256(digest, k.Size())
	default:
		return nil, fmt.Errorf("sign: key of type %T", s.public)
	}
	return s.attestd.UseLogonKey(s.ctx, use)
}

// padSHA256 is EMSA-PKCS1-v1_5 of a SHA-256 digest.
func padSHA256(digest []byte, size int) []byte {
	info := []byte{0x30, 0x31, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00, 0x04, 0x20}
	block := make([]byte, size)
	end := size - len(info) - len(digest)
	block[1] = 1
	for i := 2; i < end-1; i++ {
		block[i] = 0xff
	}
	copy(block[end:], info)
	copy(block[end+len(info):], digest)
	return block
}
