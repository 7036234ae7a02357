package tpm

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"
	"reflect"

	"github.com/google/go-tpm/tpm2"

	"sekisho/attest"
)

// Public is a TPM key's public area that decoded strictly: encoding it again
// gives the same bytes. Bytes is what names it.
type Public struct {
	Bytes []byte // TPMT_PUBLIC
	area  tpm2.TPMTPublic

	signing bool // of signingTemplate, as parseOurs has read it
}

// ParsePublic reads a TPMT_PUBLIC (TPM 2.0 Library, Part 2, section 12.2.4).
func ParsePublic(data []byte) (*Public, error) {
	if p := parseOurs(data); p != nil {
		return p, nil
	}
	area, err := parse[tpm2.TPMTPublic](data)
	if err != nil {
		return nil, fmt.Errorf("tpm public area: %w", err)
	}
	if area.NameAlg != tpm2.TPMAlgSHA256 {
		return nil, fmt.Errorf("tpm public area: name algorithm 0x%04x, want SHA-256", uint16(area.NameAlg))
	}
	return &Public{Bytes: bytes.Clone(data), area: *area}, nil
}

// signingHead is the encoding of signingTemplate before the key's point: type,
// name algorithm, attributes, no policy; no symmetric algorithm, ECDSA with
// SHA-256, P-256, no key derivation.
func signingHead(restricted bool) [20]byte {
	head := [20]byte{0x00, 0x23, 0x00, 0x0b, 0x00, 0x04, 0x04, 0x72, 0x00, 0x00, 0x00, 0x10, 0x00, 0x18, 0x00, 0x0b, 0x00, 0x03, 0x00, 0x10}
	if restricted {
		head[5] |= 0x01
	}
	return head
}

// parseOurs reads a public area of our own templates by hand, nil if it is none:
// every attestation passes here, and go-tpm's decoder takes as long as half of
// the verification of a signature.
func parseOurs(data []byte) *Public {
	for _, restricted := range []bool{true, false} {
		head := signingHead(restricted)
		if !bytes.HasPrefix(data, head[:]) {
			continue
		}
		in := reader{data: data[len(head):]}
		x, y := in.sized16(), in.sized16()
		if in.failed || len(in.data) != 0 || len(x) > 32 || len(y) > 32 {
			return nil
		}
		p := &Public{Bytes: bytes.Clone(data), area: signingTemplate(restricted, [32]byte{}), signing: true}
		p.area.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
			X: tpm2.TPM2BECCParameter{Buffer: bytes.Clone(x)}, Y: tpm2.TPM2BECCParameter{Buffer: bytes.Clone(y)},
		})
		return p
	}
	return nil
}

// parse decodes exactly data into a T. go-tpm's decoder is not made for
// hostile input: the size is capped, a panic is an error, and what does not
// encode to the same bytes is refused.
func parse[T tpm2.Marshallable, P interface {
	*T
	tpm2.Unmarshallable
}](data []byte) (v *T, err error) {
	if len(data) > attest.MaxTPMBytes {
		return nil, fmt.Errorf("%d bytes, at most %d: %w", len(data), attest.MaxTPMBytes, attest.ErrTooLarge)
	}
	defer func() {
		if r := recover(); r != nil {
			v, err = nil, fmt.Errorf("malformed: %v", r)
		}
	}()
	if v, err = tpm2.Unmarshal[T, P](data); err != nil {
		return nil, err
	}
	if !bytes.Equal(tpm2.Marshal(*v), data) {
		return nil, errors.New("malformed: not the encoding of what it decodes to")
	}
	return v, nil
}

// Name is the TPM Name of p: the name algorithm and the hash of the public
// area (TPM 2.0 Library, Part 1, section 16).
func (p *Public) Name() []byte { return name(p.Bytes) }

// qualifiedName is the Qualified Name of p as a primary key of hierarchy
// (Part 1, section 16.5).
func (p *Public) qualifiedName(hierarchy tpm2.TPMHandle) []byte {
	return name(append(binary.BigEndian.AppendUint32(nil, uint32(hierarchy)), p.Name()...))
}

func name(data []byte) []byte {
	h := sha256.Sum256(data)
	return append(binary.BigEndian.AppendUint16(nil, uint16(tpm2.TPMAlgSHA256)), h[:]...)
}

// Key returns the public key of p: ECDSA on P-256 or RSA.
func (p *Public) Key() (crypto.PublicKey, error) {
	switch p.area.Type {
	case tpm2.TPMAlgECC:
		return p.ecdsaKey()
	case tpm2.TPMAlgRSA:
		params, err := p.area.Parameters.RSADetail()
		if err != nil {
			return nil, err
		}
		unique, err := p.area.Unique.RSA()
		if err != nil {
			return nil, err
		}
		return tpm2.RSAPub(params, unique)
	}
	return nil, fmt.Errorf("tpm public area: key type 0x%04x, want ECC or RSA", uint16(p.area.Type))
}

func (p *Public) ecdsaKey() (*ecdsa.PublicKey, error) {
	params, err := p.area.Parameters.ECCDetail()
	if err != nil {
		return nil, fmt.Errorf("tpm public area: %w", err)
	}
	if params.CurveID != tpm2.TPMECCNistP256 {
		return nil, fmt.Errorf("tpm public area: curve 0x%04x, want P-256", uint16(params.CurveID))
	}
	point, err := p.area.Unique.ECC()
	if err != nil {
		return nil, fmt.Errorf("tpm public area: %w", err)
	}
	x, y := new(big.Int).SetBytes(point.X.Buffer), new(big.Int).SetBytes(point.Y.Buffer)
	if x.BitLen() > 256 || y.BitLen() > 256 {
		return nil, errors.New("tpm public area: coordinate over 256 bits")
	}
	raw := make([]byte, 65)
	raw[0] = 4 // uncompressed
	x.FillBytes(raw[1:33])
	y.FillBytes(raw[33:])
	// It refuses points that are not on the curve.
	key, err := ecdsa.ParseUncompressedPublicKey(p256(), raw)
	if err != nil {
		return nil, fmt.Errorf("tpm public area: %w", err)
	}
	return key, nil
}

// like reports whether p is template in everything but the key itself.
func (p *Public) like(template tpm2.TPMTPublic) error {
	if p.area.Type != template.Type {
		return fmt.Errorf("key type 0x%04x, want 0x%04x", uint16(p.area.Type), uint16(template.Type))
	}
	if p.area.ObjectAttributes != template.ObjectAttributes {
		return fmt.Errorf("attributes %+v, want %+v", p.area.ObjectAttributes, template.ObjectAttributes)
	}
	same := p.area
	same.Unique = template.Unique
	if p.signing && reflect.DeepEqual(same, template) {
		return nil // as every attestation does; encoding takes as long as a signature
	}
	if !bytes.Equal(same.AuthPolicy.Buffer, template.AuthPolicy.Buffer) {
		return fmt.Errorf("%w: %x, want %x", ErrPolicy, same.AuthPolicy.Buffer, template.AuthPolicy.Buffer)
	}
	if !bytes.Equal(tpm2.Marshal(same), tpm2.Marshal(template)) {
		return errors.New("algorithm or scheme is not the template's")
	}
	return nil
}

// CheckAK reports whether p is an attestation key of our template. A nil error
// proves, for a key that a genuine TPM holds: it is restricted to signing what
// the TPM made, cannot leave the TPM, and was generated in it.
func (p *Public) CheckAK() error {
	if err := p.like(akTemplate()); err != nil {
		return fmt.Errorf("attestation key: %w", err)
	}
	_, err := p.ecdsaKey()
	return err
}

// CheckCredentialKey is CheckAK for the credential key: an ECDSA P-256 signing
// key that was generated in the TPM and cannot leave it.
func (p *Public) CheckCredentialKey() error {
	if err := p.like(credentialTemplate([32]byte{})); err != nil {
		return fmt.Errorf("credential key: %w", err)
	}
	_, err := p.ecdsaKey()
	return err
}

// CheckEK reports whether p is of one of the TCG's endorsement key templates
// (EK Credential Profile, templates L-1 and L-2).
func (p *Public) CheckEK() error {
	template := tpm2.ECCEKTemplate
	if p.area.Type == tpm2.TPMAlgRSA {
		template = tpm2.RSAEKTemplate
	}
	if err := p.like(template); err != nil {
		return fmt.Errorf("endorsement key: %w", err)
	}
	return nil
}

// akTemplate is the attestation key: a P-256 restricted signing primary of the
// endorsement hierarchy. Being fixed, it gives the same key at every boot of
// the same TPM, and nothing needs to be stored.
func akTemplate() tpm2.TPMTPublic {
	return signingTemplate(true, [32]byte{})
}

// credentialTemplate is the credential key: a P-256 signing primary of the
// owner hierarchy. unique makes the key a new one at each start.
func credentialTemplate(unique [32]byte) tpm2.TPMTPublic {
	return signingTemplate(false, unique)
}

func signingTemplate(restricted bool, unique [32]byte) tpm2.TPMTPublic {
	return tpm2.TPMTPublic{
		Type:    tpm2.TPMAlgECC,
		NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM:            true,
			FixedParent:         true,
			SensitiveDataOrigin: true,
			UserWithAuth:        true,
			NoDA:                true,
			Restricted:          restricted,
			SignEncrypt:         true,
		},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
			Scheme: tpm2.TPMTECCScheme{
				Scheme:  tpm2.TPMAlgECDSA,
				Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256}),
			},
			CurveID: tpm2.TPMECCNistP256,
		}),
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
			X: tpm2.TPM2BECCParameter{Buffer: unique[:]},
			Y: tpm2.TPM2BECCParameter{Buffer: make([]byte, 32)},
		}),
	}
}
