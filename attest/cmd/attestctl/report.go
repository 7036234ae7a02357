package main

import (
	"crypto/ecdsa"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"slices"
	"time"

	"sekisho/attest"
	"sekisho/attest/ek"
	"sekisho/attest/eventlog"
	"sekisho/attest/policy"
	"sekisho/attest/report"
)

const reportUsage = `usage: attestctl verify REPORT [-key FILE] [-policy-keys A,B [-threshold N]] [-ek-roots PATH|built-in] [-json]
       attestctl explain REPORT [-lang ja|en] [-json]
       attestctl diff A B [-json]          two reports, or two event logs

check reports of a verifier, without a network

  verify   appraise the evidence in the report again: the verdict must come out
           the same, byte for byte. -key is the verifier's public key, by which
           the report must be signed (attestctl report key); without it the
           report is only shown to be consistent. -policy-keys are those who
           must have signed the policy, -ek-roots the TPM makers one of whom
           must have certified the device's endorsement key
  explain  say in words what was found and what to do
  diff     what the boot of B measured that the boot of A did not; A and B are
           reports, or event logs as firmware writes them

exit status: 0 affirming (diff: no difference), 1 not, 2 could not appraise

flags
`

// reportOptions are the flags of the commands that check reports.
type reportOptions struct {
	key, keys, ekRoots, language string
	threshold                    int
	json                         bool
}

// reports runs the command if it is one that checks reports.
func reports(args []string, stdout, stderr io.Writer) (exit int, ok bool) {
	if len(args) == 0 || !slices.Contains([]string{"verify", "explain", "diff"}, args[0]) {
		return 0, false
	}
	var o reportOptions
	f := flag.NewFlagSet("attestctl "+args[0], flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&o.key, "key", "", "verifier's public key or certificate, PEM `file`")
	f.StringVar(&o.keys, "policy-keys", "", "PEM `files`, with commas: who must have signed the policy")
	f.StringVar(&o.ekRoots, "ek-roots", "", "certificates of TPM makers, or \"built-in\": a `path`; the endorsement key must chain to them")
	f.IntVar(&o.threshold, "threshold", 0, "how many of them; all if 0")
	f.StringVar(&o.language, "lang", "", "`language`: ja or en (default: the locale's)")
	f.BoolVar(&o.json, "json", false, "print JSON")
	f.Usage = func() {
		fmt.Fprint(stderr, reportUsage)
		f.PrintDefaults()
	}
	words, err := parse(f, args[1:])
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0, true
	case err != nil:
		return exitNone, true
	}
	want := 1
	if args[0] == "diff" {
		want = 2
	}
	if o.language, err = language(o.language); len(words) != want || err != nil {
		f.Usage()
		return exitNone, true
	}
	if !o.json {
		stdout = harmless{stdout}
	}
	run := map[string]func(*reportOptions, []string, io.Writer) (int, error){"verify": verifyReport, "explain": explainReport, "diff": diffReports}[args[0]]
	if exit, err = run(&o, words, stdout); err != nil {
		fmt.Fprintln(stderr, "attestctl:", err)
		if exit == exitPass {
			exit = exitNone
		}
	}
	return exit, true
}

// check verifies one report. A report that holds another verdict than its
// evidence gives is not affirming, and that is said.
func (o *reportOptions) check(name string) (*report.Verdict, error) {
	data, err := readAtMost(name, report.MaxReport)
	if err != nil {
		return nil, err
	}
	var key *ecdsa.PublicKey
	if o.key != "" {
		pem, err := readAtMost(o.key, 16<<10)
		if err != nil {
			return nil, err
		}
		if key, err = policy.ParseKey(pem); err != nil {
			return nil, fmt.Errorf("%s: %w", o.key, err)
		}
	}
	var ring *policy.Keyring
	if o.keys != "" {
		if ring, err = (&options{policy: policyOptions{keys: o.keys, threshold: o.threshold}}).ring(); err != nil {
			return nil, err
		}
	}
	makers, err := o.makers()
	if err != nil {
		return nil, err
	}
	return report.Verify(data, report.Trust{Key: key, Policy: ring, EK: makers})
}

// makers reads -ek-roots, nil if it is not given.
func (o *reportOptions) makers() (*ek.Roots, error) {
	switch o.ekRoots {
	case "":
		return nil, nil
	case "built-in":
		return ek.BuiltIn()
	}
	return readRoots(o.ekRoots, func(error) {})
}

// verdictExit is the exit status of a verdict.
func verdictExit(v *report.Verdict) int {
	if v.Same && v.Appraisal.Status == attest.StatusAffirming {
		return exitPass
	}
	return exitRefuse
}

func verifyReport(o *reportOptions, args []string, w io.Writer) (int, error) {
	v, err := o.check(args[0])
	if v == nil {
		return exitNone, err
	}
	if o.json {
		return verdictExit(v), errors.Join(err, writeJSON(w, v))
	}
	a, p := v.Appraisal, printer{w, o.language}
	p.say("判定       %s\n端末       %s\n時刻       %s\n検証       %s（%s）", "verdict    %s\ndevice     %s\ntime       %s\nverifier   %s of %s",
		a.Status, v.Device, p.when(time.Unix(v.Claims.IssuedAt, 0)), v.Claims.Issuer, v.Claims.Audience)
	if a.Image != "" {
		p.say("イメージ   %s", "image      %s", a.Image)
	}
	if a.Reason != attest.ReasonNone {
		p.say("理由       %[1]s: %[3]s（%[2]s）", "reason     %[1]s: %[2]s", a.Reason, a.Detail, a.Reason.Words().Sentence.JA)
	}
	if v.Trusted {
		p.say("署名       検証済み、鍵 %s", "signature  verified, key %s", v.Key)
	} else {
		p.say("署名       未検証、鍵 %s の名による署名。検証サーバーの鍵を -key で指定してください。", "signature  NOT VERIFIED, in the name of key %s; give the verifier's key with -key", v.Key)
	}
	ja := map[string]string{"none": "なし", "unverified": "未検証", "verified": "検証済み"}
	p.say("TPM製造元  %[1]s\nポリシー   %[2]s", "TPM maker  %[3]s\npolicy     %[4]s", ja[v.EK], ja[v.Policy], v.EK, v.Policy)
	for _, id := range a.Policies {
		fmt.Fprintf(w, "           %s\n", id)
	}
	if v.Same {
		p.say("再判定     同じバイト列になりました", "appraised  again: the same bytes")
	} else {
		p.say("再判定     別の判定になりました：%s", "appraised  again: ANOTHER VERDICT: %s", v.Different)
	}
	return verdictExit(v), err
}

func explainReport(o *reportOptions, args []string, w io.Writer) (int, error) {
	v, err := o.check(args[0])
	if v == nil {
		return exitNone, err
	}
	a := v.Appraisal
	if o.json {
		return verdictExit(v), errors.Join(err, writeJSON(w, a))
	}
	say := func(ja, en string) string { return attest.Text{JA: ja, EN: en}.In(o.language) }
	if a.Status == attest.StatusAffirming {
		fmt.Fprintln(w, say("この端末は承認された状態で起動しました。", "The device booted in an approved state."))
	} else {
		fmt.Fprintln(w, say("この端末は承認されませんでした。", "The device was not affirmed."))
	}
	for i, f := range a.Findings {
		f = f.Explained()
		fmt.Fprintf(w, "\n%d. %s\n   %s: %s (%s)\n", i+1, f.Sentence.In(o.language), say("コード", "code"), f.Reason, f.Severity)
		if f.Component != "" || f.PCR != 0 {
			fmt.Fprintf(w, "   %s: PCR %d", say("場所", "where"), f.PCR)
			for _, s := range []string{f.Component, f.Event} {
				if s != "" {
					fmt.Fprintf(w, ", %s", s)
				}
			}
			if f.Number != 0 {
				fmt.Fprintf(w, ", %s %d", say("イベント", "event"), f.Number)
			}
			fmt.Fprintln(w)
		}
		if f.Expected != "" {
			fmt.Fprintf(w, "   %s: %s\n", say("期待値", "expected"), f.Expected)
		}
		if f.Seen != "" {
			fmt.Fprintf(w, "   %s: %s\n", say("実際", "seen"), f.Seen)
		}
		fmt.Fprintf(w, "   → %s\n", f.Action.In(o.language))
	}
	for _, e := range a.Events {
		fmt.Fprintf(w, "\n%s: %s\n", say("起動後のイベント", "run-time event"), e)
	}
	if len(a.Changes) > 0 {
		fmt.Fprintf(w, "\n%s\n", say("前回の正常な起動との違い:", "since the last good boot:"))
		printChanges(printer{w, o.language}, a.Changes)
	}
	if f := a.Firmware; f != nil {
		fmt.Fprintf(w, "\n%s %s: %s\n", say("ファームウェア", "firmware"), f.Version,
			say(fmt.Sprintf("同じ機種（%[3]q）では、ほかに %[1]d 団体の %[2]d 台で確認されています", f.Organizations, f.Devices, f.Model), fmt.Sprintf("seen on %d other devices of %d organisations, of the same model (%q)", f.Devices, f.Organizations, f.Model)))
	}
	if s := a.Shadow; s != nil {
		fmt.Fprintf(w, "\n%s %s: %s %s %s\n", say("試行中のポリシー", "shadow policy"), s.Policy, s.Status, s.Reason, s.Detail)
	}
	return verdictExit(v), err
}

func printChanges(w printer, list []attest.Change) {
	for _, c := range list {
		mark := "~"
		switch {
		case c.Was == "":
			mark = "+"
		case c.Is == "":
			mark = "-"
		}
		w.say("  %s PCR %-2d イベント %-3d %s %s", "  %s PCR %-2d event %-3d %s %s", mark, c.PCR, c.Number, eventlog.TypeName(c.Type), c.Event)
		if c.Was != "" {
			w.say("      前 %s", "      was %s", c.Was)
		}
		if c.Is != "" {
			w.say("      今 %s", "      is  %s", c.Is)
		}
	}
}

func diffReports(o *reportOptions, args []string, w io.Writer) (int, error) {
	var logs [2][]byte
	for i, name := range args {
		data, err := readAtMost(name, report.MaxReport)
		if err != nil {
			return exitNone, err
		}
		if !report.Is(data) {
			logs[i] = data
			continue
		}
		if _, err := o.check(name); err != nil {
			return exitNone, fmt.Errorf("%s: %w", name, err)
		}
		r, _, err := report.Parse(data, nil)
		if err != nil {
			return exitNone, fmt.Errorf("%s: %w", name, err)
		}
		e, err := attest.ParseEvidence(r.Evidence.Value)
		if err != nil {
			return exitNone, fmt.Errorf("%s: %w", name, err)
		}
		logs[i] = e.EventLog
	}
	changes, err := diffLogs(args, logs)
	if err != nil {
		return exitNone, err
	}
	exit := exitPass
	if len(changes) > 0 {
		exit = exitRefuse
	}
	if o.json {
		return exit, writeJSON(w, changes)
	}
	if len(changes) == 0 {
		printer{w, o.language}.say("違いはありません。", "no difference")
	}
	printChanges(printer{w, o.language}, changes)
	return exit, nil
}

// diffLogs compares two event logs in the best bank that both have.
func diffLogs(names []string, data [2][]byte) ([]attest.Change, error) {
	var logs [2]*eventlog.Log
	for i := range data {
		var err error
		if logs[i], err = eventlog.Read(data[i]); err != nil {
			return nil, fmt.Errorf("%s: %w", names[i], err)
		}
	}
	for _, b := range logs[0].Banks() {
		if slices.Contains(logs[1].Banks(), b) {
			return append([]attest.Change{}, logs[0].Diff(logs[1], b)...), nil
		}
	}
	return nil, fmt.Errorf("no bank that both logs have: %v and %v", logs[0].Banks(), logs[1].Banks())
}

func writeJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}
