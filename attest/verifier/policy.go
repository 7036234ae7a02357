package verifier

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"sekisho/attest"
	"sekisho/attest/eventlog"
	"sekisho/attest/policy"
)

// references are the images that p accepts. Unsigned values count only where
// there is no signed policy.
func (in Input) references(p *policy.Signed) []attest.ReferenceValues {
	if p != nil {
		return p.Bundle.Accepted(in.Now)
	}
	return in.References
}

// inForce refuses where a policy is needed and none is in force.
func (a *appraisal) inForce() error {
	if a.in.Policy == nil && a.in.PolicyNeeded {
		return attest.Refuse(attest.ReasonNoPolicy, "no signed policy is in force; publish one with attestctl policy publish")
	}
	return nil
}

// rules judges the facts by the rules of the policy in force. A rule of
// severity degrade leaves the result a warning, one of severity warn leaves it
// as it is: both are reported.
func (a *appraisal) rules() error {
	if a.in.Policy == nil {
		return nil
	}
	a.findings = policy.Evaluate(a.in.Policy.Bundle.Rules, a.facts(a.image))
	return worst(a.findings)
}

// worst refuses with the first finding that blocks.
func worst(findings []attest.Finding) error {
	for _, f := range findings {
		if f.Severity != attest.SeverityWarn && f.Severity != attest.SeverityDegrade {
			return attest.Refuse(f.Reason, "%s", ruleText(f))
		}
	}
	return nil
}

func ruleText(f attest.Finding) string {
	return fmt.Sprintf("rule %s: %s is %s, expected %s: %s", f.Rule, f.Component, f.Seen, f.Expected, f.Sentence.EN)
}

// facts are what the checks before have proven.
func (a *appraisal) facts(image string) policy.Facts {
	f := policy.Facts{policy.FactTPMFirmware: {dotted(a.statement.Firmware)}}
	for pcr, v := range a.boot {
		f[policy.FactPCR(pcr)] = []string{v.String()}
	}
	if image != "" {
		f[policy.FactImage] = []string{image}
		f[policy.FactImageVersion] = []string{image[strings.LastIndexByte(image, ' ')+1:]}
	}
	if v := a.events.SecureBoot(); v != eventlog.SecureBootUnknown {
		f[policy.FactSecureBoot] = []string{v.String()}
	}
	if list, ok := a.events.Forbidden(); ok {
		f[policy.FactDBX] = list
	}
	if a.in.Evidence.Model != "" {
		f[policy.FactModel] = []string{a.in.Evidence.Model}
	}
	if state, _ := a.volume(); state != "" {
		f[policy.FactVolume] = []string{state}
	}
	if w := a.firmware(); w != nil {
		if w.Version != "" {
			f[policy.FactFirmware] = []string{w.Version}
		}
		f[policy.FactDevices] = []string{strconv.Itoa(w.Devices)}
		f[policy.FactOrganizations] = []string{strconv.Itoa(w.Organizations)}
	}
	return f
}

// FirmwareOf names the firmware measurements of a model of machine: SHA-256
// over the model and the values of PCR 0 to 3.
func FirmwareOf(e *attest.Evidence) attest.Digest {
	h := sha256.New()
	fmt.Fprintf(h, "%d %s", len(e.Model), e.Model)
	for i := range 4 {
		h.Write(e.PCRs[i])
	}
	return attest.Digest(h.Sum(nil))
}

// volume compares the disk key whose use was measured with the first one that
// was seen with this device.
func (a *appraisal) volume() (state string, seen *attest.Digest) {
	for _, e := range a.ran {
		if e.Kind != attest.EventDiskKey {
			continue
		}
		first := a.in.Device.Volume
		switch {
		case seen != nil && *seen != e.Detail:
			return "changed", &e.Detail
		case first == nil:
			state = "first"
		case *first == e.Detail:
			state = "same"
		default:
			return "changed", &e.Detail
		}
		seen = &e.Detail
	}
	return state, seen
}

// reportVolume adds what a person should know of the work disk: an attacker's
// own disk, or a key that was sealed for another one, shows here.
func (a *appraisal) reportVolume() {
	state, seen := a.volume()
	if state != "changed" {
		return
	}
	f := attest.Finding{Reason: attest.ReasonVolumeChanged, Severity: attest.SeverityWarn, Component: "work disk", PCR: 15, Seen: seen.String()}
	if a.in.Device.Volume != nil {
		f.Expected = a.in.Device.Volume.String()
	}
	a.findings = append(a.findings, f)
}

// firmware returns how common the quoted firmware values are, with the
// firmware's own version; nil if nobody counted.
func (a *appraisal) firmware() *attest.Firmware {
	w := a.in.Firmware
	if w == nil || w.Digest != FirmwareOf(a.in.Evidence) {
		return nil
	}
	c := *w
	c.Version, c.Model = a.events.FirmwareVersion(), a.in.Evidence.Model
	return &c
}

// shadow judges the boot by the policy that is not enforced. It returns nil if
// that would have said the same.
func (a *appraisal) shadow(r *attest.Result) *attest.Shadow {
	p := a.in.Shadow
	if p == nil || a.events == nil {
		return nil
	}
	s := &attest.Shadow{Policy: p.ID, Status: attest.StatusAffirming}
	var why *attest.Refusal
	ref, findings, err := a.events.Judge(a.boot, a.in.references(p))
	if err == nil {
		findings = policy.Evaluate(p.Bundle.Rules, a.facts(ref.Image+" "+ref.Version))
		err = worst(findings)
		s.Status = policy.Worst(findings)
	}
	if err != nil {
		s.Status = attest.StatusContraindicated
		s.Reason, s.Detail = attest.ReasonEvidenceMalformed, err.Error()
		if errors.As(err, &why) {
			s.Reason, s.Detail = why.Reason, why.Detail
		}
	}
	s.Findings = explained(findings)
	if s.Status == r.Status && s.Reason == r.Reason && len(s.Findings) == len(r.Findings) {
		return nil
	}
	return s
}

// complete adds to a result what does not change its verdict.
func (a *appraisal) complete(r *attest.Result) {
	if r.Status == attest.StatusAffirming {
		if r.Status = policy.Worst(r.Findings); r.Status != attest.StatusAffirming {
			for _, f := range r.Findings {
				if f.Severity == attest.SeverityDegrade {
					r.Reason, r.Detail = f.Reason, ruleText(f)
					break
				}
			}
		}
	}
	// A clock that may have gone back is tried once more, then the device
	// counts as degraded, not as an attacker.
	if r.Reason == attest.ReasonClockUnsafe && a.in.Device.Retried {
		r.Status = attest.StatusWarning
	}
	if r.Reason != attest.ReasonNone && len(r.Findings) == 0 {
		r.Findings = []attest.Finding{{Reason: r.Reason, Seen: r.Detail}}
	}
	r.Findings = explained(r.Findings)
	if a.in.Policy != nil {
		r.Policy = &a.in.Policy.ID
	}
	if a.events != nil {
		a.number(r.Findings)
		r.Firmware = a.firmware()
		r.Shadow = a.shadow(r)
	}
	if len(a.in.LastGood) > 0 && r.Status != attest.StatusAffirming {
		digest := attest.Digest(sha256.Sum256(a.in.LastGood))
		r.LastGood = &digest
		r.Changes = eventlog.Diff(a.in.LastGood, a.in.Evidence.EventLog)
	}
}

func explained(list []attest.Finding) []attest.Finding {
	for i := range list {
		list[i] = list[i].Explained()
	}
	return list
}

// number finds the event that a finding is about: the one whose digest was
// seen in that PCR.
func (a *appraisal) number(list []attest.Finding) {
	for i, f := range list {
		for _, e := range a.events.Events {
			if f.Seen != "" && e.PCR == f.PCR && e.Digest.String() == f.Seen {
				list[i].Number = e.Number
				break
			}
		}
	}
}

// dotted writes a TPM's firmware version as four numbers of 16 bits.
func dotted(v uint64) string {
	return fmt.Sprintf("%d.%d.%d.%d", v>>48, v>>32&0xffff, v>>16&0xffff, v&0xffff)
}
