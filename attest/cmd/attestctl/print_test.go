package main

import (
	"bytes"
	"strings"
	"testing"
	"time"
	"unicode"

	"sekisho/attest"
	"sekisho/attest/eventlog/logtest"
	"sekisho/attest/fleet"
	"sekisho/attest/policy"
	"sekisho/attest/seal"
	"sekisho/attest/store"
)

// TestLanguages prints what the verifier's keepers see in both languages, with
// texts of others that try to write lines and columns of their own.
func TestLanguages(t *testing.T) {
	const evil = "x\x1b[2J\ny\tz\u009b"
	now := time.Date(2026, 11, 22, 0, 0, 0, 0, time.UTC)
	finding := attest.Finding{Reason: attest.ReasonImageMismatch, Event: evil, Sentence: attest.Say("文", "sentence")}
	for name, print := range map[string]func(printer) error{
		"devices": func(p printer) error { return printDevices(p, []fleet.Device{{Image: evil}}) },
		"device":  func(p printer) error { return printDevice(p, fleet.Device{Image: evil, TicketID: evil}) },
		"result": func(p printer) error {
			return printResult(p, attest.Result{Image: evil, Detail: evil, Reason: attest.ReasonImageMismatch, Findings: []attest.Finding{finding}})
		},
		"references": func(p printer) error { return printReferences(p, []fleet.Reference{{ID: evil, Source: evil}}) },
		"tickets":    func(p printer) error { return printTickets(p, []fleet.Ticket{{ID: evil, Expires: now}}) },
		"history":    func(p printer) error { return printFormer(p, []fleet.Former{{Reason: evil}}) },
		"backup":     func(p printer) error { return printBackup(p, store.Backup{Time: now}) },
		"permits": func(p printer) error {
			return printPermits(p, []fleet.Permit{{PermitRequest: fleet.PermitRequest{Reason: evil}}})
		},
		"added":    func(p printer) error { return printAdded(p, fleet.PurchaseResponse{Added: 1}) },
		"purchase": func(p printer) error { return printPurchase(p, map[attest.Digest]fleet.Purchase{{}: {Source: evil}}) },
		"key":      func(p printer) error { return printKey(p, keyInfo{Private: evil}) },
		"signed":   func(p printer) error { return printSignedPolicy(p, signedInfo{File: evil}) },
		"policy": func(p printer) error {
			return printPolicy(p, &policy.Bundle{Profile: policy.Profile, Organization: "City", Version: 1, References: []policy.Reference{{Values: logtest.Image{Kernel: "k"}.Reference("sekisho", "1")}}})
		},
		"published": func(p printer) error { return printPublished(p, fleet.PolicyInfo{State: "in force"}) },
		"simulation": func(p printer) error {
			return printSimulation(p, fleet.Simulation{Verdicts: []fleet.Verdict{{Was: attest.StatusAffirming, Detail: evil, Findings: []attest.Finding{finding}}}})
		},
		"status": func(p printer) error {
			return printPolicyStatus(p, fleet.PolicyStatus{Hold: &fleet.Hold{Since: now, Reasons: map[attest.Reason]int{attest.ReasonImageMismatch: 1}}, Policies: []fleet.PolicyInfo{{State: "pending", References: []string{evil}}}})
		},
		"reports": func(p printer) error { return printReports(p, []fleet.ReportInfo{{ID: "id", Time: now}}) },
		"file":    func(p printer) error { return printReportFile(p, reportFile{File: evil}) },
		"release": func(p printer) error { return explainRelease(p, &seal.Release{Image: evil}) },
		"recoveries": func(p printer) error {
			return printRecoveries(p, []fleet.Recovery{{RecoveryRequest: seal.RecoveryRequest{Reason: evil}}})
		},
		"card": func(p printer) error { return printCard(p, &cardReport{Verdict: "pass", Subject: evil}) },
		"permit": func(p printer) error {
			return printCardPermit(p, fleet.CardPermit{Permit: attest.CardPermit{User: evil}})
		},
		"card state": func(p printer) error {
			return printCardState(p, fleet.Card{Permits: []fleet.CardPermit{{Permit: attest.CardPermit{User: evil}}}})
		},
		"logons": func(p printer) error { return printLogons(p, []attest.LogonEvent{{User: evil, Reason: evil}}) },
		"changes": func(p printer) error {
			printChanges(p, []attest.Change{{Was: "a", Is: "b"}})
			return nil
		},
	} {
		lines := make(map[string]int)
		for _, language := range []string{"ja", "en"} {
			var out bytes.Buffer
			if err := print(printer{harmless{&out}, language}); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			s := out.String()
			if japanese := strings.ContainsFunc(s, func(r rune) bool { return unicode.In(r, unicode.Han, unicode.Hiragana, unicode.Katakana) }); japanese != (language == "ja") {
				t.Errorf("%s in %s:\n%s", name, language, s)
			}
			if strings.ContainsFunc(s, func(r rune) bool { return r != '\n' && unicode.IsControl(r) }) || strings.Contains(s, "\ny") {
				t.Errorf("%s: a text of others writes lines or commands a terminal: %q", name, s)
			}
			lines[language] = strings.Count(s, "\n")
		}
		if lines["ja"] != lines["en"] || lines["en"] == 0 {
			t.Errorf("%s: %v lines", name, lines)
		}
	}
}
