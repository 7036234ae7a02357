package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/attest/eventlog/logtest"
	"sekisho/attest/policy"
	"sekisho/attest/report"
	"sekisho/attest/tpm"
	"sekisho/attest/tpm/faketpm"
	"sekisho/attest/verifier"
)

// writeReport writes the report of a device that booted boot where good is
// accepted, and returns the device.
func writeReport(t *testing.T, file string, key *ecdsa.PrivateKey, boot, good logtest.Image) *faketpm.TPM {
	t.Helper()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	d := faketpm.New()
	d.PCRs = boot.Boot().PCRs()
	who := d.Identity()
	endorsement, err := tpm.ParsePublic(who.EK)
	check(err)
	id := attest.DeviceID(endorsement.Name())
	credential, err := tpm.ParsePublic(who.Key)
	check(err)
	spki, err := credential.SPKI()
	check(err)
	e := &attest.Evidence{
		Profile: attest.Profile, Device: id[:], Verifier: "v.test", Purpose: attest.PurposeNetwork, Nonce: make([]byte, 64),
		EventLog: boot.Boot().Bytes(), Key: credential.Bytes, PCRs: make(map[int][]byte),
	}
	extra, err := attest.Binding{Nonce: e.Nonce, Device: id, Verifier: e.Verifier, Purpose: e.Purpose, Key: sha256.Sum256(spki), EventLog: sha256.Sum256(e.EventLog)}.Digest()
	check(err)
	p, err := d.Attest(extra)
	check(err)
	e.Quote, e.QuoteSig, e.Certify, e.CertifySig = p.Quote, p.QuoteSig, p.Certify, p.CertifySig
	for i, v := range p.PCRs {
		e.PCRs[i] = v[:]
	}
	in := verifier.Input{
		Evidence: e, Device: &verifier.Device{ID: id, AK: who.AK}, References: []attest.ReferenceValues{good.Reference("sekisho", "1")},
		Verifier: e.Verifier, Now: time.Unix(1_800_000_000, 0), LastGood: good.Boot().Bytes(),
	}
	encoded, err := in.Evidence.Encode()
	if err != nil {
		t.Fatal(err)
	}
	data, _, err := report.Make(encoded, in, verifier.Appraise(in), report.Record{ID: id[:], EK: who.EK, AK: who.AK}, "Test City", time.Minute, key)
	check(err)
	check(os.WriteFile(file, data, 0o600))
	return d
}

func TestReportCommands(t *testing.T) {
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	for _, k := range []string{"verifier", "other"} {
		if _, err := policyKeygen(context.Background(), &options{}, []string{in(k)}); err != nil {
			t.Fatal(err)
		}
	}
	key, err := privateKey(in("verifier.key"))
	if err != nil {
		t.Fatal(err)
	}
	image := logtest.Image{Kernel: "kernel", Initramfs: "initramfs", Cmdline: "quiet"}
	evil := image
	evil.Kernel = "evil"
	writeReport(t, in("good"), key, image, image)
	writeReport(t, in("bad"), key, evil, image)
	if err := os.WriteFile(in("rubbish"), []byte("rubbish"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		exit int
		want string // in the output
	}{
		{[]string{"verify", "good", "-key", "verifier.pub"}, 0, "the same bytes"},
		{[]string{"verify", "-key", "verifier.pub", "bad"}, 1, "image-mismatch: kernel"},
		{[]string{"verify", "good"}, 0, "NOT VERIFIED"},
		{[]string{"verify", "good", "-lang", "ja"}, 0, "同じバイト列"},
		{[]string{"verify", "bad", "-lang", "ja"}, 1, "承認された値と異なります"},
		{[]string{"verify", "good", "-policy-keys", "other.pub"}, 2, "follows no signed policy"},
		{[]string{"verify", "good", "-ek-roots", "absent"}, 2, "no such file"},
		{[]string{"verify", "good", "-key", "other.pub"}, 2, "not signed by the key"},
		{[]string{"verify", "rubbish"}, 2, "report"},
		{[]string{"verify", "absent"}, 2, "no such file"},
		{[]string{"verify"}, 2, "usage"},
		{[]string{"explain", "bad"}, 1, "host domain's image differs"},
		{[]string{"explain", "bad", "-lang", "ja"}, 1, "承認された値と異なります"},
		{[]string{"explain", "bad", "-lang", "ja"}, 1, "前回の正常な起動との違い"},
		{[]string{"explain", "good", "-lang", "ja"}, 0, "承認された状態で起動しました"},
		{[]string{"explain", "good", "-lang", "fr"}, 2, "usage"},
		{[]string{"diff", "good", "bad"}, 1, ".linux"},
		{[]string{"diff", "good", "good"}, 0, "no difference"},
		{[]string{"diff", "good", "rubbish"}, 2, "rubbish"},
	} {
		args := append([]string(nil), c.args...)
		for i, a := range args {
			if _, err := os.Stat(in(a)); err == nil || a == "absent" {
				args[i] = in(a)
			}
		}
		var out bytes.Buffer
		exit, ok := reports(args, &out, &out)
		if !ok || exit != c.exit || !strings.Contains(out.String(), c.want) {
			t.Errorf("%v: exit %d, want %d and %q:\n%s", c.args, exit, c.exit, c.want, &out)
		}
		if c.exit == 2 || args[0] == "diff" {
			continue
		}
		out.Reset()
		if again, _ := reports(append(args, "-json"), &out, &out); again != c.exit || !json.Valid(out.Bytes()) {
			t.Errorf("%v -json: exit %d:\n%s", c.args, again, &out)
		}
	}
}

// TestPolicyCommands drafts, signs and verifies without a verifier.
func TestPolicyCommands(t *testing.T) {
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	ctx := context.Background()
	values, err := json.Marshal(logtest.Image{Kernel: "k"}.Reference("sekisho", "1"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(in("ref.json"), values, 0o600); err != nil {
		t.Fatal(err)
	}
	run := func(f func(context.Context, *options, []string) (any, error), o options, args ...string) any {
		t.Helper()
		v, err := f(ctx, &o, args)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	for _, k := range []string{"a", "b"} {
		run(policyKeygen, options{}, in(k))
		if info, err := os.Stat(in(k + ".key")); err != nil || info.Mode().Perm() != 0o600 {
			t.Error(info.Mode(), err)
		}
	}
	if _, err := policyKeygen(ctx, &options{}, []string{in("a")}); err == nil {
		t.Error("a key was overwritten")
	}
	with := func(key string) (o options) { o.key = in(key); return o }
	run(policyDraft, options{policy: policyOptions{organization: "Test City", references: in("ref.json")}}, in("p.json"))
	run(policySign, with("a.key"), in("p.json"))
	ring := options{policy: policyOptions{keys: in("a.pub") + "," + in("b.pub")}}
	if _, err := policyVerify(ctx, &ring, []string{in("p.cose")}); err == nil {
		t.Error("one signature of two was enough")
	}
	run(policySign, with("b.key"), in("p.cose"))
	if s := run(policyVerify, ring, in("p.cose")).(signedInfo); s.Version != 1 || s.Signatures != 2 {
		t.Errorf("%+v", s)
	}
	next := options{policy: policyOptions{supersedes: in("p.cose"), notBefore: "2026-12-01T00:00:00Z"}}
	if b := run(policyDraft, next, in("p2.json")).(*policy.Bundle); b.Version != 2 || b.Supersedes == (attest.Digest{}) || len(b.References) != 1 {
		t.Errorf("%+v", b)
	}
	var out bytes.Buffer
	if err := printPolicy(printer{&out, "en"}, run(policyShow, options{}, in("p.cose")).(*policy.Bundle)); err != nil || !strings.Contains(out.String(), "sekisho 1") {
		t.Errorf("%v: %s", err, &out)
	}
}
