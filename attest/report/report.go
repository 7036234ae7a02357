package report

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"

	"errors"
	"fmt"
	"time"

	"sekisho/attest"
	ekcert "sekisho/attest/ek"
	"sekisho/attest/policy"
	"sekisho/attest/tpm"
	"sekisho/attest/verifier"
)

// Profile names the format of a report.
const Profile = "urn:sekisho:attest:report:1"

const (
	reportType     = "application/vnd.sekisho.report+cbor"
	reportExternal = "sekisho/report/1"

	// MaxReport bounds a report in bytes: evidence, two policies, a log.
	MaxReport = 2*policy.MaxBundle + attest.MaxEvidence + attest.MaxEventLog + 2*maxToken
)

// Report is one appraisal with all that its verdict depended on.
type Report struct {
	Profile      string                   `cbor:"1,keyasint"`
	Organization string                   `cbor:"2,keyasint"`
	Verifier     string                   `cbor:"3,keyasint"`
	Time         int64                    `cbor:"4,keyasint"` // seconds since 1970
	Evidence     Wrapped                  `cbor:"5,keyasint"`
	Device       Record                   `cbor:"6,keyasint"`
	References   []attest.ReferenceValues `cbor:"7,keyasint,omitempty"` // unsigned ones
	Policy       []byte                   `cbor:"8,keyasint,omitempty"` // signed bundle in force
	PolicyNeeded bool                     `cbor:"9,keyasint,omitempty"`
	Shadow       []byte                   `cbor:"10,keyasint,omitempty"` // signed bundle not enforced
	LastGood     []byte                   `cbor:"11,keyasint,omitempty"` // event log
	Firmware     *attest.Firmware         `cbor:"12,keyasint,omitempty"`
	Lifetime     int64                    `cbor:"13,keyasint"` // seconds, of the certificate
	Token        []byte                   `cbor:"14,keyasint"` // EAR
}

// Wrapped is a conceptual message in its record form (RATS CMW): media type
// and value.
type Wrapped struct {
	_     struct{} `cbor:",toarray"`
	Type  string
	Value []byte
}

// Record is what the verifier's own records said of the device before.
type Record struct {
	ID            []byte     `cbor:"1,keyasint"`
	EK            []byte     `cbor:"2,keyasint"` // TPMT_PUBLIC
	EKCertificate []byte     `cbor:"3,keyasint"`
	AK            []byte     `cbor:"4,keyasint"` // TPMT_PUBLIC
	Clock         *tpm.Clock `cbor:"5,keyasint,omitempty"`
	Retried       bool       `cbor:"6,keyasint,omitempty"`
	Volume        []byte     `cbor:"7,keyasint,omitempty"` // first seen
}

// ID names the report of one evidence, and its result.
func ID(evidence []byte) string { return verifier.ResultID(evidence) }

// Make makes the report of an appraisal and signs it and its token. evidence
// is in.Evidence, encoded.
func Make(evidence []byte, in verifier.Input, out verifier.Outcome, rec Record, organization string, lifetime time.Duration, key crypto.Signer) (report, token []byte, err error) {
	r := Report{
		Profile: Profile, Organization: organization, Verifier: in.Verifier, Time: in.Now.Unix(),
		Evidence: Wrapped{Type: attest.ContentType, Value: evidence}, Device: rec, References: in.References,
		PolicyNeeded: in.PolicyNeeded, LastGood: in.LastGood, Firmware: in.Firmware, Lifetime: int64(lifetime / time.Second),
	}
	if in.Policy != nil {
		r.Policy = in.Policy.Data
	}
	if in.Shadow != nil {
		r.Shadow = in.Shadow.Data
	}
	claims, err := r.claims(out)
	if err != nil {
		return nil, nil, err
	}
	if r.Token, err = SignToken(claims, key); err != nil {
		return nil, nil, err
	}
	payload, err := encode(r)
	if err != nil {
		return nil, nil, err
	}
	report, err = sign(payload, reportType, reportExternal, key)
	return report, r.Token, err
}

// claims are those of an outcome of this report's input.
func (r *Report) claims(out verifier.Outcome) (Claims, error) {
	var key *attest.Digest
	if out.Key != nil {
		id, err := policy.KeyID(out.Key)
		if err != nil {
			return Claims{}, err
		}
		key = &id
	}
	res := out.Result
	if res.Report == "" {
		res.Report = ID(r.Evidence.Value)
	}
	return NewClaims(res, r.Organization, key, time.Duration(r.Lifetime)*time.Second), nil
}

// Input is what the appraisal was made of, with another policy if p is given.
func (r *Report) Input(p *policy.Signed) (verifier.Input, error) {
	e, err := attest.ParseEvidence(r.Evidence.Value)
	if err != nil {
		return verifier.Input{}, err
	}
	in := verifier.Input{
		Evidence: e, References: r.References, Verifier: r.Verifier, Now: time.Unix(r.Time, 0).UTC(),
		PolicyNeeded: r.PolicyNeeded, LastGood: r.LastGood, Firmware: r.Firmware,
		Device: &verifier.Device{ID: attest.Digest(r.Device.ID), AK: r.Device.AK, Clock: r.Device.Clock, Retried: r.Device.Retried},
	}
	if v := r.Device.Volume; len(v) > 0 {
		if len(v) != len(attest.Digest{}) {
			return verifier.Input{}, fmt.Errorf("report: volume of %d bytes, want %d", len(v), len(attest.Digest{}))
		}
		in.Device.Volume = (*attest.Digest)(v)
	}
	if p != nil {
		in.Policy = p
		return in, nil
	}
	for _, x := range []struct {
		data []byte
		to   **policy.Signed
	}{{r.Policy, &in.Policy}, {r.Shadow, &in.Shadow}} {
		if len(x.data) == 0 {
			continue
		}
		if *x.to, err = policy.Read(x.data); err != nil {
			return verifier.Input{}, err
		}
	}
	return in, nil
}

// Is reports whether data begins as a report does, a COSE_Sign1 (RFC 9052,
// section 4.2); an event log does not.
func Is(data []byte) bool { return len(data) > 0 && data[0] == 0xd2 }

// Parse reads a report. If key is given, the report must be signed by it. The
// second value is the id of the key in whose name it is signed.
func Parse(data []byte, key *ecdsa.PublicKey) (*Report, attest.Digest, error) {
	payload, id, err := open(data, MaxReport, reportType, reportExternal, key)
	if err != nil {
		return nil, id, fmt.Errorf("report: %w", err)
	}
	r, err := decodeAs[Report](payload)
	if err != nil {
		return nil, id, err
	}
	if r.Profile != Profile {
		return nil, id, fmt.Errorf("report: profile %.64q, want %q", r.Profile, Profile)
	}
	if r.Evidence.Type != attest.ContentType {
		return nil, id, fmt.Errorf("report: evidence of type %.64q, want %q", r.Evidence.Type, attest.ContentType)
	}
	if len(r.Device.ID) != len(attest.Digest{}) {
		return nil, id, fmt.Errorf("report: device id of %d bytes, want %d", len(r.Device.ID), len(attest.Digest{}))
	}
	return &r, id, nil
}

// Verdict is what Verify found.
type Verdict struct {
	Claims    Claims        `json:"claims"`
	Appraisal Appraisal     `json:"-"`
	Device    attest.Digest `json:"device"`
	Key       attest.Digest `json:"key"`     // in whose name it is signed
	Trusted   bool          `json:"trusted"` // the signature was verified with a key that was given
	Policy    string        `json:"policy"`  // none, unverified, verified
	EK        string        `json:"ek"`      // certificate of the endorsement key: none, unverified, verified
	Same      bool          `json:"same"`    // the appraisal gave the same bytes again
	Different string        `json:"different,omitempty"`
}

// Trust is what the one who verifies knows beforehand. What is nil is not
// judged.
type Trust struct {
	Key    *ecdsa.PublicKey // of the verifier: it has signed token and report
	Policy *policy.Keyring  // its keys have signed the policy
	EK     *ekcert.Roots    // TPM makers: the endorsement key's certificate chains to one of them
}

// ErrDifferent says that the appraisal gave another verdict than the report
// holds.
var ErrDifferent = errors.New("the appraisal does not give the verdict of the report")

// Verify appraises the evidence of a report again. A nil error proves that
// the claims in it follow, byte for byte, from the evidence, records,
// reference values and policy in it, and that the device id is that of the
// endorsement key in it. Whose verdict it is, only key says: without it the
// verdict is consistent and no more. What else of trust is given must bear out
// what the report has of it, and the report must have it.
func Verify(data []byte, trust Trust) (*Verdict, error) {
	key, ring := trust.Key, trust.Policy
	r, id, err := Parse(data, key)
	if err != nil {
		return nil, err
	}
	v := &Verdict{Key: id, Trusted: key != nil, Device: attest.Digest(r.Device.ID), Policy: "none", EK: "none"}
	payload, tokenKey, err := open(r.Token, maxToken, earType, "", key)
	if err != nil {
		return nil, fmt.Errorf("report: token: %w", err)
	}
	if tokenKey != id {
		return nil, fmt.Errorf("report: token of key %s in a report of key %s", tokenKey, id)
	}
	if v.Claims, err = decodeAs[Claims](payload); err != nil {
		return nil, err
	}
	if v.Appraisal, err = v.Claims.Appraisal(); err != nil {
		return nil, fmt.Errorf("report: %w", err)
	}
	ek, err := tpm.ParsePublic(r.Device.EK)
	if err != nil {
		return nil, fmt.Errorf("report: endorsement key: %w", err)
	}
	if attest.DeviceID(ek.Name()) != v.Device {
		return nil, fmt.Errorf("report: device id %s is not that of the endorsement key", v.Device)
	}
	switch {
	case len(r.Device.EKCertificate) == 0 && trust.EK != nil:
		return nil, errors.New("report: it has no certificate of the endorsement key, which was asked for")
	case len(r.Policy) == 0 && ring != nil:
		return nil, errors.New("report: its verdict follows no signed policy, which was asked for")
	}
	if len(r.Device.EKCertificate) > 0 {
		v.EK = "unverified"
		if trust.EK != nil {
			if err := ekcert.Check(ek, r.Device.EKCertificate, trust.EK, time.Unix(r.Time, 0)); err != nil {
				return nil, fmt.Errorf("report: %w", err)
			}
			v.EK = "verified"
		}
	}
	if len(r.Policy) > 0 {
		v.Policy = "unverified"
		if ring != nil {
			if _, err := ring.Open(r.Policy); err != nil {
				return nil, fmt.Errorf("report: %w", err)
			}
			v.Policy = "verified"
		}
	}
	in, err := r.Input(nil)
	if err != nil {
		return nil, fmt.Errorf("report: %w", err)
	}
	again, err := r.claims(verifier.Appraise(in))
	if err != nil {
		return nil, err
	}
	bytesAgain, err := again.Encode()
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(bytesAgain, payload) {
		a, _ := again.Appraisal() // of our own making
		v.Different = fmt.Sprintf("report says %s %s, the appraisal %s %s", v.Appraisal.Status, v.Appraisal.Reason, a.Status, a.Reason)
		return v, fmt.Errorf("report: %w: %s", ErrDifferent, v.Different)
	}
	v.Same = true
	return v, nil
}
