package verifier

import (
	"crypto/sha256"
	"encoding/hex"
	"testing"

	"sekisho/attest"
	"sekisho/attest/eventlog/logtest"
	"sekisho/attest/policy"
)

// signed is a policy that accepts the bench's image, if it names no other.
func signed(b policy.Bundle) *policy.Signed {
	if b.References == nil {
		b.References = []policy.Reference{{Values: image.Reference("sekisho", "1")}}
	}
	b.Profile, b.Organization, b.Version = policy.Profile, "Test City", 1
	for i := range b.Rules {
		b.Rules[i].Why = attest.Text{JA: "理由", EN: "reason"}
	}
	return &policy.Signed{Bundle: &b, ID: attest.PolicyID{Organization: b.Organization, Version: 1, Digest: attest.Digest{1}}}
}

func TestPolicy(t *testing.T) {
	rule := func(s attest.Severity) *policy.Signed {
		return signed(policy.Bundle{Rules: []policy.Rule{{ID: "r", Fact: policy.FactImage, Op: policy.OpEqual, Values: []string{"sekisho 2"}, Severity: s}}})
	}
	for _, c := range []struct {
		name   string
		change func(*bench)
		status attest.Status
		reason attest.Reason
		found  int
	}{
		{"none, and none is needed", func(*bench) {}, attest.StatusAffirming, attest.ReasonNone, 0},
		{"none, and one is needed", func(b *bench) { b.in.PolicyNeeded = true }, attest.StatusContraindicated, attest.ReasonNoPolicy, 1},
		{"rule that blocks", func(b *bench) { b.in.Policy = rule(attest.SeverityBlock) }, attest.StatusContraindicated, attest.ReasonPolicyRule, 1},
		{"rule that degrades", func(b *bench) { b.in.Policy = rule(attest.SeverityDegrade) }, attest.StatusWarning, attest.ReasonPolicyRule, 1},
		{"rule that warns", func(b *bench) { b.in.Policy = rule(attest.SeverityWarn) }, attest.StatusAffirming, attest.ReasonNone, 1},
		{"image of the policy", func(b *bench) {
			b.in.References = nil
			b.in.Policy = signed(policy.Bundle{References: []policy.Reference{{Values: image.Reference("sekisho", "1")}}})
		}, attest.StatusAffirming, attest.ReasonNone, 0},
		{"unsigned values beside a policy count for nothing", func(b *bench) {
			b.in.Policy = signed(policy.Bundle{References: []policy.Reference{{Values: logtest.Image{Kernel: "2"}.Reference("sekisho", "2")}}})
		}, attest.StatusContraindicated, attest.ReasonImageUnknown, 4},
		{"image whose time has ended", func(b *bench) {
			b.in.References = nil
			b.in.Policy = signed(policy.Bundle{References: []policy.Reference{{Values: image.Reference("sekisho", "1"), Until: start.Unix()}}})
		}, attest.StatusContraindicated, attest.ReasonNoReferenceValues, 1},
		{"a fact that the log does not say", func(b *bench) {
			b.in.Policy = signed(policy.Bundle{Rules: []policy.Rule{{ID: "dbx", Fact: policy.FactDBX, Op: policy.OpContains, Values: []string{"00"}}}})
		}, attest.StatusContraindicated, attest.ReasonPolicyRule, 1},
		{"clock not safe, again", func(b *bench) {
			b.tpm.Clock.Safe = false
			b.sign()
			c := Appraise(b.in).Clock
			c.Clock += 1 << 20
			b.in.Device.Clock, b.in.Device.Retried = &c, true
		}, attest.StatusWarning, attest.ReasonClockUnsafe, 1},
	} {
		b := newBench(t)
		c.change(b)
		out := Appraise(b.in)
		r := out.Result
		if r.Status != c.status || r.Reason != c.reason || len(r.Findings) != c.found {
			t.Errorf("%s: %v %v %v", c.name, r.Status, r.Reason, r.Findings)
		}
		if (out.Key != nil) != (c.status == attest.StatusAffirming) {
			t.Errorf("%s: what it entitles to: %v", c.name, out.Key)
		}
		for _, f := range r.Findings {
			if f.Sentence.JA == "" || f.Sentence.EN == "" || f.Action.JA == "" || f.Action.EN == "" {
				t.Errorf("%s: finding without words: %+v", c.name, f)
			}
		}
	}
}

func TestShadow(t *testing.T) {
	b := newBench(t)
	b.in.Shadow = signed(policy.Bundle{Rules: []policy.Rule{{ID: "r", Fact: policy.FactImage, Op: policy.OpEqual, Values: []string{"sekisho 2"}}}})
	out := Appraise(b.in)
	if out.Result.Status != attest.StatusAffirming || out.Key == nil {
		t.Fatalf("a shadow was enforced: %+v", out.Result)
	}
	if s := out.Result.Shadow; s == nil || s.Status != attest.StatusContraindicated || s.Reason != attest.ReasonPolicyRule || len(s.Findings) != 1 {
		t.Errorf("shadow: %+v", s)
	}
	b.in.Shadow = signed(policy.Bundle{})
	if s := Appraise(b.in).Result.Shadow; s != nil {
		t.Errorf("a shadow that says the same: %+v", s)
	}
}

func TestChangesSinceLastGood(t *testing.T) {
	b := newBench(t)
	b.in.LastGood = image.Boot().Bytes()
	if r := Appraise(b.in).Result; len(r.Changes) != 0 || r.LastGood != nil {
		t.Errorf("changes of a good boot: %+v", r)
	}
	evil := image
	evil.Kernel = "evil"
	b.tpm.PCRs, b.in.Evidence.EventLog = evil.Boot().PCRs(), evil.Boot().Bytes()
	b.sign()
	r := Appraise(b.in).Result
	if r.LastGood == nil || *r.LastGood != sha256.Sum256(b.in.LastGood) || len(r.Changes) != 2 {
		t.Fatalf("changes: %+v", r.Changes)
	}
	good, bad := sha256.Sum256([]byte(image.Kernel)), sha256.Sum256([]byte("evil"))
	if c := r.Changes[1]; c.PCR != 11 || c.Event != ".linux" || c.Was != hex.EncodeToString(good[:]) || c.Is != hex.EncodeToString(bad[:]) || c.Number == 0 {
		t.Errorf("change of the kernel: %+v", c)
	}
	if r.Findings[0].Number != r.Changes[1].Number {
		t.Errorf("event of the finding: %+v", r.Findings[0])
	}
}
