package main

import (
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"strings"

	"sekisho/attest"
	"sekisho/attest/gate"
	"sekisho/attest/policy"
	"sekisho/attest/report"
	"sekisho/attest/seal"
	"sekisho/attest/tpm"
)

// cardOptions are the flags of the card commands.
type cardOptions struct {
	release, ak, report, verifierKey, kind string
	unbound                                bool

	user, name, do, finger, chain string
	minutes                       int
}

func (o *cardOptions) flags(f *flag.FlagSet) {
	f.StringVar(&o.release, "release", "", "signed policies of a release, by whose key the card's key must open: `file`")
	f.BoolVar(&o.unbound, "unbound", false, "without -release: the card's key is bound to its TPM alone")
	f.StringVar(&o.ak, "ak", "", "the device's attestation key, as a TPM public area: `file`")
	f.StringVar(&o.report, "report", "", "a report of the device, with -verifier-key: `file`")
	f.StringVar(&o.verifierKey, "verifier-key", "", "verifier's public key (report key), PEM `file`")
	f.StringVar(&o.user, "user", "", "`account` whose card it is, such as taro@EXAMPLE.LG.JP")
	f.StringVar(&o.name, "name", "", "card permit -do setup: the user's `name` for people")
	f.StringVar(&o.do, "do", "", "card permit: `action`")
	f.StringVar(&o.finger, "finger", "right-index-finger", "card permit -do enrol, delete: `finger`, by fprintd's names")
	f.StringVar(&o.chain, "chain", "", "card permit -do import: certificate and its issuers, PEM `file`")
	f.IntVar(&o.minutes, "minutes", 0, "card permit -do pin-only: for how many `minutes` the PIN stands alone; 0 ends it")
	f.StringVar(&o.kind, "kind", "", "rsa-2048 or p-256: the organisation's `kind` of logon key (default: the request's)")
}

// cardReport is the judgement of a certificate request for a card.
type cardReport struct {
	Verdict  string          `json:"verdict"` // pass, refuse
	Kind     string          `json:"kind"`
	Subject  string          `json:"subject,omitempty"`
	AK       attest.Digest   `json:"ak"`     // TPM Name of the attestation key, without its algorithm
	Policy   attest.Digest   `json:"policy"` // that the key must have; zero: bound to its TPM alone
	Findings []attest.Remark `json:"findings"`
}

// cardWant is what a card's key is judged by.
type cardWant struct {
	ak     *tpm.Public   // of the device, known beforehand
	policy attest.Digest // zero: none
	kind   string        // empty: either
}

func checkCard(ctx context.Context, o *options, args []string) (any, error) {
	want := cardWant{kind: o.card.kind}
	if (o.card.release == "") != o.card.unbound {
		return nil, fmt.Errorf("%w: one of -release and -unbound is needed", errUsage)
	}
	if o.card.release != "" {
		data, err := readFile(o.card.release)
		if err != nil {
			return nil, err
		}
		_, key, err := seal.ReadRelease(data)
		if err != nil {
			return nil, err
		}
		if want.policy, err = key.Authorized(seal.PurposeLogin); err != nil {
			return nil, err
		}
	}
	area, err := o.attestationKey(ctx)
	if err != nil {
		return nil, err
	}
	signer, err := tpm.ParseSigner(area)
	if err != nil {
		return nil, err
	}
	if want.ak = signer.Area; want.ak == nil {
		return nil, errors.New("attestation key: PEM does not say that the key signs only what a TPM made; give its public area")
	}
	if err := want.ak.CheckAK(); err != nil {
		return nil, err
	}
	data, err := readCapped(args[0], gate.MaxCardRequest)
	if err != nil {
		return nil, err
	}
	r, err := gate.ParseCardRequest(data)
	if err != nil {
		return nil, err
	}
	return want.judge(r)
}

// attestationKey is the device's, from one source that is not the request.
func (o *options) attestationKey(ctx context.Context) ([]byte, error) {
	switch {
	case o.card.ak != "" && o.device == "" && o.card.report == "":
		return readCapped(o.card.ak, attest.MaxTPMBytes)
	case o.device != "" && o.card.ak == "" && o.card.report == "":
		d, err := o.admin().Device(ctx, o.device)
		if err != nil { // not a verdict on the request, whatever the verifier says
			return nil, fmt.Errorf("device %.64s: %v", o.device, err)
		}
		return d.AK, nil
	case o.card.report != "" && o.card.verifierKey != "" && o.card.ak == "" && o.device == "":
		pem, err := readCapped(o.card.verifierKey, 16<<10)
		if err != nil {
			return nil, err
		}
		key, err := policy.ParseKey(pem)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", o.card.verifierKey, err)
		}
		data, err := readCapped(o.card.report, report.MaxReport)
		if err != nil {
			return nil, err
		}
		r, _, err := report.Parse(data, key)
		if err != nil {
			return nil, err
		}
		return r.Device.AK, nil
	}
	return nil, fmt.Errorf("%w: one of -device, -ak, and -report with -verifier-key is needed", errUsage)
}

// judge finds everything that speaks against a request. A report without
// findings proves that the request was made by a key of the template in the
// TPM of the attestation key.
func (want cardWant) judge(r *gate.CardRequest) (*cardReport, error) {
	out := &cardReport{Verdict: "pass", Kind: want.kind, AK: attest.Digest(want.ak.Name()[2:]), Policy: want.policy, Findings: []attest.Remark{}}
	against := func(code attest.Reason, format string, a ...any) {
		out.Verdict = "refuse"
		out.Findings = append(out.Findings, attest.Refuse(code, format, a...).Remark())
	}
	csr, err := parseCSR(r.CSR)
	if err != nil {
		against(attest.ReasonCardCSR, "certificate request: %v", err)
	} else {
		out.Subject = csr.Subject.String()
	}
	key, err := keyOf(r.Key)
	if err != nil {
		against(attest.ReasonCardAttributes, "%v", err)
		return out, nil
	}
	if csr != nil {
		if k, ok := key.(interface{ Equal(crypto.PublicKey) bool }); !ok || !k.Equal(csr.PublicKey) {
			against(attest.ReasonCardOtherKey, "the certificate request is for another key than the certified one")
		}
	}
	if out.Kind == "" {
		out.Kind = attest.LogonP256
		if _, ok := key.(*rsa.PublicKey); ok {
			out.Kind = attest.LogonRSA2048
		}
	}
	template, err := tpm.LogonKey(out.Kind, false, want.policy)
	if err != nil {
		return nil, err
	}
	signed := tpm.VerifySignature(want.ak, r.Certify, r.CertifySig)
	if signed != nil {
		against(attest.ReasonCardSigner, "the certification is not by the device's attestation key: %v", signed)
	}
	_, err = tpm.CheckCertified(want.ak, template, nil, tpm.Certified{Key: r.Key, Storage: r.Storage, Statement: r.Certify, Signature: r.CertifySig})
	switch {
	case errors.Is(err, tpm.ErrPolicy):
		against(attest.ReasonCardPolicy, "%v", err)
	case errors.Is(err, tpm.ErrTemplate):
		against(attest.ReasonCardAttributes, "%v", err)
	case err != nil && signed == nil:
		against(attest.ReasonCardStatement, "%v", err)
	}
	return out, nil
}

// keyOf is the public key of a TPM's public area.
func keyOf(area []byte) (crypto.PublicKey, error) {
	p, err := tpm.ParsePublic(area)
	if err != nil {
		return nil, err
	}
	return p.Key()
}

// parseCSR reads a request in PEM that its own key has signed.
func parseCSR(data []byte) (*x509.CertificateRequest, error) {
	b, rest := pem.Decode(data)
	if b == nil || b.Type != "CERTIFICATE REQUEST" || strings.TrimSpace(string(rest)) != "" {
		return nil, errors.New("want one CERTIFICATE REQUEST in PEM")
	}
	csr, err := x509.ParseCertificateRequest(b.Bytes)
	if err != nil {
		return nil, err
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, err
	}
	return csr, nil
}

func printCard(w printer, r *cardReport) error {
	p, flush := w.table("", "")
	p.verdict(r.Verdict)
	p.say("申請者\t%s", "subject\t%s", r.Subject)
	p.say("鍵\t%s", "key\t%s", r.Kind)
	p.say("証明鍵\t%s", "attestation key\t%s", r.AK)
	if r.Policy == (attest.Digest{}) {
		p.say("ポリシー\tなし（TPM のみ）", "policy\tnone: bound to the TPM alone")
	} else {
		p.say("ポリシー\t%s", "policy\t%s", r.Policy)
	}
	p.findings(r.Findings)
	return flush()
}
