package uki

import (
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"

	"sekisho/attest"
)

// WIN_CERTIFICATE (UEFI specification 2.10, section 32.2.4).
const (
	winCertHeader   = 8
	winCertRevision = 0x0200
	winCertPKCS7    = 0x0002
)

// Sign returns image with an Authenticode signature (SHA-256, RSA) appended. An
// image that is signed already is refused. Equal input gives an equal file.
func Sign(image []byte, key Key) ([]byte, error) {
	// Certificates begin at a multiple of 8; the padding is part of what is
	// signed.
	out := make([]byte, align(len(image), 8), align(len(image), 8)+8192)
	copy(out, image)
	p, err := ParsePE(out)
	if err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	if p.Signed() {
		return nil, errors.New("sign: image is signed already")
	}
	sig, err := signDigest(p.Authenticode(), key.Private, key.Cert)
	if err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	entry := make([]byte, align(winCertHeader+len(sig), 8))
	le := binary.LittleEndian
	le.PutUint32(entry, uint32(winCertHeader+len(sig)))
	le.PutUint16(entry[4:], winCertRevision)
	le.PutUint16(entry[6:], winCertPKCS7)
	copy(entry[winCertHeader:], sig)
	le.PutUint32(out[p.opt+optCertificateDir:], uint32(len(out)))
	le.PutUint32(out[p.opt+optCertificateDir+4:], uint32(len(entry)))
	return append(out, entry...), nil
}

// The SignedData of RFC 2315 (PKCS #7 1.5), section 9, with the content that
// "Windows Authenticode Portable Executable Signature Format" defines. Written
// here because go-uefi's encoder ends the process when a signer fails, and
// brings a file system abstraction with it.
type (
	attribute struct {
		Type   asn1.ObjectIdentifier
		Values []asn1.RawValue `asn1:"set"`
	}
	signerInfo struct {
		Version  int
		IssuerID struct {
			Issuer asn1.RawValue
			Serial *big.Int
		}
		DigestAlgorithm pkix.AlgorithmIdentifier
		Attributes      asn1.RawValue // [0] IMPLICIT SET OF Attribute
		Algorithm       pkix.AlgorithmIdentifier
		Signature       []byte
	}
	contentInfo struct {
		Type    asn1.ObjectIdentifier
		Content asn1.RawValue `asn1:"explicit,tag:0"`
	}
	signedData struct {
		Version          int
		DigestAlgorithms []pkix.AlgorithmIdentifier `asn1:"set"`
		Content          contentInfo
		Certificates     asn1.RawValue // [0] IMPLICIT SET OF Certificate
		Signers          []signerInfo  `asn1:"set"`
	}
	digestInfo struct {
		Algorithm pkix.AlgorithmIdentifier
		Digest    []byte
	}
	indirectData struct {
		Data struct {
			Type  asn1.ObjectIdentifier
			Value struct {
				Flags asn1.BitString
				File  asn1.RawValue // [0] EXPLICIT SpcLink
			}
		}
		Digest digestInfo
	}
)

// signDigest returns the DER of a PKCS #7 signature over an Authenticode image
// digest.
func signDigest(digest attest.Digest, key *rsa.PrivateKey, cert *x509.Certificate) ([]byte, error) {
	oid := func(arc ...int) asn1.ObjectIdentifier { return arc }
	var (
		oidSignedData = oid(1, 2, 840, 113549, 1, 7, 2)
		oidIndirect   = oid(1, 3, 6, 1, 4, 1, 311, 2, 1, 4)
		oidPEImage    = oid(1, 3, 6, 1, 4, 1, 311, 2, 1, 15)
		oidType       = oid(1, 2, 840, 113549, 1, 9, 3)
		oidDigest     = oid(1, 2, 840, 113549, 1, 9, 4)
		sha256ID      = pkix.AlgorithmIdentifier{Algorithm: oid(2, 16, 840, 1, 101, 3, 4, 2, 1), Parameters: asn1.NullRawValue}
		rsaID         = pkix.AlgorithmIdentifier{Algorithm: oid(1, 2, 840, 113549, 1, 1, 1), Parameters: asn1.NullRawValue}
		der           encoder
	)

	var content indirectData
	content.Data.Type = oidPEImage
	// SpcLink is file [2] EXPLICIT SpcString, unicode [0], here empty: nothing
	// reads it, but the field must be there.
	content.Data.Value.File = tagged(0, der.encode(tagged(2, []byte{0x80, 0})))
	content.Digest = digestInfo{sha256ID, digest[:]}
	contentDER := der.encode(content)

	// The signature covers the SET of attributes; the attributes name the type
	// and the digest of the content, without its tag and length.
	var inner asn1.RawValue
	if _, err := asn1.Unmarshal(contentDER, &inner); err != nil {
		return nil, errors.Join(der.err, err)
	}
	sum := sha256.Sum256(inner.Bytes)
	attributes := []attribute{
		{oidType, []asn1.RawValue{{FullBytes: der.encode(oidIndirect)}}},
		{oidDigest, []asn1.RawValue{{FullBytes: der.encode(sum[:])}}},
	}
	set, err := asn1.MarshalWithParams(attributes, "set")
	if err != nil {
		return nil, err
	}
	hashed := sha256.Sum256(set)
	sig, err := rsa.SignPKCS1v15(nil, key, crypto.SHA256, hashed[:])
	if err != nil {
		return nil, err
	}

	si := signerInfo{Version: 1, DigestAlgorithm: sha256ID, Algorithm: rsaID, Signature: sig}
	si.IssuerID.Issuer.FullBytes, si.IssuerID.Serial = cert.RawIssuer, cert.SerialNumber
	// The same bytes under the implicit tag [0].
	si.Attributes.FullBytes = append([]byte{0xa0}, set[1:]...)
	out := der.encode(contentInfo{oidSignedData, tagged(0, der.encode(signedData{
		Version:          1,
		DigestAlgorithms: []pkix.AlgorithmIdentifier{sha256ID},
		Content:          contentInfo{oidIndirect, tagged(0, contentDER)},
		Certificates:     tagged(0, cert.Raw),
		Signers:          []signerInfo{si},
	}))})
	return out, der.err
}

// tagged is inner under a constructed context tag.
func tagged(tag int, inner []byte) asn1.RawValue {
	return asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: tag, IsCompound: true, Bytes: inner}
}

// encoder marshals to DER and keeps the first error.
type encoder struct{ err error }

func (e *encoder) encode(v any) []byte {
	b, err := asn1.Marshal(v)
	if e.err == nil && err != nil {
		e.err = err
	}
	return b
}
