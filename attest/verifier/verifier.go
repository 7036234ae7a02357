// Package verifier appraises evidence (RFC 9334, section 3) and issues the
// short-lived certificate that an affirming result stands for. Appraise is
// pure: the same input gives the same result, anywhere and at any time.
package verifier

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"errors"
	"time"

	"sekisho/attest"
	"sekisho/attest/eventlog"
	"sekisho/attest/eventlog/second"
	"sekisho/attest/policy"
	"sekisho/attest/runlog"
	"sekisho/attest/tpm"
)

// Device is what the verifier's own record says about an enrolled device. The
// attestation key is taken from here and never from evidence.
type Device struct {
	ID    attest.Digest
	AK    []byte     // TPMT_PUBLIC
	Clock *tpm.Clock // of the last affirming evidence, nil before the first

	// Volume is what the use of a disk key measured when it was first seen, nil
	// before that (attest.EventDiskKey).
	Volume *attest.Digest

	// Retried: the last evidence was refused as attest.ReasonClockUnsafe.
	Retried bool
}

// Input is everything that an appraisal depends on.
type Input struct {
	Evidence   *attest.Evidence
	Device     *Device                  // nil: the device is not enrolled
	References []attest.ReferenceValues // unsigned ones, which count without a policy only
	Verifier   string                   // our name
	Now        time.Time

	Logs *second.Memory // logs that both readers have read; nil knows none

	Policy       *policy.Signed   // in force; nil: none
	PolicyNeeded bool             // without a policy nothing is affirmed
	Shadow       *policy.Signed   // evaluated and not enforced; may be nil
	LastGood     []byte           // event log of the last affirmed boot; may be nil
	Firmware     *attest.Firmware // how common the firmware is; may be nil
}

// Outcome is a Result and, only if that is affirming, what it entitles to.
type Outcome struct {
	Result attest.Result
	// Bound says that the device's own TPM has signed the evidence for this very
	// nonce: all else anyone on the network can make, from reports too.
	Bound    bool
	EventLog attest.Digest    // SHA-256 of the evidence's; zero unless Bound
	Key      *ecdsa.PublicKey // to certify; nil unless affirming
	Clock    tpm.Clock        // to record; zero unless affirming
	Firmware uint64           // of the TPM, to record; zero unless affirming
	Volume   *attest.Digest   // to record if nothing is; nil unless affirming with a disk in use
}

// Appraise judges evidence. A refusal is a Result, not an error.
//
// An affirming result proves that, in this order:
//
//   - the evidence names us and a purpose that we serve;
//   - the device is enrolled, and the quote is signed by the attestation key
//     of our own record of it;
//   - the quote is a TPM's (magic), a quote (type), by that very key as a
//     primary of its TPM (qualified signer);
//   - it was made for this nonce, device, verifier, purpose, certificate key
//     and event log (extraData);
//   - it covers exactly attest.QuotedPCRs of the SHA-256 bank, and the PCR
//     values in the evidence are the quoted ones;
//   - it is newer than the last one that we affirmed (clock);
//   - the certificate key is certified by the same attestation key as one that
//     lives in the same TPM and cannot leave it;
//   - what was extended after the boot is known run-time events, each once,
//     and nothing else (runlog.AtBoot);
//   - two readers find the same events in the event log, and without those of
//     the run time it passes eventlog.Check;
//   - the PCR values are those of one image of the reference values;
//   - no rule of the signed policy that blocks or degrades is unmet.
//
// The nonce itself is judged by Nonces before.
func Appraise(in Input) (out Outcome) {
	out.Result = newResult(in)
	a := &appraisal{in: in}
	defer func() { out.Bound, out.EventLog = a.bound, a.digest }()
	for _, check := range []func() error{a.addressee, a.signature, a.quote, a.binding, a.pcrs, a.clock, a.credentialKey, a.runTime, a.log, a.inForce, a.policy, a.rules} {
		if err := check(); err != nil {
			refuse(&out.Result, err, a.findings)
			out.Result.Events = a.ran
			a.complete(&out.Result)
			return out
		}
	}
	a.reportVolume()
	out.Result.Status, out.Result.Image, out.Result.Findings = attest.StatusAffirming, a.image, a.findings
	out.Result.Events = a.ran
	if a.complete(&out.Result); out.Result.Status != attest.StatusAffirming {
		return out
	}
	out.Key, out.Clock, out.Firmware = a.certify, a.statement.Clock, a.statement.Firmware
	_, out.Volume = a.volume()
	return out
}

// Refused makes the result of evidence that never came to Appraise: malformed,
// or with a nonce that Nonces refused. device may be zero.
func Refused(verifier string, device attest.Digest, now time.Time, err error) attest.Result {
	r := attest.Result{Profile: attest.ResultType, IssuedAt: now.Unix(), Verifier: verifier, Device: device}
	refuse(&r, err, nil)
	r.Findings = explained([]attest.Finding{{Reason: r.Reason, Seen: r.Detail}})
	return r
}

func newResult(in Input) attest.Result {
	return attest.Result{
		Profile: attest.ResultType, IssuedAt: in.Now.Unix(), Verifier: in.Verifier,
		Device: in.Evidence.DeviceID(), Nonce: in.Evidence.Nonce,
	}
}

func refuse(r *attest.Result, err error, findings []attest.Finding) {
	r.Status, r.Findings = attest.StatusContraindicated, findings
	var why *attest.Refusal
	switch {
	case errors.As(err, &why):
		r.Reason, r.Detail = why.Reason, why.Detail
	case errors.Is(err, attest.ErrTooLarge):
		r.Reason, r.Detail = attest.ReasonEvidenceTooLarge, err.Error()
	default:
		r.Reason, r.Detail = attest.ReasonEvidenceMalformed, err.Error()
	}
}

// appraisal carries what one check has established to the next.
type appraisal struct {
	in        Input
	ak        *tpm.Public
	statement *tpm.Statement
	bound     bool          // extra is what the quote was made for
	digest    attest.Digest // SHA-256 of the event log, once bound
	extra     attest.Digest
	values    map[int]attest.Digest // as quoted
	boot      map[int]attest.Digest // values without the run-time events
	ran       []attest.RunEvent
	certify   *ecdsa.PublicKey
	events    *eventlog.Log
	findings  []attest.Finding
	image     string
}

func (a *appraisal) addressee() error {
	e := a.in.Evidence
	if e.Verifier != a.in.Verifier {
		return attest.Refuse(attest.ReasonVerifierMismatch, "evidence made for verifier %.64q, this is %q", e.Verifier, a.in.Verifier)
	}
	if e.Purpose != attest.PurposeNetwork {
		return attest.Refuse(attest.ReasonPurposeMismatch, "no credential for %s here", e.Purpose)
	}
	if a.in.Device == nil || a.in.Device.ID != e.DeviceID() {
		return attest.Refuse(attest.ReasonDeviceUnknown, "device %s is not enrolled here; enrol it with a ticket", e.DeviceID())
	}
	return nil
}

func (a *appraisal) signature() (err error) {
	if a.ak, err = tpm.ParsePublic(a.in.Device.AK); err != nil {
		return attest.Refuse(attest.ReasonSignatureInvalid, "attestation key on record: %v", err)
	}
	if err := tpm.VerifySignature(a.ak, a.in.Evidence.Quote, a.in.Evidence.QuoteSig); err != nil {
		return attest.Refuse(attest.ReasonSignatureInvalid, "quote is not signed by the attestation key enrolled for this device: %v", err)
	}
	return nil
}

func (a *appraisal) quote() error {
	magic, kind, err := tpm.Head(a.in.Evidence.Quote)
	switch {
	case err != nil:
		return err
	case magic != tpm.Generated:
		return attest.Refuse(attest.ReasonQuoteMagic, "quote was not made by a TPM: magic 0x%08x", magic)
	case kind != tpm.TypeQuote:
		return attest.Refuse(attest.ReasonQuoteType, "statement of type 0x%04x is no quote", kind)
	}
	if a.statement, err = tpm.ParseStatement(a.in.Evidence.Quote); err != nil {
		return err
	}
	if !a.statement.IsSigner(a.ak) {
		return attest.Refuse(attest.ReasonQuoteSigner, "quote names another signer than the enrolled attestation key")
	}
	return nil
}

func (a *appraisal) binding() error {
	e := a.in.Evidence
	key, err := tpm.ParsePublic(e.Key)
	if err != nil {
		return attest.Refuse(attest.ReasonKeyAttributes, "credential key: %v", err)
	}
	spki, err := key.SPKI()
	if err != nil {
		return attest.Refuse(attest.ReasonKeyAttributes, "credential key: %v", err)
	}
	digest := attest.Digest(sha256.Sum256(e.EventLog))
	a.extra, err = attest.Binding{
		Nonce: e.Nonce, Device: a.in.Device.ID, Verifier: a.in.Verifier, Purpose: e.Purpose,
		Key: sha256.Sum256(spki), EventLog: digest, RunLog: e.RunLog, Model: e.Model,
	}.Digest()
	if err != nil {
		return err
	}
	if !bytes.Equal(a.statement.ExtraData, a.extra[:]) {
		return attest.Refuse(attest.ReasonBindingMismatch, "quote was made for another nonce, device, verifier, purpose, key or event log")
	}
	a.bound, a.digest = true, digest
	return nil
}

func (a *appraisal) pcrs() error {
	if !a.statement.ExactlyQuoted() {
		return attest.Refuse(attest.ReasonPCRSelection, "quote covers %v, want exactly PCRs %v of the SHA-256 bank", a.statement.Selection, attest.QuotedPCRs)
	}
	if len(a.in.Evidence.PCRs) != len(attest.QuotedPCRs) {
		return attest.Refuse(attest.ReasonPCRSelection, "evidence has values of %d PCRs, want %d", len(a.in.Evidence.PCRs), len(attest.QuotedPCRs))
	}
	a.values = make(map[int]attest.Digest, len(attest.QuotedPCRs))
	for i, v := range a.in.Evidence.PCRs {
		a.values[i] = attest.Digest(v)
	}
	want, err := tpm.PCRDigest(a.values)
	if err != nil {
		return attest.Refuse(attest.ReasonPCRSelection, "%v", err)
	}
	if !bytes.Equal(want[:], a.statement.PCRDigest) {
		return attest.Refuse(attest.ReasonPCRDigest, "PCR values in the evidence are not the quoted ones")
	}
	return nil
}

// clock refuses a quote that is not newer than the last affirmed one: resets
// never go back, and within one reset the clock rises (TPM 2.0 Library, Part
// 1, section 36). A clock that may have gone back (safe is clear after a power
// cut) is judged by the reset count alone.
func (a *appraisal) clock() error {
	last, now := a.in.Device.Clock, a.statement.Clock
	switch {
	case last == nil:
	case now.ResetCount < last.ResetCount:
		return attest.Refuse(attest.ReasonClockReversed, "TPM reset count went back from %d to %d; re-enrol the device if its TPM was cleared", last.ResetCount, now.ResetCount)
	case now.ResetCount == last.ResetCount && now.RestartCount < last.RestartCount:
		return attest.Refuse(attest.ReasonClockReversed, "TPM restart count went back from %d to %d", last.RestartCount, now.RestartCount)
	case now.ResetCount == last.ResetCount && now.Clock <= last.Clock:
		if !now.Safe {
			return attest.Refuse(attest.ReasonClockUnsafe, "TPM clock went back from %d to %d ms and is not marked safe; try again", last.Clock, now.Clock)
		}
		return attest.Refuse(attest.ReasonClockReversed, "TPM clock went back from %d to %d ms within one boot", last.Clock, now.Clock)
	}
	return nil
}

func (a *appraisal) credentialKey() error {
	e := a.in.Evidence
	key, err := tpm.CheckCertified(a.ak, tpm.CredentialKey(), a.extra[:], tpm.Certified{Key: e.Key, Statement: e.Certify, Signature: e.CertifySig})
	switch {
	case errors.Is(err, tpm.ErrTemplate):
		return attest.Refuse(attest.ReasonKeyAttributes, "%v", err)
	case err != nil:
		return attest.Refuse(attest.ReasonKeyNotCertified, "%v", err)
	}
	a.certify = key.(*ecdsa.PublicKey) // the template's
	return nil
}

func (a *appraisal) runTime() (err error) {
	a.boot, a.ran, err = runlog.AtBoot(a.values, a.in.Evidence.RunLog)
	return err
}

func (a *appraisal) log() (err error) {
	data := a.in.Evidence.EventLog
	if a.events, err = eventlog.Parse(data); err != nil {
		return err
	}
	if err := a.in.Logs.Check(a.digest, data, a.events); err != nil {
		return err
	}
	a.findings, err = a.events.Check(a.boot)
	return err
}

func (a *appraisal) policy() error {
	ref, findings, err := a.events.Judge(a.boot, a.in.references(a.in.Policy))
	a.findings = findings
	if err != nil {
		return err
	}
	a.image = ref.Image + " " + ref.Version
	return nil
}
