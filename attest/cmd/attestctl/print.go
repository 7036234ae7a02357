package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"sekisho/attest"
	"sekisho/attest/ek"
	"sekisho/attest/eventlog"
	"sekisho/attest/quote"
)

// language is what -lang says or, without it, what the locale does (POSIX,
// XBD, section 8.2).
func language(flag string) (string, error) {
	switch flag {
	case "ja", "en":
		return flag, nil
	case "":
	default:
		return "", fmt.Errorf("%w: -lang %.16q: want ja or en", errUsage, flag)
	}
	for _, name := range []string{"LC_ALL", "LC_MESSAGES", "LANG"} {
		if v := os.Getenv(name); v != "" {
			if strings.HasPrefix(v, "ja") {
				return "ja", nil
			}
			break
		}
	}
	return "en", nil
}

// printer writes reports on samples in one language.
type printer struct {
	io.Writer
	language string
}

// say writes a line in the printer's language. No text among a breaks it.
func (p printer) say(ja, en string, a ...any) error {
	for i := range a {
		a[i] = inLine(a[i])
	}
	_, err := fmt.Fprintln(p, attest.Say(ja, en, a...).In(p.language))
	return err
}

// table is p with columns, which flush writes, under these headings if any.
func (p printer) table(ja, en string) (t printer, flush func() error) {
	w := tabwriter.NewWriter(p.Writer, 0, 0, 2, ' ', 0)
	t = printer{w, p.language}
	if en != "" {
		fmt.Fprintln(t, attest.Text{JA: ja, EN: en}.In(p.language))
	}
	return t, w.Flush
}

// row writes a line of a table.
func (p printer) row(cells ...any) {
	for i := range cells {
		cells[i] = fmt.Sprint(inLine(cells[i]))
	}
	fmt.Fprintf(p, strings.Repeat("%s\t", len(cells)-1)+"%s\n", cells...)
}

// inLine is a text without what would end its line or column: some of what is
// shown comes from devices and files of others.
func inLine(v any) any {
	switch v := v.(type) {
	case string:
		return strings.Map(printable, v)
	case fmt.Stringer:
		return strings.Map(printable, v.String())
	}
	return v
}

// when is a time, if there was one.
func (p printer) when(t time.Time) string {
	if t.IsZero() || t.Unix() == 0 {
		return attest.Say("なし", "never").In(p.language)
	}
	return t.UTC().Format(time.RFC3339)
}

// harmless writes text without what a terminal obeys.
type harmless struct{ io.Writer }

func (h harmless) Write(b []byte) (int, error) {
	clean := strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' {
			return r
		}
		return printable(r)
	}, string(b))
	if _, err := io.WriteString(h.Writer, clean); err != nil {
		return 0, err
	}
	return len(b), nil
}

// verdict writes a verdict.
func (p printer) verdict(v string) {
	ja := map[string]string{"pass": "合格", "refuse": "拒否"}[v]
	p.say("判定\t%[1]s（%[2]s）", "verdict\t%[2]s", ja, v)
}

func (p printer) log(r *eventlog.Report) {
	p.verdict(r.Verdict.String())
	p.say("セキュアブート\t%s", "secure boot\t%s", r.SecureBoot)
	p.say("形式\t%s、イベント %d 個、バンク %s（%v のうち）", "format\t%s, %d events, bank %s of %v", r.Format, r.Events, r.Bank, r.Banks)
	states := map[eventlog.State]attest.Text{
		eventlog.StateUnjudged: {JA: "値なし", EN: "no value"}, eventlog.StateReset: {JA: "初期値", EN: "reset"},
		eventlog.StateMatch: {JA: "一致", EN: "match"}, eventlog.StateMismatch: {JA: "不一致", EN: "mismatch"},
		eventlog.StateMissing: {JA: "イベント欠落", EN: "missing"}, eventlog.StateUserSpace: {JA: "起動後に拡張", EN: "userspace"},
	}
	for _, x := range r.PCRs {
		shown := x.Replayed
		if shown == "" {
			shown = x.Value
		}
		p.say("PCR %d\tイベント %d 個\t%s\t%s", "PCR %d\t%d events\t%s\t%s", x.PCR, x.Events, states[x.State].In(p.language), shown)
	}
	p.findings(r.Findings)
}

func (p printer) ek(r *ek.Report) {
	p.verdict(r.Verdict)
	p.say("種類\t%s", "kind\t%s", r.Kind)
	p.say("鍵\t%s", "key\t%s", r.KeyType)
	if r.Header || r.Rest > 0 {
		p.say("形式\tTCG ヘッダー %t、証明書の後に %d バイト", "form\tTCG header %t, %d bytes behind the certificate", r.Header, r.Rest)
	}
	if i := r.Instance; i != nil {
		p.row("GCE", fmt.Sprintf("%s (%s), %s, %s (%s)", i.Name, i.ID, i.Zone, i.ProjectID, i.ProjectNumber))
	}
	for i, l := range r.Chain {
		p.say("チェーン %d\t%s\n\tsha256 %s", "chain %d\t%s\n\tsha256 %s", i, subject(l), l.Fingerprint)
	}
	p.findings(r.Findings)
}

// subject is what a certificate is called; those of TPMs often have no name.
func subject(l ek.Link) string {
	if l.Subject == "" {
		return "(no name) by " + l.Issuer
	}
	return l.Subject
}

func (p printer) quote(r *quote.Report) {
	p.verdict(r.Verdict.String())
	if r.Scheme != "" {
		p.say("署名\t%s、%s", "signature\t%s, %s", r.Scheme, r.Hash)
	}
	for _, s := range r.Selection {
		p.say("対象\t%s %v", "covers\t%s %v", s.Bank, s.PCRs)
	}
	if r.Clock != nil {
		p.say("追加データ\t%s", "extra data\t%s", r.ExtraData)
		p.say("時計\t%d ms、リセット %d 回、再開 %d 回", "clock\t%d ms, %d resets, %d restarts", r.Clock.Clock, r.Clock.ResetCount, r.Clock.RestartCount)
		p.say("TPM ファームウェア\t%s", "TPM firmware\t%s", r.Firmware)
	}
	p.findings(r.Findings)
	if r.Log != nil {
		p.say("\nイベントログ", "\nevent log")
		p.log(r.Log)
	}
}

// embedded prints the judgement of a quote that stands in a log.
func (p printer) embedded(r *quote.Report) {
	if r != nil {
		p.say("\nログの中のクォート", "\nquote in the log")
		p.quote(r)
	}
}

// findings prints remarks; what they say may come from a hostile file.
func (p printer) findings(list []attest.Remark) {
	severities := map[attest.Severity]string{attest.SeverityBlock: "拒否", attest.SeverityDegrade: "格下げ", attest.SeverityWarn: "注意"}
	for _, f := range list {
		where := ""
		if f.PCR != nil {
			where = fmt.Sprintf(" PCR %d", *f.PCR)
		}
		p.say("%[1]s\t%[3]s%[4]s: %[5]s", "%[2]s\t%[3]s%[4]s: %[5]s", severities[f.Severity], f.Severity, f.Code, where, f.Sentence.In(p.language))
		if f.Expected != "" || f.Seen != "" {
			p.say("\t期待値 %s\n\t実際　 %s", "\texpected %s\n\tseen     %s", f.Expected, f.Seen)
		}
		fmt.Fprintf(p, "\t→ %s\n", f.Action.In(p.language))
	}
}

func printable(r rune) rune {
	if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 {
		return '?'
	}
	return r
}
