package eventlog_test

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"sekisho/attest"
	"sekisho/attest/eventlog"
)

// sample is a log of the corpus with the manifest's verdict in our words.
type sample struct {
	file       string
	want       eventlog.Verdict
	code       attest.Reason // of the first blocking finding
	secureBoot eventlog.SecureBoot
	machine    string // whose quirk it shows, and which rule lets it pass
}

const (
	pass, refuse     = eventlog.VerdictPass, eventlog.VerdictRefuse
	on, off, unknown = eventlog.SecureBootOn, eventlog.SecureBootOff, eventlog.SecureBootUnknown
)

// samples are all logs of the manifest's classes eventlog-with-pcrs,
// eventlog-golden, malformed and derived-attack. Logs without a sidecar of PCR
// values are judged by their form alone.
var samples = []sample{
	{"derived-attack/dbx-oversized-signature", refuse, attest.ReasonLogMalformed, unknown, ""},
	{"derived-attack/digest-flip", refuse, attest.ReasonLogReplay, on, ""},
	{"derived-attack/drop-all-pcr4-events", refuse, attest.ReasonLogMissingEvents, on, ""},
	{"derived-attack/duplicate-separator-pcr7", refuse, attest.ReasonLogSeparator, unknown, ""},
	{"derived-attack/elam-nested-100", refuse, attest.ReasonLogMalformed, on, ""},
	{"derived-attack/no-separator-pcr0", refuse, attest.ReasonLogReplay, on, ""},
	{"derived-attack/no-separator-pcr0-consistent", refuse, attest.ReasonLogSeparator, on, ""},
	{"derived-attack/pcr4-reordered", refuse, attest.ReasonLogReplay, on, ""},
	{"derived-attack/relabel-pcr7-unused", refuse, attest.ReasonLogEventType, unknown, ""},
	{"derived-attack/truncated-to-header", refuse, attest.ReasonLogMissingEvents, unknown, ""},

	{"malformed/esl-oversized-signature-size.part", refuse, attest.ReasonLogMalformed, unknown, "a piece; see TestPieces"},
	{"malformed/goattestation-event-size-3GB", refuse, attest.ReasonLogMalformed, unknown, ""},
	{"malformed/goattestation-event-size-zero-v2.part", refuse, attest.ReasonLogMalformed, unknown, "a piece; see TestPieces"},
	{"malformed/goattestation-short_no_action", pass, 0, unknown, ""},
	{"malformed/goattestation-specid-invalid_version.part", refuse, attest.ReasonLogMalformed, unknown, "a piece; see TestPieces"},
	{"malformed/goattestation-specid-sha1.part", refuse, attest.ReasonLogMalformed, unknown, "a piece; see TestPieces"},
	{"malformed/keylime-bogus", refuse, attest.ReasonLogMalformed, unknown, ""},

	{"eventlog-with-pcrs/eve-last_good_log.eventlog", pass, 0, off, ""},
	{"eventlog-with-pcrs/goattestation-sb_cert_eventlog", pass, 0, on, "early shielded VM: separator in PCR 7 only; degrade"},
	{"eventlog-with-pcrs/goeventlog-arch-linux-workstation.bin", pass, 0, unknown, "Arch workstation: SecureBoot of length 0, no action before the application; unknown, warn"},
	{"eventlog-with-pcrs/goeventlog-cos-85-amd-sev.bin", pass, 0, on, "COS 85: shim before 15.3 hashes less than it logs"},
	{"eventlog-with-pcrs/goeventlog-debian-10.bin", pass, 0, on, "Debian 10: SHA-1 log of TCG 1.2; warn"},
	{"eventlog-with-pcrs/goeventlog-ubuntu-2104-no-dbx.bin", pass, 0, off, ""},
	{"eventlog-with-pcrs/goeventlog-ubuntu-2104-no-secure-boot.bin", pass, 0, off, ""},
	{"eventlog-with-pcrs/gotpmtools-gdc-host.bin", pass, 0, off, "Dell server: digest of the CRTM version is of something else; warn"},
	{"eventlog-with-pcrs/guard-dl160.eventlog", pass, 0, on, "HPE DL160 Gen10: PCR 0 does not replay; degrade"},
	{"eventlog-with-pcrs/guard-elitebook-before.eventlog", pass, 0, on, "HP EliteBook 830 G6: DMA and Thunderbolt actions in PCR 7; warn"},
	{"eventlog-with-pcrs/guard-elitebook830g6-add-mokx.eventlog", pass, 0, on, "HP EliteBook 830 G6"},
	{"eventlog-with-pcrs/guard-elitebook830g6-baseline.eventlog", pass, 0, on, "HP EliteBook 830 G6"},
	{"eventlog-with-pcrs/guard-haruhi.eventlog", pass, 0, on, ""},
	{"eventlog-with-pcrs/guard-laptop-haruhi-failed2.eventlog", refuse, attest.ReasonLogReplay, on, ""},
	{"eventlog-with-pcrs/guard-laptop-haruhi-good1.eventlog", pass, 0, on, ""},
	{"eventlog-with-pcrs/guard-ludmilla2.eventlog", pass, 0, off, "TPM with a SHA-384 bank that the log has no digests for"},
	{"eventlog-with-pcrs/guard-win-dell-bootctrs.eventlog", pass, 0, on, "Dell with Windows: digest of the CRTM version; warn"},
	{"eventlog-with-pcrs/guard-win-dell.eventlog", pass, 0, on, "the log is good; its quote is over no PCR and is refused, see attestctl quote"},
	{"eventlog-with-pcrs/guard-win-supermicro-wbclquote.eventlog", pass, 0, unknown, "Supermicro with Windows: no SecureBoot variable; index 0xffffffff"},
	{"eventlog-with-pcrs/guard-win-t480s.eventlog", pass, 0, on, "ThinkPad T480s: digests in SHA-256 only"},
	{"eventlog-with-pcrs/guard-x1carbon-ancient.eventlog", pass, 0, on, ""},
	{"eventlog-with-pcrs/guard-x1carbon-before.eventlog", pass, 0, on, ""},
	{"eventlog-with-pcrs/hirs-TpmLog.bin", pass, 0, off, ""},

	{"eventlog-golden/canonical-binary_bios_measurements", pass, 0, on, ""},
	{"eventlog-golden/cmc-etc-tpm-log", pass, 0, unknown, "nothing but padding"},
	{"eventlog-golden/goattestation-coreos_36_no_secure_boot", pass, 0, off, ""},
	{"eventlog-golden/goattestation-ebs_event_missing", pass, 0, off, "see TestExitBootServicesMissing"},
	{"eventlog-golden/gotpmtools-cgke-debug", pass, 0, on, ""},
	{"eventlog-golden/guard-binary_bios_measurements_27", pass, 0, unknown, "separators of one byte; degrade"},
	{"eventlog-golden/guard-h12ssl.bios_measurements", pass, 0, off, ""},
	{"eventlog-golden/guard-tpm12_windows_lenovo_x1carbonv3", pass, 0, on, ""},
	{"eventlog-golden/guard-windows_event_log", pass, 0, on, ""},
	{"eventlog-golden/hirs-badVarInstall_oem.rimel", pass, 0, on, ""},
	{"eventlog-golden/hirs-badVarInstall_var.rimel", pass, 0, unknown, "reference values without firmware; degrade"},
	{"eventlog-golden/hirs-laptop_default", pass, 0, on, ""},
	{"eventlog-golden/hirs-laptop_default.rimel", pass, 0, on, ""},
	{"eventlog-golden/keylime-issue1153-mb_log", pass, 0, on, ""},
	{"eventlog-golden/keylime-sb-off", pass, 0, off, ""},
	{"eventlog-golden/keylimeuefi-ideapad-ideapad1.bin", pass, 0, on, "IdeaPad: index 0xffffffff"},
	{"eventlog-golden/keylimeuefi-inspur-inspur.bin", pass, 0, off, ""},
	{"eventlog-golden/keylimeuefi-puiterwijk-puiterwijk.bin", pass, 0, off, ""},
	{"eventlog-golden/keylimeuefi-rhel-bootlog-5.0.0-rhel-20210423T133156Z_8b0347a.bin", pass, 0, on, ""},
	{"eventlog-golden/keylimeuefi-supermicro-201123-eventlog.bin", pass, 0, on, ""},
	{"eventlog-golden/tpm2tools-event-arch-linux.bin", pass, 0, unknown, "SecureBoot of length 0"},
	{"eventlog-golden/tpm2tools-event-gce-ubuntu-2104-log.bin", pass, 0, off, ""},
	{"eventlog-golden/tpm2tools-event-postcode.bin", pass, 0, on, ""},
	{"eventlog-golden/tpm2tools-event-uefi-sha1-log.bin", pass, 0, unknown, "SecureBoot of length 0"},
	{"eventlog-golden/tpm2tools-event-uefiservices.bin", pass, 0, unknown, "two events; degrade"},
	{"eventlog-golden/tpm2tools-event.bin", pass, 0, unknown, "two events; degrade"},
	{"eventlog-golden/tpmtool-tpm12_bios", pass, 0, unknown, "BIOS, no Secure Boot"},
	{"eventlog-golden/tpmtool-tpm20_non_agile", pass, 0, on, ""},
}

// TestSamples prints file, expected and got for every log of the corpus.
func TestSamples(t *testing.T) {
	readCorpus(t, "MANIFEST.md")
	listed := make(map[string]bool)
	for _, s := range samples {
		listed[s.file] = true
		r := appraise(t, s.file)
		got := firstBlock(r)
		t.Logf("%-78s expected %-6s %-18s %-7s  got %-6s %-18s %-7s %s", s.file, s.want, s.code, s.secureBoot, r.Verdict, got, r.SecureBoot, s.machine)
		for _, f := range r.Findings {
			for _, text := range []string{f.Sentence.JA, f.Sentence.EN, f.Action.JA, f.Action.EN} {
				if text == "" || strings.Contains(text, "%!") {
					t.Errorf("%s: %+v is not said in both languages, with what to do", s.file, f)
				}
			}
		}
		if r.Verdict != s.want || got != s.code || r.SecureBoot != s.secureBoot {
			t.Errorf("%s: %+v", s.file, r.Findings)
		}
	}
	for _, class := range []string{"derived-attack", "malformed", "eventlog-with-pcrs", "eventlog-golden"} {
		files, err := os.ReadDir(filepath.Join(corpus, class))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			name := class + "/" + f.Name()
			if !listed[name] && !isAux(name) {
				t.Errorf("%s: not in the table", name)
			}
		}
	}
}

func isAux(name string) bool {
	for _, s := range []string{".json", ".yaml", ".txt", ".quote.bin", ".sig.bin"} {
		if strings.HasSuffix(name, s) {
			return true
		}
	}
	return strings.Contains(name, ".pcpkey-")
}

func firstBlock(r *eventlog.Report) attest.Reason {
	for _, f := range r.Findings {
		if f.Severity == attest.SeverityBlock {
			return f.Code
		}
	}
	return attest.ReasonNone
}

// appraise judges a log of the corpus against its sidecar, if it has one, in
// the best bank that both have.
func appraise(t testing.TB, file string) *eventlog.Report {
	t.Helper()
	l, err := eventlog.Read(readCorpus(t, file))
	var refusal *attest.Refusal
	if errors.As(err, &refusal) {
		return eventlog.Unreadable(refusal)
	}
	if err != nil {
		t.Fatal(err)
	}
	values := readBanks(t, strings.TrimSuffix(file, ".eventlog")+".pcrs.json")
	for _, b := range l.Banks() {
		if pcrs, ok := values[b]; ok || values == nil {
			return l.Appraise(eventlog.Options{Bank: b, PCRs: pcrs})
		}
	}
	t.Fatalf("%s: no bank that log and values share", file)
	return nil
}

// readBanks reads a sidecar; nil if there is none.
func readBanks(t testing.TB, file string) map[eventlog.Bank]map[int][]byte {
	t.Helper()
	if _, err := os.Stat(filepath.Join(corpus, file)); err != nil {
		return nil
	}
	var text map[string]map[string]string
	if err := json.Unmarshal(readCorpus(t, file), &text); err != nil {
		t.Fatal(err)
	}
	out := make(map[eventlog.Bank]map[int][]byte)
	for name, pcrs := range text {
		b, err := eventlog.ParseBank(name)
		if err != nil {
			t.Fatal(err)
		}
		out[b] = make(map[int][]byte)
		for i, v := range pcrs {
			n, err := strconv.Atoi(i)
			if err != nil {
				t.Fatal(err)
			}
			if out[b][n], err = hex.DecodeString(v); err != nil {
				t.Fatal(err)
			}
		}
	}
	return out
}
