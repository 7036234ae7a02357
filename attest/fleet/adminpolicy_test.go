package fleet

import (
	"context"
	"encoding/json"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"

	"sekisho/attest"
	"sekisho/attest/policy"
	"sekisho/attest/report"
)

// TestPolicyAdmin drives policies, reports and counts as attestctl does, over
// the socket.
func TestPolicyAdmin(t *testing.T) {
	b := newBench(t)
	s := b.full(true)
	path := filepath.Join(t.TempDir(), "a")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- ServeAdmin(ctx, path, b.service, slog.New(slog.DiscardHandler)) }()
	defer func() { cancel(); <-done }()
	admin := NewAdmin(path)
	awaitAdmin(t, admin)
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}

	one, digest := s.sign(t, 1, attest.Digest{}, nil, image)
	i, err := admin.Publish(ctx, one, false, false)
	check(err)
	if i.Digest != digest || len(i.Signers) != 2 {
		t.Errorf("published: %+v", i)
	}
	if _, err := admin.Publish(ctx, []byte("rubbish"), false, true); err == nil {
		t.Error("rubbish was published")
	}
	half, err := policy.Sign(&policy.Bundle{Profile: policy.Profile, Organization: org, Version: 2, Supersedes: digest}, nil, s[0])
	check(err)
	if _, err := admin.Publish(ctx, half, false, true); err == nil || !strings.Contains(err.Error(), "not signed by enough: 1 ") {
		t.Errorf("signed by one of two: %v", err)
	}
	values, err := json.Marshal(image2.Reference("sekisho", "2"))
	check(err)
	if _, err := admin.AddReference(ctx, values); err == nil {
		t.Error("unsigned reference values were added beside policy keys")
	}
	d, id := b.enrolled()
	r := b.boot(d, id, image).Result
	list, err := admin.Reports(ctx, id.String())
	check(err)
	if len(list) != 1 || list[0].ID != r.Report || !list[0].Affirming {
		t.Errorf("reports: %+v", list)
	}
	f, err := admin.Report(ctx, r.Report)
	check(err)
	key, err := admin.ReportKey(ctx)
	check(err)
	public, err := policy.ParseKey([]byte(key.PEM))
	check(err)
	if v, err := report.Verify(f.Data, report.Trust{Key: public}); err != nil || v.Key != key.ID {
		t.Errorf("%+v %v", v, err)
	}
	for _, id := range []string{"00", "../registry.json", "%2e%2e"} {
		if _, err := admin.Report(ctx, id); err == nil {
			t.Errorf("report %q", id)
		}
	}
	// A draft that nobody has signed can be simulated, and only that.
	draft, err := json.Marshal(policy.Bundle{Profile: policy.Profile, Organization: org, Version: 2, Supersedes: digest})
	check(err)
	sim, err := admin.Simulate(ctx, draft)
	check(err)
	if sim.Refused != 1 || sim.Verdicts[0].Reason != attest.ReasonNoReferenceValues {
		t.Errorf("%+v", sim)
	}
	if _, err := admin.Publish(ctx, draft, false, true); err == nil {
		t.Error("a draft was published")
	}
	two, _ := s.sign(t, 2, digest, nil, image2)
	if _, err := admin.Publish(ctx, two, false, false); err == nil || !strings.Contains(err.Error(), "1 of 1") {
		t.Errorf("a policy that locks out: %v", err)
	}
	_, err = admin.Publish(ctx, two, true, false)
	check(err)
	status, err := admin.Policies(ctx)
	check(err)
	if p := status.Policies; len(p) != 2 || p[0].State != "in force" || p[1].State != "shadow" {
		t.Errorf("%+v", status)
	}
	check(admin.DropShadow(ctx))
	check(admin.Release(ctx))
	sum, err := admin.Firmware(ctx)
	check(err)
	if len(sum.Firmware) != 1 {
		t.Errorf("%+v", sum)
	}
	sum.Organization = "Other City"
	data, err := json.Marshal(sum)
	check(err)
	check(admin.ImportFirmware(ctx, data))
	if f := b.boot(d, id, image).Result.Firmware; f.Organizations != 1 || f.Devices != 1 {
		t.Errorf("%+v", f)
	}
}
