package main

import (
	"fmt"
	"io"
	"strings"

	"sekisho/attest"
	"sekisho/attest/ek"
	"sekisho/attest/eventlog"
	"sekisho/attest/quote"
)

func printLog(w io.Writer, r *eventlog.Report) {
	fmt.Fprintf(w, "verdict\t%s\nsecure boot\t%s\nformat\t%s, %d events, bank %s of %v\n", r.Verdict, r.SecureBoot, r.Format, r.Events, r.Bank, r.Banks)
	for _, p := range r.PCRs {
		state := string(p.State)
		if state == "" {
			state = "no value"
		}
		shown := p.Replayed
		if shown == "" {
			shown = p.Value
		}
		fmt.Fprintf(w, "PCR %d\t%d events\t%s\t%s\n", p.PCR, p.Events, state, shown)
	}
	for _, f := range r.Findings {
		printFinding(w, f.Severity, f.Code, f.Sentence, f.Expected, f.Seen)
	}
}

func printEK(w io.Writer, r *ek.Report) {
	fmt.Fprintf(w, "verdict\t%s\nkind\t%s\nkey\t%s\n", r.Verdict, r.Kind, r.KeyType)
	if r.Header || r.Rest > 0 {
		fmt.Fprintf(w, "form\tTCG header %t, %d bytes behind the certificate\n", r.Header, r.Rest)
	}
	for i, l := range r.Chain {
		fmt.Fprintf(w, "chain %d\t%s\n\tsha256 %s\n", i, subject(l), l.Fingerprint)
	}
	for _, f := range r.Findings {
		printFinding(w, f.Severity, f.Code, f.Sentence, "", "")
	}
}

// subject is what a certificate is called; those of TPMs often have no name.
func subject(l ek.Link) string {
	if l.Subject == "" {
		return "(no name) by " + l.Issuer
	}
	return l.Subject
}

func printQuote(w io.Writer, r *quote.Report) {
	fmt.Fprintf(w, "verdict\t%s\n", r.Verdict)
	if r.Scheme != "" {
		fmt.Fprintf(w, "signature\t%s, %s\n", r.Scheme, r.Hash)
	}
	for _, s := range r.Selection {
		fmt.Fprintf(w, "covers\t%s %v\n", s.Bank, s.PCRs)
	}
	if r.Clock != nil {
		fmt.Fprintf(w, "extra data\t%s\nclock\t%d ms, %d resets, %d restarts\nTPM firmware\t%s\n", r.ExtraData, r.Clock.Clock, r.Clock.ResetCount, r.Clock.RestartCount, r.Firmware)
	}
	for _, f := range r.Findings {
		printFinding(w, f.Severity, f.Code, f.Sentence, f.Expected, f.Seen)
	}
	if r.Log != nil {
		fmt.Fprintln(w, "\nevent log")
		printLog(w, r.Log)
	}
}

// printFinding prints a finding; what it says may come from a hostile file.
func printFinding(w io.Writer, s attest.Severity, code attest.Reason, sentence, expected, seen string) {
	fmt.Fprintf(w, "%s\t%s: %s\n", s, code, strings.Map(printable, sentence))
	if expected != "" || seen != "" {
		fmt.Fprintf(w, "\texpected %s\n\tseen     %s\n", expected, seen)
	}
}

func printable(r rune) rune {
	if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 {
		return '?'
	}
	return r
}
