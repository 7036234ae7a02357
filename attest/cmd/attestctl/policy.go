package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"sekisho/attest"
	"sekisho/attest/fleet"
	"sekisho/attest/policy"
	"sekisho/attest/report"
)

// policyOptions are the flags of the commands about policies and reports.
type policyOptions struct {
	keys, out, organization, references, supersedes, notBefore string
	threshold                                                  int
	shadow, force                                              bool
}

func (p *policyOptions) flags(f *flag.FlagSet) {
	f.StringVar(&p.keys, "keys", "", "public key `files`, with commas")
	f.StringVar(&p.out, "out", "", "`file` to write")
	f.StringVar(&p.organization, "organization", "", "organisation of a policy")
	f.StringVar(&p.references, "references", "", "reference values of images, JSON `files` with commas")
	f.StringVar(&p.supersedes, "supersedes", "", "signed policy `file` that the draft begins with and follows")
	f.StringVar(&p.notBefore, "not-before", "", "`time` from which a policy is in force, such as 2026-12-01T00:00:00Z")
	f.IntVar(&p.threshold, "threshold", 0, "how many keys must sign; all if 0")
	f.BoolVar(&p.shadow, "shadow", false, "evaluate the policy, do not enforce it")
	f.BoolVar(&p.force, "force", false, "publish whatever the simulation says")
}

func policyCommands() map[string]command {
	return map[string]command{
		"policy keygen":   {1, policyKeygen, show(printKey)},
		"policy draft":    {1, policyDraft, show(printPolicy)},
		"policy sign":     {1, policySign, show(printSignedPolicy)},
		"policy verify":   {1, policyVerify, show(printSignedPolicy)},
		"policy show":     {1, policyShow, show(printPolicy)},
		"policy publish":  {1, policyPublish, show(printPublished)},
		"policy simulate": {1, policySimulate, show(printSimulation)},
		"policy status":   {0, policyStatus, show(printPolicyStatus)},
		"policy release":  {0, policyRelease, show(printNothing)},
		"policy unshadow": {0, policyUnshadow, show(printNothing)},
		"report list":     {1, reportList, show(printReports)},
		"report get":      {1, reportGet, show(printReportFile)},
		"report key":      {0, reportKey, show(printReportKey)},
		"firmware export": {0, firmwareExport, show(printFirmware)},
		"firmware import": {1, firmwareImport, show(printNothing)},
	}
}

// keyInfo is a policy key that was made.
type keyInfo struct {
	ID      attest.Digest `json:"id"`
	Private string        `json:"private"` // file, mode 0600: keep it offline
	Public  string        `json:"public"`  // file, for policy_keys
}

func policyKeygen(_ context.Context, _ *options, args []string) (any, error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	private, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return nil, err
	}
	public, err := x509.MarshalPKIXPublicKey(&k.PublicKey)
	if err != nil {
		return nil, err
	}
	i := keyInfo{Private: args[0] + ".key", Public: args[0] + ".pub"}
	if i.ID, err = policy.KeyID(&k.PublicKey); err != nil {
		return nil, err
	}
	return i, errors.Join(
		create(i.Private, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), 0o600),
		create(i.Public, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public}), 0o644))
}

// create writes a new file: a key is never overwritten.
func create(name string, data []byte, mode os.FileMode) error {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Close())
}

func printKey(w printer, i keyInfo) error {
	return w.say("鍵      %s\n秘密鍵  %s（オフラインで保管してください）\n公開鍵  %s（検証サーバーの policy_keys）", "key      %s\nprivate  %s (keep it offline)\npublic   %s (policy_keys of the verifier)", i.ID, i.Private, i.Public)
}

// policyDraft writes a policy in JSON from the reference values of releases.
func policyDraft(_ context.Context, o *options, args []string) (any, error) {
	b := policy.Bundle{Profile: policy.Profile, Organization: o.policy.organization, Version: 1}
	if o.policy.supersedes != "" {
		data, err := readAtMost(o.policy.supersedes, policy.MaxBundle)
		if err != nil {
			return nil, err
		}
		old, err := policy.Read(data)
		if err != nil {
			return nil, err
		}
		b = *old.Bundle
		b.Version, b.Supersedes = b.Version+1, old.ID.Digest
	}
	if o.policy.notBefore != "" {
		t, err := time.Parse(time.RFC3339, o.policy.notBefore)
		if err != nil {
			return nil, fmt.Errorf("-not-before: %w", err)
		}
		b.NotBefore = t.Unix()
	}
	for name := range strings.SplitSeq(o.policy.references, ",") {
		if name == "" {
			continue
		}
		data, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		v, err := attest.ParseReferenceValues(data)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		b.References = append(b.References, policy.Reference{Values: *v})
	}
	data, err := json.MarshalIndent(b, "", "  ")
	if err != nil {
		return nil, err
	}
	if _, err := policy.Parse(data); err != nil {
		return nil, err
	}
	return &b, os.WriteFile(args[0], append(data, '\n'), 0o644)
}

// signedInfo is a signed policy.
type signedInfo struct {
	attest.PolicyID
	File       string          `json:"file"`
	Signatures int             `json:"signatures,omitempty"` // of keys that were given
	Signers    []attest.Digest `json:"signers,omitempty"`
}

func policySign(_ context.Context, o *options, args []string) (any, error) {
	if o.key == "" {
		return nil, errUsage
	}
	data, err := readAtMost(args[0], policy.MaxBundle)
	if err != nil {
		return nil, err
	}
	key, err := privateKey(o.key)
	if err != nil {
		return nil, err
	}
	out, old := o.policy.out, data
	var b *policy.Bundle
	if len(data) > 0 && bytes.TrimSpace(data)[0] == '{' {
		if b, err = policy.Parse(data); err != nil {
			return nil, err
		}
		old = nil
		if out == "" {
			out = strings.TrimSuffix(args[0], ".json") + ".cose"
		}
	} else if out == "" {
		out = args[0]
	}
	signed, err := policy.Sign(b, old, key)
	if err != nil {
		return nil, err
	}
	s, err := policy.Read(signed)
	if err != nil {
		return nil, err
	}
	return signedInfo{PolicyID: s.ID, File: out}, os.WriteFile(out, signed, 0o644)
}

func privateKey(name string) (*ecdsa.PrivateKey, error) {
	data, err := readAtMost(name, 16<<10)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, fmt.Errorf("%s: no PEM in it", name)
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	ec, ok := k.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%s: %T, want ECDSA on P-256", name, k)
	}
	return ec, nil
}

// ring reads the public keys of -keys.
func (o *options) ring() (*policy.Keyring, error) {
	var keys []*ecdsa.PublicKey
	for name := range strings.SplitSeq(o.policy.keys, ",") {
		data, err := readAtMost(name, 16<<10)
		if err != nil {
			return nil, err
		}
		k, err := policy.ParseKey(data)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		keys = append(keys, k)
	}
	n := o.policy.threshold
	if n == 0 {
		n = len(keys)
	}
	return policy.NewKeyring(n, keys...)
}

func policyVerify(_ context.Context, o *options, args []string) (any, error) {
	if o.policy.keys == "" {
		return nil, errUsage
	}
	ring, err := o.ring()
	if err != nil {
		return nil, err
	}
	data, err := readAtMost(args[0], policy.MaxBundle)
	if err != nil {
		return nil, err
	}
	s, err := ring.Open(data)
	if err != nil {
		return nil, err
	}
	return signedInfo{s.ID, args[0], len(s.Signers), s.Signers}, nil
}

func printSignedPolicy(w printer, s signedInfo) error {
	w.say("%[1]s  %[3]s の第 %[2]d 版  %[4]s", "%[1]s  version %[2]d of %[3]s  %[4]s", s.File, s.Version, s.Organization, s.Digest)
	for _, k := range s.Signers {
		w.say("署名者 %s", "signed by %s", k)
	}
	return nil
}

func policyShow(_ context.Context, _ *options, args []string) (any, error) {
	data, err := readAtMost(args[0], policy.MaxBundle)
	if err != nil {
		return nil, err
	}
	if len(data) > 0 && data[0] == '{' {
		return policy.Parse(data)
	}
	s, err := policy.Read(data)
	if err != nil {
		return nil, err
	}
	return s.Bundle, nil
}

func printPolicy(w printer, b *policy.Bundle) error {
	id, err := b.ID()
	if err != nil {
		return err
	}
	w.say("組織        %s\n版          %d\nダイジェスト %s\n前の版      %s\n効力発生    %s", "organisation  %s\nversion       %d\ndigest        %s\nsupersedes    %s\nin force from %s", b.Organization, b.Version, id.Digest, b.Supersedes, w.from(time.Unix(b.NotBefore, 0)))
	for _, r := range b.References {
		until := attest.Say("期限なし", "no end")
		if r.Until != 0 {
			until = attest.Say("%s まで", "until %s", w.when(time.Unix(r.Until, 0)))
		}
		w.say("イメージ    %s（%s）", "image         %s (%s)", fleet.ReferenceID(r.Values), until.In(w.language))
	}
	for _, r := range b.Rules {
		values := strings.Join(r.Values, ", ")
		if len(r.Values) > 4 {
			values = attest.Say("%d 個の値", "%d values", len(r.Values)).In(w.language)
		}
		w.say("規則 %s（%s）：%s %s %s\n  %s\n  %s", "rule %s (%s): %s %s %s\n  %s\n  %s", r.ID, r.Severity, r.Fact, r.Op, values, r.Why.JA, r.Why.EN)
	}
	return nil
}

// from says since when a policy may be in force.
func (p printer) from(t time.Time) string {
	if t.Unix() <= 0 {
		return attest.Say("公開時", "its publication").In(p.language)
	}
	return p.when(t)
}

// state says where a policy stands; what it is called in JSON is English.
func (p printer) state(s string) string {
	ja := map[string]string{"in force": "有効", "pending": "待機中", "superseded": "旧版", "shadow": "試行中"}[s]
	return attest.Text{JA: ja, EN: s}.In(p.language)
}

func policyPublish(ctx context.Context, o *options, args []string) (any, error) {
	data, err := readAtMost(args[0], policy.MaxBundle)
	if err != nil {
		return nil, err
	}
	return o.admin().Publish(ctx, data, o.policy.shadow, o.policy.force)
}

func printPublished(w printer, i fleet.PolicyInfo) error {
	return w.say("%s：%s、効力発生 %s", "%s: %s, in force from %s", i.PolicyID, w.state(i.State), w.from(i.NotBefore))
}

func policySimulate(ctx context.Context, o *options, args []string) (any, error) {
	data, err := readAtMost(args[0], policy.MaxBundle)
	if err != nil {
		return nil, err
	}
	return o.admin().Simulate(ctx, data)
}

func printSimulation(w printer, s fleet.Simulation) error {
	w.say("ポリシー %s\n端末 %d 台：承認中 %d 台、うち拒否されるもの %d 台、レポートなし %d 台", "policy %s\n%d devices: %d affirmed, %d would be refused that are affirmed now, %d without a report", s.Policy, s.Devices, s.Affirming, s.Refused, s.Unknown)
	for _, v := range s.Verdicts {
		if v.Would == attest.StatusAffirming || v.Was == attest.StatusNone {
			continue
		}
		w.say("%s  現在 %s、適用後 %s：%s: %s", "%s  %s, would be %s: %s: %s", v.Device, v.Was, v.Would, v.Reason, v.Detail)
		last := attest.Text{}
		for _, f := range v.Findings {
			if f = f.Explained(); f.Sentence != last { // one kind of finding, one advice
				fmt.Fprintf(w, "  %s %s\n  → %s\n", f.Severity, f.Sentence.In(w.language), f.Action.In(w.language))
			}
			last = f.Sentence
		}
	}
	return nil
}

func policyStatus(ctx context.Context, o *options, _ []string) (any, error) {
	return o.admin().Policies(ctx)
}

func printPolicyStatus(w printer, s fleet.PolicyStatus) error {
	if !s.Needed {
		w.say("policy_keys がありません。署名のない参照値で判定しています（開発用）。", "no policy_keys: unsigned reference values decide (development)")
	}
	if h := s.Hold; h != nil {
		w.say("%[1]s から保留中：1 分間に %[3]d 台中 %[2]d 台が拒否されました。第 %[4]d 版より後のポリシーは有効になりません。", "HELD since %[1]s: %[2]d of %[3]d devices refused within a minute; no policy after version %[4]d comes into force", w.when(h.Since), h.Refused, h.Devices, h.Version)
		for r, n := range h.Reasons {
			w.say("  %d 台  %s：%s", "  %d devices  %s: %s", n, r, r.Words().Sentence.In(w.language))
		}
		w.say("ヒント：これらの端末のレポートを確認してから attestctl policy release を実行してください。", "hint: look at the reports of these devices, then attestctl policy release")
	}
	t, flush := w.table("", "")
	for _, p := range s.Policies {
		t.say("%d\t%s\t%s から\t規則 %d 個\t%s\t%s", "%d\t%s\tfrom %s\t%d rules\t%s\t%s", p.Version, t.state(p.State), t.from(p.NotBefore), p.Rules, strings.Join(p.References, ", "), p.Digest)
	}
	return flush()
}

func policyRelease(ctx context.Context, o *options, _ []string) (any, error) {
	return struct{}{}, o.admin().Release(ctx)
}

func policyUnshadow(ctx context.Context, o *options, _ []string) (any, error) {
	return struct{}{}, o.admin().DropShadow(ctx)
}

func reportList(ctx context.Context, o *options, args []string) (any, error) {
	return o.admin().Reports(ctx, args[0])
}

func printReports(w printer, list []fleet.ReportInfo) error {
	for _, r := range list {
		verdict := attest.Say("否認", "not affirmed")
		if r.Affirming {
			verdict = attest.Say("承認", "affirming")
		}
		fmt.Fprintf(w, "%s  %s  %s\n", r.ID, w.when(r.Time), verdict.In(w.language))
	}
	return nil
}

// reportFile is a report that was written.
type reportFile struct {
	ID   string `json:"id"`
	File string `json:"file"`
	Size int    `json:"size"` // bytes
}

func reportGet(ctx context.Context, o *options, args []string) (any, error) {
	f, err := o.admin().Report(ctx, args[0])
	if err != nil {
		return nil, err
	}
	out := o.policy.out
	if out == "" {
		out = args[0] + ".cose"
	}
	return reportFile{args[0], out, len(f.Data)}, os.WriteFile(out, f.Data, 0o600)
}

func printReportFile(w printer, f reportFile) error {
	return w.say("%s  %d バイト", "%s  %d bytes", f.File, f.Size)
}

func reportKey(ctx context.Context, o *options, _ []string) (any, error) {
	return o.admin().ReportKey(ctx)
}

func printReportKey(w printer, k fleet.ReportKey) error {
	_, err := io.WriteString(w, k.PEM)
	return err
}

func firmwareExport(ctx context.Context, o *options, _ []string) (any, error) {
	return o.admin().Firmware(ctx)
}

func printFirmware(w printer, s fleet.FirmwareSummary) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(s)
}

func firmwareImport(ctx context.Context, o *options, args []string) (any, error) {
	data, err := readAtMost(args[0], 8<<20)
	if err != nil {
		return nil, err
	}
	return struct{}{}, o.admin().ImportFirmware(ctx, data)
}

// readAtMost reads a file of at most limit bytes.
func readAtMost(name string, limit int64) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, min(limit, report.MaxReport)+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("%s: over %d bytes", name, limit)
	}
	return data, nil
}
