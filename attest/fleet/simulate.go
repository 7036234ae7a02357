package fleet

import (
	"context"
	"errors"
	"fmt"
	"time"

	"sekisho/attest"
	"sekisho/attest/archive"
	"sekisho/attest/policy"
	"sekisho/attest/report"
	"sekisho/attest/verifier"
)

// Verdict of one device under a policy that is not published.
type Verdict struct {
	Device   attest.Digest    `json:"device_id"`
	Was      attest.Status    `json:"was"`              // in its last report; none: it has none
	Would    attest.Status    `json:"would"`            // under the policy; none: unknown
	Reason   attest.Reason    `json:"reason,omitempty"` // why it would not be affirmed
	Detail   string           `json:"detail,omitempty"`
	Findings []attest.Finding `json:"findings,omitempty"`
}

// Simulation is what a policy would do to the enrolled devices.
type Simulation struct {
	Policy    attest.PolicyID `json:"policy"`
	Devices   int             `json:"devices"`
	Affirming int             `json:"affirming"`
	Refused   int             `json:"refused"` // affirming now, and not under the policy
	Unknown   int             `json:"unknown"` // without a stored report that can be read
	Verdicts  []Verdict       `json:"verdicts"`
}

// Simulate appraises the last evidence of each enrolled device by a policy
// that is not in force, as at the time when it would be. Nothing changes.
// data is a signed bundle, or a draft in JSON.
func (s *Service) Simulate(ctx context.Context, data []byte) (*Simulation, error) {
	if s.Reports == nil {
		return nil, errors.New("this verifier stores no reports")
	}
	p, err := readPolicy(data)
	if err != nil {
		return nil, err
	}
	var devices []attest.Digest
	if err := scan(ctx, s, "device", func(d Device) { devices = append(devices, d.ID) }); err != nil {
		return nil, err
	}
	references := s.unsigned()
	at := time.Unix(max(s.Now().Unix(), p.Bundle.NotBefore), 0)
	sim := &Simulation{Policy: p.ID, Devices: len(devices), Verdicts: []Verdict{}}
	for _, id := range devices {
		v, err := s.simulate(ctx, id, p, references, at)
		if err != nil {
			return nil, fmt.Errorf("device %s: %w", id, err)
		}
		switch {
		case v.Was == attest.StatusNone:
			sim.Unknown++
		case v.Would == attest.StatusAffirming:
			sim.Affirming++
		case v.Was == attest.StatusAffirming:
			sim.Refused++
		}
		sim.Verdicts = append(sim.Verdicts, v)
	}
	return sim, nil
}

func (s *Service) simulate(ctx context.Context, id attest.Digest, p *policy.Signed, references []attest.ReferenceValues, at time.Time) (Verdict, error) {
	v := Verdict{Device: id}
	rec, err := s.record(ctx, id, true)
	if err != nil {
		return v, err
	}
	i := rec.seen.last(false)
	if i.ID == "" {
		return v, nil
	}
	data, err := s.Reports.Get(i.ID)
	if errors.Is(err, archive.ErrNotFound) {
		return v, nil
	}
	if err != nil {
		return v, err
	}
	r, _, err := report.Parse(data, &s.Reports.key.PublicKey)
	if err != nil { // such as one of a former report key
		s.Log.Warn("the last report of a device cannot be read", "device", id, "error", err)
		return v, nil
	}
	was, err := r.Input(nil)
	if err != nil {
		return v, err
	}
	in, err := r.Input(p)
	if err != nil {
		return v, err
	}
	in.References, in.Now = references, at
	v.Was = verifier.Appraise(was).Result.Status
	would := verifier.Appraise(in).Result
	v.Would, v.Reason, v.Detail, v.Findings = would.Status, would.Reason, would.Detail, would.Findings
	return v, nil
}

// readPolicy reads a signed bundle or a draft in JSON. Signatures are not
// judged: nothing comes into force by it.
func readPolicy(data []byte) (*policy.Signed, error) {
	if len(data) == 0 || data[0] != '{' {
		return policy.Read(data)
	}
	b, err := policy.Parse(data)
	if err != nil {
		return nil, err
	}
	id, err := b.ID()
	if err != nil {
		return nil, err
	}
	return &policy.Signed{Bundle: b, ID: id}, nil
}

// errLocksOut says that a policy was not published because of whom it refuses.
var errLocksOut = errors.New("the policy would refuse devices that are affirmed now")

// Publish publishes a signed policy. Unless force is set, it first simulates
// it, and refuses one that would lock out over the brake's share of devices.
func (s *Service) Publish(ctx context.Context, data []byte, shadow, force bool) (*PolicyInfo, error) {
	if s.Policies != nil && !shadow && !force && s.Reports != nil {
		sim, err := s.Simulate(ctx, data)
		if err != nil {
			return nil, err
		}
		percent := defaultPercent
		if s.Brake != nil {
			percent = s.Brake.percent
		}
		if sim.Refused*100 > percent*sim.Devices {
			return nil, fmt.Errorf("%w: %d of %d; see attestctl policy simulate, or publish with -force", errLocksOut, sim.Refused, sim.Devices)
		}
	}
	p, err := s.publish(ctx, data, shadow)
	if err != nil {
		return nil, err
	}
	state := "published"
	if shadow {
		state = "shadow"
	}
	i := info(p, state)
	s.Log.Info("policy published", "policy", p.ID, "state", state, "not_before", i.NotBefore)
	return &i, nil
}
