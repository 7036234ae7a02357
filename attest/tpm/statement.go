package tpm

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"
	"slices"

	"github.com/google/go-tpm/tpm2"

	"sekisho/attest"
)

// Values at the head of every TPMS_ATTEST (TPM 2.0 Library, Part 2, sections
// 6.2 and 6.9).
const (
	Generated   uint32 = 0xff544347 // TPM_GENERATED_VALUE
	TypeQuote   uint16 = 0x8018     // TPM_ST_ATTEST_QUOTE
	TypeCertify uint16 = 0x8017     // TPM_ST_ATTEST_CERTIFY
)

// ErrStatement is returned for bytes that are no TPMS_ATTEST of the wanted kind.
var ErrStatement = errors.New("malformed tpm statement")

func p256() elliptic.Curve { return elliptic.P256() }

// Clock is when a statement was made, in the TPM's terms (Part 2, section
// 10.11.1).
type Clock struct {
	Clock        uint64 `json:"clock"` // milliseconds while powered
	ResetCount   uint32 `json:"reset_count"`
	RestartCount uint32 `json:"restart_count"`
	Safe         bool   `json:"safe"` // Clock never went back
}

// Statement is a decoded TPMS_ATTEST. Nothing in it is true before
// VerifySignature has passed with a key that is known to live in a TPM.
type Statement struct {
	Magic     uint32
	Type      uint16
	Signer    []byte // qualified name of the signing key
	ExtraData []byte
	Clock     Clock
	Firmware  uint64

	Selection []Selection // of a quote
	PCRDigest []byte      // of a quote

	Name          []byte // of a certified object
	QualifiedName []byte // of a certified object
}

// Selection is the set of PCRs that a quote covers in one bank.
type Selection struct {
	Bank uint16 // TPM_ALG_ID
	PCRs []int  // ascending
}

// Head returns magic and type of a TPMS_ATTEST, which ParseStatement needs to
// be right; a verifier names each fault by itself.
func Head(data []byte) (magic uint32, kind uint16, err error) {
	if len(data) < 6 {
		return 0, 0, fmt.Errorf("%w: %d bytes", ErrStatement, len(data))
	}
	return binary.BigEndian.Uint32(data), binary.BigEndian.Uint16(data[4:]), nil
}

// ParseStatement reads a TPMS_ATTEST of TPM2_Quote or TPM2_Certify (Part 2,
// section 10.12.12) and nothing after it.
func ParseStatement(data []byte) (*Statement, error) {
	if len(data) > attest.MaxTPMBytes {
		return nil, fmt.Errorf("%w: %d bytes: %w", ErrStatement, len(data), attest.ErrTooLarge)
	}
	r := reader{data: data}
	s := &Statement{Magic: r.u32(), Type: r.u16(), Signer: r.sized16(), ExtraData: r.sized16()}
	s.Clock = Clock{Clock: r.u64(), ResetCount: r.u32(), RestartCount: r.u32()}
	switch safe := r.u8(); safe {
	case 0, 1:
		s.Clock.Safe = safe == 1
	default:
		return nil, fmt.Errorf("%w: safe is %d", ErrStatement, safe)
	}
	s.Firmware = r.u64()
	switch s.Type {
	case TypeQuote:
		n := r.u32()
		if n > 16 { // TPM_NUM_PCR_BANKS is at most 16 in the PC client profile
			return nil, fmt.Errorf("%w: %d pcr selections", ErrStatement, n)
		}
		for range n {
			s.Selection = append(s.Selection, Selection{r.u16(), bits(r.sized8())})
		}
		s.PCRDigest = r.sized16()
	case TypeCertify:
		s.Name, s.QualifiedName = r.sized16(), r.sized16()
	default:
		return nil, fmt.Errorf("%w: type 0x%04x", ErrStatement, s.Type)
	}
	if r.failed || len(r.data) != 0 {
		return nil, fmt.Errorf("%w: truncated or followed by %d bytes", ErrStatement, len(r.data))
	}
	if s.Magic != Generated {
		return nil, fmt.Errorf("%w: magic 0x%08x", ErrStatement, s.Magic)
	}
	return s, nil
}

// bits lists the set bits of a TPMS_PCR_SELECT.
func bits(mask []byte) []int {
	var set []int
	for i, b := range mask {
		for j := range 8 {
			if b&(1<<j) != 0 {
				set = append(set, 8*i+j)
			}
		}
	}
	return set
}

// ExactlyQuoted reports whether the quote covers attest.QuotedPCRs in the
// SHA-256 bank and nothing else.
func (s *Statement) ExactlyQuoted() bool {
	return len(s.Selection) == 1 &&
		s.Selection[0].Bank == uint16(tpm2.TPMAlgSHA256) &&
		slices.Equal(s.Selection[0].PCRs, attest.QuotedPCRs[:])
}

// PCRDigest is the digest that a quote over attest.QuotedPCRs with these
// values has. Every quoted PCR must be present.
func PCRDigest(pcrs map[int]attest.Digest) (attest.Digest, error) {
	h := sha256.New()
	for _, i := range attest.QuotedPCRs {
		v, ok := pcrs[i]
		if !ok {
			return attest.Digest{}, fmt.Errorf("no value of quoted PCR %d", i)
		}
		h.Write(v[:])
	}
	return attest.Digest(h.Sum(nil)), nil
}

// IsSigner reports whether s names p, as a primary of the endorsement
// hierarchy, as the key that signed it.
func (s *Statement) IsSigner(p *Public) bool {
	return slices.Equal(s.Signer, p.qualifiedName(tpm2.TPMRHEndorsement))
}

// Certifies reports whether s certifies p as a primary of the owner hierarchy.
func (s *Statement) Certifies(p *Public) bool {
	return s.Type == TypeCertify &&
		slices.Equal(s.Name, p.Name()) &&
		slices.Equal(s.QualifiedName, p.qualifiedName(tpm2.TPMRHOwner))
}

// VerifySignature checks sig, a TPMT_SIGNATURE, over data with key: ECDSA with
// SHA-256 on P-256 and nothing else.
func VerifySignature(key *Public, data, sig []byte) error {
	pub, err := key.ecdsaKey()
	if err != nil {
		return err
	}
	r, s, err := parseSignature(sig)
	if err != nil {
		return err
	}
	digest := sha256.Sum256(data)
	if !ecdsa.Verify(pub, digest[:], r, s) {
		return errors.New("tpm signature: not by this key over these bytes")
	}
	return nil
}

// parseSignature reads a TPMT_SIGNATURE of ECDSA (Part 2, sections 11.3.4 and
// 11.3.2) by hand: every attestation passes here, and go-tpm's decoder takes as
// long as a third of the verification.
func parseSignature(sig []byte) (r, s *big.Int, err error) {
	in := reader{data: sig}
	scheme, hash, first, second := in.u16(), in.u16(), in.sized16(), in.sized16()
	switch {
	case in.failed || len(in.data) != 0:
		return nil, nil, fmt.Errorf("tpm signature: %d bytes are truncated or too many", len(sig))
	case scheme != uint16(tpm2.TPMAlgECDSA):
		return nil, nil, fmt.Errorf("tpm signature: scheme 0x%04x, want ECDSA", scheme)
	case hash != uint16(tpm2.TPMAlgSHA256):
		return nil, nil, fmt.Errorf("tpm signature: hash 0x%04x, want SHA-256", hash)
	case len(first) > 32 || len(second) > 32:
		return nil, nil, fmt.Errorf("tpm signature: numbers of %d and %d bytes, at most 32", len(first), len(second))
	}
	return new(big.Int).SetBytes(first), new(big.Int).SetBytes(second), nil
}

// MakeCredential wraps secret so that only the TPM with endorsement key ek can
// unwrap it, and only while it holds the key called akName (Part 1, section
// 24; TPM2_MakeCredential done in software).
func MakeCredential(ek *Public, akName, secret []byte) (blob, encSecret []byte, err error) {
	key, err := tpm2.ImportEncapsulationKey(&ek.area)
	if err != nil {
		return nil, nil, fmt.Errorf("make credential: %w", err)
	}
	blob, encSecret, err = tpm2.CreateCredential(rand.Reader, key, akName, secret)
	if err != nil {
		return nil, nil, fmt.Errorf("make credential: %w", err)
	}
	return blob, encSecret, nil
}

// reader reads big-endian fields; after a short read it gives zeros.
type reader struct {
	data   []byte
	failed bool
}

func (r *reader) take(n int) []byte {
	if n > len(r.data) {
		r.failed, r.data = true, nil
		return make([]byte, min(n, 8))
	}
	b := r.data[:n:n]
	r.data = r.data[n:]
	return b
}

func (r *reader) u8() uint8       { return r.take(1)[0] }
func (r *reader) u16() uint16     { return binary.BigEndian.Uint16(r.take(2)) }
func (r *reader) u32() uint32     { return binary.BigEndian.Uint32(r.take(4)) }
func (r *reader) u64() uint64     { return binary.BigEndian.Uint64(r.take(8)) }
func (r *reader) sized8() []byte  { return r.take(int(r.u8())) }
func (r *reader) sized16() []byte { return r.take(int(r.u16())) }
