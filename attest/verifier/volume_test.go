package verifier

import (
	"testing"

	"sekisho/attest"
	"sekisho/attest/policy"
	"sekisho/attest/runlog"
)

// TestVolume compares the work disk that a boot used with the first one seen.
func TestVolume(t *testing.T) {
	mine, other := attest.Digest{1}, attest.Digest{2}
	for name, c := range map[string]struct {
		first   *attest.Digest
		used    []attest.Digest
		state   string
		changed bool
	}{
		"locked":                   {first: &mine},
		"first":                    {used: []attest.Digest{mine}, state: "first"},
		"same":                     {first: &mine, used: []attest.Digest{mine}, state: "same"},
		"another":                  {first: &mine, used: []attest.Digest{other}, state: "changed", changed: true},
		"another beside the first": {first: &mine, used: []attest.Digest{mine, other}, state: "changed", changed: true},
		"two at first sight":       {used: []attest.Digest{mine, other}, state: "changed", changed: true},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.in.Device.Volume = c.first
			for _, d := range c.used {
				e := attest.RunEvent{Kind: attest.EventDiskKey, Detail: d}
				if err := b.tpm.Extend(15, runlog.Digest(e)); err != nil {
					t.Fatal(err)
				}
				var err error
				if b.in.Evidence.RunLog, err = runlog.Append(b.in.Evidence.RunLog, e); err != nil {
					t.Fatal(err)
				}
			}
			b.resign()
			out := Appraise(b.in)
			if out.Result.Status != attest.StatusAffirming {
				t.Fatalf("%+v", out.Result)
			}
			found := len(out.Result.Findings) == 1 && out.Result.Findings[0].Reason == attest.ReasonVolumeChanged
			if found != c.changed {
				t.Errorf("findings %+v", out.Result.Findings)
			}
			if (out.Volume == nil) != (len(c.used) == 0) {
				t.Errorf("volume %v", out.Volume)
			}
			// A rule can make it a refusal.
			a := &appraisal{in: b.in, ran: out.Result.Events}
			if state, _ := a.volume(); state != c.state {
				t.Errorf("state %q, want %q", state, c.state)
			}
			rule := policy.Rule{ID: "disk", Fact: policy.FactVolume, Op: policy.OpIn, Values: []string{"first", "same"}}
			facts := policy.Facts{}
			if c.state != "" {
				facts[policy.FactVolume] = []string{c.state}
			}
			if unmet := len(policy.Evaluate([]policy.Rule{rule}, facts)) > 0; unmet != (c.changed || c.state == "") {
				t.Errorf("rule unmet: %t", unmet)
			}
		})
	}
}
