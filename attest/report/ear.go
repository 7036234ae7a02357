// Package report makes attestation results and the reports behind them into
// files that anyone can check without a network, years later: an EAR
// (draft-ietf-rats-ear-04) in a CWT (RFC 8392), signed with ES256, and beside
// it all that the verdict depended on. It decides and does no I/O.
package report

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/veraison/go-cose"

	"sekisho/attest"
	"sekisho/attest/policy"
	"sekisho/attest/verifier"
)

// Names in the claims.
const (
	EARProfile = "tag:ietf.org,2026:rats/ear#04"
	submodule  = "sekisho"
	developer  = "sekisho"
	build      = "appraisal/3" // changes with the order or meaning of the checks
	earType    = "application/eat+cwt"
)

// maxToken bounds a token in bytes.
const maxToken = 1 << 20

// Claims are the claims of one result. The keys are those of RFC 8392, RFC
// 8747, RFC 9711 and draft-ietf-rats-ear-04; those below -65536 are private.
type Claims struct {
	Issuer       string               `cbor:"1,keyasint" json:"iss"`
	Audience     string               `cbor:"3,keyasint" json:"aud"` // organisation
	Expires      int64                `cbor:"4,keyasint,omitempty" json:"exp,omitempty"`
	IssuedAt     int64                `cbor:"6,keyasint" json:"iat"`
	Confirmation *Confirmation        `cbor:"8,keyasint,omitempty" json:"cnf,omitempty"` // key that the result entitles
	Nonce        []byte               `cbor:"10,keyasint,omitempty" json:"eat_nonce,omitempty"`
	UEID         []byte               `cbor:"256,keyasint" json:"ueid"`
	Profile      string               `cbor:"265,keyasint" json:"eat_profile"`
	Submods      map[string]Appraisal `cbor:"266,keyasint" json:"submods"`
	Verifier     VerifierID           `cbor:"1004,keyasint" json:"ear_verifier_id"`
}

// Confirmation names a key by SHA-256 of its SubjectPublicKeyInfo (RFC 8747,
// section 3.4).
type Confirmation struct {
	KeyID []byte `cbor:"3,keyasint" json:"kid"`
}

// VerifierID is the software that appraised.
type VerifierID struct {
	Developer string `cbor:"0,keyasint" json:"developer"`
	Build     string `cbor:"1,keyasint" json:"build"`
}

// Appraisal is the appraisal of the one attester of a device.
type Appraisal struct {
	Status   attest.Status     `cbor:"1000,keyasint" json:"ear_status"`
	Vector   map[int]int       `cbor:"1001,keyasint" json:"ear_trustworthiness_vector"`
	Policies []string          `cbor:"1003,keyasint,omitempty" json:"ear_appraisal_policy_ids,omitempty"`
	Reason   attest.Reason     `cbor:"-70000,keyasint" json:"sekisho_reason"`
	Detail   string            `cbor:"-70001,keyasint,omitempty" json:"sekisho_detail,omitempty"`
	Findings []attest.Finding  `cbor:"-70002,keyasint,omitempty" json:"sekisho_findings,omitempty"`
	Image    string            `cbor:"-70003,keyasint,omitempty" json:"sekisho_image,omitempty"`
	Shadow   *attest.Shadow    `cbor:"-70004,keyasint,omitempty" json:"sekisho_shadow,omitempty"`
	Changes  []attest.Change   `cbor:"-70005,keyasint,omitempty" json:"sekisho_changes,omitempty"`
	LastGood *attest.Digest    `cbor:"-70006,keyasint,omitempty" json:"sekisho_last_good,omitempty"`
	Firmware *attest.Firmware  `cbor:"-70007,keyasint,omitempty" json:"sekisho_firmware,omitempty"`
	Events   []attest.RunEvent `cbor:"-70009,keyasint,omitempty" json:"sekisho_events,omitempty"` // of the run time, in order
	Report   string            `cbor:"-70008,keyasint,omitempty" json:"sekisho_report,omitempty"`
}

// ueidRandom is the type of a UEID whose bits nobody chose (RFC 9711, section
// 4.2.1.1): ours is a digest of the endorsement key's name.
const ueidRandom = 0x01

// NewClaims makes the claims of a result. key is the digest of the key that an
// affirming result entitles and lifetime how long; both count only for that.
func NewClaims(r attest.Result, organization string, key *attest.Digest, lifetime time.Duration) Claims {
	c := Claims{
		Issuer: r.Verifier, Audience: organization, IssuedAt: r.IssuedAt,
		UEID: append([]byte{ueidRandom}, r.Device[:]...), Profile: EARProfile,
		Verifier: VerifierID{developer, build},
	}
	// An eat_nonce has 8 to 64 bytes (RFC 9711, section 4.1).
	if n := len(r.Nonce); n >= 8 && n <= 64 {
		c.Nonce = r.Nonce
	}
	if r.Status == attest.StatusAffirming && key != nil {
		c.Expires = r.IssuedAt + int64(lifetime/time.Second)
		c.Confirmation = &Confirmation{key[:]}
	}
	a := Appraisal{
		Status: r.Status, Vector: vector(r), Reason: r.Reason, Detail: r.Detail, Findings: r.Findings, Image: r.Image,
		Shadow: r.Shadow, Changes: r.Changes, LastGood: r.LastGood, Firmware: r.Firmware, Report: r.Report, Events: r.Events,
	}
	if r.Policy != nil {
		a.Policies = []string{policyURN + r.Policy.String()}
	}
	c.Submods = map[string]Appraisal{submodule: a}
	return c
}

// Entries of the trustworthiness vector and values of
// draft-ietf-rats-ar4si, section 2.3.4.
const (
	vectorIdentity      = 0
	vectorConfiguration = 1
	vectorExecutables   = 2
	vectorHardware      = 4

	approvedBoot = 3  // executables: approved ones only, during boot
	unrecognised = 97 // identity
)

// vector says what the checks that passed have shown, and where they ended. A
// check that was not reached makes no claim.
func vector(r attest.Result) map[int]int {
	good, bad := int(attest.StatusAffirming), int(attest.StatusContraindicated)
	switch why := r.Reason; {
	case r.Status == attest.StatusAffirming:
		return map[int]int{vectorIdentity: good, vectorConfiguration: good, vectorExecutables: approvedBoot, vectorHardware: good}
	case why <= attest.ReasonSignatureInvalid:
		return map[int]int{vectorIdentity: unrecognised}
	case why <= attest.ReasonPCRDigest:
		return map[int]int{vectorIdentity: bad}
	case why == attest.ReasonClockReversed, why == attest.ReasonClockUnsafe:
		return map[int]int{vectorIdentity: good, vectorHardware: int(r.Status)}
	case why <= attest.ReasonKeyAttributes:
		return map[int]int{vectorIdentity: good, vectorHardware: bad}
	case why == attest.ReasonSecureBoot, why == attest.ReasonPolicyRule, why == attest.ReasonNoPolicy:
		return map[int]int{vectorIdentity: good, vectorHardware: good, vectorConfiguration: int(r.Status)}
	}
	return map[int]int{vectorIdentity: good, vectorHardware: good, vectorExecutables: bad}
}

// Encode returns c in deterministic CBOR.
func (c Claims) Encode() ([]byte, error) { return encode(c) }

func encode(v any) ([]byte, error) {
	enc, err := cbor.CoreDetEncOptions().EncMode()
	if err != nil {
		return nil, fmt.Errorf("report: %w", err)
	}
	data, err := enc.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("report: %w", err)
	}
	return data, nil
}

// decodeAs is the inverse of encode and refuses every other encoding.
func decodeAs[T any](data []byte) (v T, err error) {
	dec, err := cbor.DecOptions{
		DupMapKey: cbor.DupMapKeyEnforcedAPF, IndefLength: cbor.IndefLengthForbidden, TagsMd: cbor.TagsForbidden,
		ExtraReturnErrors: cbor.ExtraDecErrorUnknownField, MaxNestedLevels: 12, MaxArrayElements: 8192, MaxMapPairs: 512,
	}.DecMode()
	if err != nil {
		return v, fmt.Errorf("report: %w", err)
	}
	if err := dec.Unmarshal(data, &v); err != nil {
		return v, fmt.Errorf("report: %w", err)
	}
	again, err := encode(v)
	if err != nil {
		return v, err
	}
	if !bytes.Equal(again, data) {
		return v, errors.New("report: encoding is not deterministic CBOR (RFC 8949, section 4.2.1)")
	}
	return v, nil
}

// Device returns the device that the claims are about.
func (c Claims) Device() (attest.Digest, error) {
	if len(c.UEID) != 1+len(attest.Digest{}) || c.UEID[0] != ueidRandom {
		return attest.Digest{}, fmt.Errorf("ueid of %d bytes, want type %d and %d bytes", len(c.UEID), ueidRandom, len(attest.Digest{}))
	}
	return attest.Digest(c.UEID[1:]), nil
}

// Appraisal returns the appraisal of the device's one attester.
func (c Claims) Appraisal() (Appraisal, error) {
	a, ok := c.Submods[submodule]
	if !ok || len(c.Submods) != 1 {
		return Appraisal{}, fmt.Errorf("%d submodules, want %q alone", len(c.Submods), submodule)
	}
	return a, nil
}

// sign makes a COSE_Sign1 with ES256, the key's id in the protected header.
func sign(payload []byte, kind, external string, key crypto.Signer) ([]byte, error) {
	public, ok := key.Public().(*ecdsa.PublicKey)
	if !ok || public.Curve != elliptic.P256() {
		return nil, fmt.Errorf("sign: key of type %T, want ECDSA on P-256", key.Public())
	}
	id, err := policy.KeyID(public)
	if err != nil {
		return nil, err
	}
	signer, err := cose.NewSigner(cose.AlgorithmES256, key)
	if err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	headers := cose.NewSign1Message().Headers
	headers.Protected.SetAlgorithm(cose.AlgorithmES256)
	headers.Protected[cose.HeaderLabelKeyID] = id[:]
	if _, err := headers.Protected.SetType(kind); err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	protected, err := headers.MarshalProtected()
	if err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	// The Sig_structure (RFC 9052, section 4.4) is hashed as it stands: go-cose
	// would first make a copy with the payload in it, and another one behind.
	h := sha256.New()
	h.Write([]byte("\x84\x6aSignature1"))
	h.Write(protected)
	h.Write(append(byteString(nil, len(external)), external...))
	h.Write(byteString(nil, len(payload)))
	h.Write(payload)
	sig, err := signer.(cose.DigestSigner).SignDigest(rand.Reader, h.Sum(nil))
	if err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	m := append(make([]byte, 0, len(payload)+len(protected)+128), 0xd2, 0x84) // COSE_Sign1, tagged (section 4.2)
	m = append(append(m, protected...), 0xa0)                                 // no unprotected header
	m = append(byteString(m, len(payload)), payload...)
	return append(byteString(m, len(sig)), sig...), nil
}

// byteString appends the head of a CBOR byte string of n bytes (RFC 8949,
// section 3).
func byteString(b []byte, n int) []byte {
	switch {
	case n < 24:
		return append(b, 0x40|byte(n))
	case n <= math.MaxUint8:
		return append(b, 0x58, byte(n))
	case n <= math.MaxUint16:
		return binary.BigEndian.AppendUint16(append(b, 0x59), uint16(n))
	}
	return binary.BigEndian.AppendUint32(append(b, 0x5a), uint32(n))
}

// open reads a COSE_Sign1 and, if key is given, verifies it. It returns the
// payload and the id of the key that the header names.
func open(data []byte, limit int, kind, external string, key *ecdsa.PublicKey) (payload []byte, id attest.Digest, err error) {
	if len(data) > limit {
		return nil, id, fmt.Errorf("%d bytes, at most %d: %w", len(data), limit, attest.ErrTooLarge)
	}
	m := cose.NewSign1Message()
	if err := m.UnmarshalCBOR(data); err != nil {
		return nil, id, err
	}
	if t, _ := m.Headers.Protected[cose.HeaderLabelType].(string); t != kind {
		return nil, id, fmt.Errorf("type %.64q, want %q", t, kind)
	}
	kid, _ := m.Headers.Protected[cose.HeaderLabelKeyID].([]byte)
	if len(kid) != len(id) {
		return nil, id, fmt.Errorf("key id of %d bytes, want %d", len(kid), len(id))
	}
	id = attest.Digest(kid)
	if key == nil {
		return m.Payload, id, nil
	}
	v, err := cose.NewVerifier(cose.AlgorithmES256, key)
	if err != nil {
		return nil, id, err
	}
	if err := m.Verify([]byte(external), v); err != nil {
		return nil, id, fmt.Errorf("not signed by the key that was given, but in the name of key %s: %w", id, err)
	}
	return m.Payload, id, nil
}

// SignToken signs claims as an EAR token.
func SignToken(c Claims, key crypto.Signer) ([]byte, error) {
	payload, err := c.Encode()
	if err != nil {
		return nil, err
	}
	return sign(payload, earType, "", key)
}

// Expect is what a relying party knows by itself about the one before it.
type Expect struct {
	Organization string        // whose gateway we are
	Device       attest.Digest // whose session this is
	Key          attest.Digest // SHA-256 of the SubjectPublicKeyInfo that this session has proven
	Now          time.Time
}

// CheckToken judges a token as a relying party. A nil error proves that a
// verifier with that key signed it; that it is affirming, for this
// organisation, device and key; and that it has not expired.
func CheckToken(data []byte, key *ecdsa.PublicKey, want Expect) (*Claims, error) {
	if key == nil {
		return nil, errors.New("token: no verifier key is given")
	}
	payload, _, err := open(data, maxToken, earType, "", key)
	if err != nil {
		return nil, fmt.Errorf("token: %w", err)
	}
	c, err := decodeAs[Claims](payload)
	if err != nil {
		return nil, err
	}
	device, err := c.Device()
	if err != nil {
		return nil, fmt.Errorf("token: %w", err)
	}
	a, err := c.Appraisal()
	if err != nil {
		return nil, fmt.Errorf("token: %w", err)
	}
	switch {
	case c.Profile != EARProfile:
		return nil, fmt.Errorf("token: profile %.64q, want %q", c.Profile, EARProfile)
	case a.Status != attest.StatusAffirming:
		return nil, fmt.Errorf("token: status %s, want affirming", a.Status)
	case c.Audience != want.Organization:
		return nil, fmt.Errorf("token: for organisation %.64q, this is %q", c.Audience, want.Organization)
	case device != want.Device:
		return nil, fmt.Errorf("token: for device %s, this is %s", device, want.Device)
	case c.Confirmation == nil || !bytes.Equal(c.Confirmation.KeyID, want.Key[:]):
		return nil, errors.New("token: for another key than the one that this session has proven")
	case want.Now.Unix() >= c.Expires:
		return nil, fmt.Errorf("token: expired at %s", time.Unix(c.Expires, 0).UTC().Format(time.RFC3339))
	case want.Now.Add(time.Minute).Unix() < c.IssuedAt:
		return nil, fmt.Errorf("token: from the future, %s", time.Unix(c.IssuedAt, 0).UTC().Format(time.RFC3339))
	}
	return &c, nil
}

// CheckCredential is CheckToken for one who has the certificate before him
// that a session has proven: the token must be the very result that the
// certificate stands for.
func CheckCredential(data []byte, key *ecdsa.PublicKey, cert *x509.Certificate, organization string, now time.Time) (*Claims, error) {
	if len(cert.URIs) != 1 || cert.SerialNumber == nil {
		return nil, errors.New("token: the certificate names no device")
	}
	var want Expect
	text, ok := strings.CutPrefix(cert.URIs[0].String(), verifier.DevicePrefix)
	if err := want.Device.UnmarshalText([]byte(text)); !ok || err != nil {
		return nil, fmt.Errorf("token: the certificate names no device but %q", cert.URIs[0])
	}
	want.Organization, want.Key, want.Now = organization, sha256.Sum256(cert.RawSubjectPublicKeyInfo), now
	c, err := CheckToken(data, key, want)
	if err != nil {
		return nil, err
	}
	a, err := c.Appraisal()
	if err != nil {
		return nil, fmt.Errorf("token: %w", err)
	}
	if id := fmt.Sprintf("%032x", cert.SerialNumber); a.Report != id {
		return nil, fmt.Errorf("token: of result %.64q, the certificate stands for result %s", a.Report, id)
	}
	return c, nil
}
