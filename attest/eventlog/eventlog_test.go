package eventlog_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sekisho/attest"
	"sekisho/attest/eventlog"
	"sekisho/attest/eventlog/logtest"
)

var image = logtest.Image{Kernel: "kernel 1", Initramfs: "initramfs 1", Cmdline: "quiet"}

func reason(t *testing.T, err error) attest.Reason {
	t.Helper()
	if err == nil {
		return attest.ReasonNone
	}
	var r *attest.Refusal
	if !errors.As(err, &r) {
		t.Fatalf("%v is no refusal", err)
	}
	return r.Reason
}

func TestCheckAcceptsABoot(t *testing.T) {
	boot := image.Boot()
	for name, data := range map[string][]byte{
		"plain":             boot.Bytes(),
		"padded with zeros": append(boot.Bytes(), make([]byte, 100)...),
		"padded with ones":  append(boot.Bytes(), bytes.Repeat([]byte{0xff}, 33)...),
	} {
		l, err := eventlog.Parse(data)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if err := check(l, boot.PCRs()); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCheckRefuses(t *testing.T) {
	withoutSeparator := logtest.New()
	for pcr := range 7 {
		withoutSeparator.Separator(pcr)
	}
	twice := image.Boot()
	twice.Separator(4)
	disguised := image.Boot()
	disguised.Add(5, 0x80000007, []byte("action"), sha256.Sum256(make([]byte, 4))) // a separator's digest
	faulty := logtest.New()
	for pcr := range 8 {
		faulty.Add(pcr, eventlog.TypeSeparator, []byte{1, 0, 0, 0}, attest.Digest{1})
	}
	extended := image.Boot().PCRs()
	extended[15] = attest.Digest{1}
	other := image.Boot().PCRs()
	other[11] = attest.Digest{1}
	missing := image.Boot().PCRs()
	delete(missing, 9)
	for _, c := range []struct {
		name string
		log  *logtest.Log
		pcrs map[int]attest.Digest
		want attest.Reason
	}{
		{"no separator", withoutSeparator, withoutSeparator.PCRs(), attest.ReasonLogSeparator},
		{"two separators", twice, twice.PCRs(), attest.ReasonLogSeparator},
		{"two separators, one disguised", disguised, disguised.PCRs(), attest.ReasonLogSeparator},
		{"error separator", faulty, faulty.PCRs(), attest.ReasonLogSeparator},
		{"extended without an event", image.Boot(), extended, attest.ReasonLogMissingEvents},
		{"other value", image.Boot(), other, attest.ReasonLogReplay},
		{"no value", image.Boot(), missing, attest.ReasonPCRSelection},
	} {
		l, err := eventlog.Parse(c.log.Bytes())
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		if got := reason(t, check(l, c.pcrs)); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	many := logtest.New()
	for range eventlog.MaxEvents + 1 {
		many.Add(5, 5, nil, attest.Digest{})
	}
	big := logtest.New()
	big.Add(5, 5, make([]byte, eventlog.MaxEvent+1), attest.Digest{})
	pcr24 := logtest.New()
	pcr24.Add(24, 5, nil, attest.Digest{})
	valid := image.Boot().Bytes()
	sha1 := bytes.Clone(valid)
	binary.LittleEndian.PutUint16(sha1[32+28:], 4) // the table says SHA-1 of 32 bytes
	for _, c := range []struct {
		name string
		data []byte
		want attest.Reason
	}{
		{"empty", nil, attest.ReasonLogMalformed},
		{"too large", make([]byte, attest.MaxEventLog+1), attest.ReasonLogTooLarge},
		{"too many events", many.Bytes(), attest.ReasonLogTooLarge},
		{"event too large", big.Bytes(), attest.ReasonLogMalformed},
		{"pcr 24", pcr24.Bytes(), attest.ReasonLogMalformed},
		{"truncated", valid[:len(valid)-3], attest.ReasonLogMalformed},
		{"rubbish behind", append(bytes.Clone(valid), 1, 2, 3), attest.ReasonLogMalformed},
		{"old format", make([]byte, 64), attest.ReasonLogNoSHA256},
		{"digests of another algorithm", sha1, attest.ReasonLogMalformed},
	} {
		_, err := eventlog.Parse(c.data)
		if got := reason(t, err); got != c.want {
			t.Errorf("%s: %v (%v), want %v", c.name, got, err, c.want)
		}
	}
}

func TestJudgeNamesTheComponent(t *testing.T) {
	refs := []attest.ReferenceValues{
		logtest.Image{Kernel: "old", Initramfs: "old", Cmdline: "old"}.Reference("sekisho", "0"),
		image.Reference("sekisho", "1"),
	}
	change := func(f func(*logtest.Image)) logtest.Image {
		i := image
		f(&i)
		return i
	}
	for _, c := range []struct {
		name   string
		image  logtest.Image
		reason attest.Reason
		detail string
	}{
		{"same", image, attest.ReasonNone, ""},
		{"kernel", change(func(i *logtest.Image) { i.Kernel = "evil" }), attest.ReasonImageMismatch, "kernel (.linux, PCR 11): expected "},
		{"initramfs", change(func(i *logtest.Image) { i.Initramfs = "evil" }), attest.ReasonImageMismatch, "initramfs (.initrd, PCR 11): expected "},
		{"cmdline", change(func(i *logtest.Image) { i.Cmdline = "init=/bin/sh" }), attest.ReasonImageMismatch, "cmdline (.cmdline, PCR 11): expected "},
		{"all", logtest.Image{Kernel: "a", Initramfs: "b", Cmdline: "c"}, attest.ReasonImageUnknown, "image not in the reference values"},
	} {
		boot := c.image.Boot()
		l, err := eventlog.Parse(boot.Bytes())
		if err != nil {
			t.Fatal(err)
		}
		ref, findings, err := l.Judge(boot.PCRs(), refs)
		if got := reason(t, err); got != c.reason {
			t.Errorf("%s: %v, want %v", c.name, got, c.reason)
		}
		if c.reason == attest.ReasonNone {
			if err == nil && ref.Version != "1" {
				t.Errorf("%s: matched version %s", c.name, ref.Version)
			}
			continue
		}
		var r *attest.Refusal
		errors.As(err, &r)
		if !strings.HasPrefix(r.Detail, c.detail) || strings.Contains(r.Detail, "uki") {
			t.Errorf("%s: detail %q, want it to begin with %q and not to name the whole", c.name, r.Detail, c.detail)
		}
		if len(findings) == 0 || len(findings[0].Expected) != 64 {
			t.Errorf("%s: findings %v", c.name, findings)
		}
	}
}

func TestJudgeByFinalValuesOnly(t *testing.T) {
	boot := image.Boot()
	l, err := eventlog.Parse(boot.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	ref := image.Reference("sekisho", "1")
	ref.PCRs[7] = attest.Digest{1}
	_, _, err = l.Judge(boot.PCRs(), []attest.ReferenceValues{ref})
	if got := reason(t, err); got != attest.ReasonSecureBoot {
		t.Errorf("other PCR 7: %v, want %v", got, attest.ReasonSecureBoot)
	}
	ref = image.Reference("sekisho", "1")
	ref.PCRs[23] = attest.Digest{1}
	if _, _, err = l.Judge(boot.PCRs(), []attest.ReferenceValues{ref}); err == nil {
		t.Error("a reference value for a PCR that is not quoted was taken as met")
	}
	if _, _, err = l.Judge(boot.PCRs(), nil); reason(t, err) != attest.ReasonNoReferenceValues {
		t.Errorf("no reference values: %v", err)
	}
	if _, _, err = l.Judge(boot.PCRs(), []attest.ReferenceValues{{}}); err == nil {
		t.Error("empty reference values matched")
	}
}

// TestLabels finds what stands in a component's place, however it is labelled.
func TestLabels(t *testing.T) {
	tagged := func(text string) []byte {
		b := binary.LittleEndian.AppendUint32(nil, 0x8f3b22ed)
		return append(binary.LittleEndian.AppendUint32(b, uint32(len(text))), text...)
	}
	for _, c := range []struct {
		name string
		kind uint32
		data []byte
	}{
		{"ASCII", eventlog.TypeIPL, []byte(".initrd\x00")},
		{"UTF-16", eventlog.TypeIPL, []byte(".\x00i\x00n\x00i\x00t\x00r\x00d\x00\x00\x00")},
		{"tagged", eventlog.TypeTag, tagged(".initrd\x00")},
	} {
		boot := logtest.New()
		boot.Add(9, c.kind, c.data, attest.Digest{7})
		l, err := eventlog.Parse(boot.Bytes())
		if err != nil {
			t.Fatal(err)
		}
		got := l.Compare(boot.PCRs(), &attest.ReferenceValues{
			PCRs:       map[int]attest.Digest{9: {1}},
			Components: []attest.Component{{Name: "initramfs", PCR: 9, Event: ".initrd", Digest: attest.Digest{8}}},
		})
		if len(got.Findings) != 1 || got.Findings[0].Seen != (attest.Digest{7}).String() {
			t.Errorf("%s: %+v", c.name, got.Findings)
		}
	}
}

// corpus is public data beside the repository.
const corpus = "../../../shared/corpus/attest"

func readCorpus(t testing.TB, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(corpus, name))
	if errors.Is(err, os.ErrNotExist) {
		t.Skip("needs the corpus beside the repository: " + corpus)
	}
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func readPCRs(t *testing.T, name string) map[int]attest.Digest {
	t.Helper()
	var banks map[string]map[int]string
	if err := json.Unmarshal(readCorpus(t, name), &banks); err != nil {
		t.Fatal(err)
	}
	pcrs := make(map[int]attest.Digest)
	for i, text := range banks["sha256"] {
		var d attest.Digest
		if err := d.UnmarshalText([]byte(text)); err != nil {
			t.Fatal(err)
		}
		pcrs[i] = d
	}
	return pcrs
}

// TestCorpus runs the logs of real machines and logs forged from them.
func TestCorpus(t *testing.T) {
	readCorpus(t, "MANIFEST.md")
	type verdict struct {
		file, pcrs string
		want       attest.Reason
	}
	real := "eventlog-with-pcrs/"
	for _, c := range []verdict{
		{real + "guard-laptop-haruhi-good1.eventlog", real + "guard-laptop-haruhi-good1.pcrs.json", attest.ReasonNone},
		{real + "guard-laptop-haruhi-failed2.eventlog", real + "guard-laptop-haruhi-failed2.pcrs.json", attest.ReasonLogReplay},
		{real + "guard-elitebook830g6-baseline.eventlog", real + "guard-elitebook830g6-baseline.pcrs.json", attest.ReasonNone},
		{real + "guard-elitebook-before.eventlog", real + "guard-elitebook-before.pcrs.json", attest.ReasonNone},
		{real + "guard-x1carbon-before.eventlog", real + "guard-x1carbon-before.pcrs.json", attest.ReasonNone},
		{real + "guard-win-dell-bootctrs.eventlog", real + "guard-win-dell-bootctrs.pcrs.json", attest.ReasonNone},
		{real + "guard-win-t480s.eventlog", real + "guard-win-t480s.pcrs.json", attest.ReasonNone},
		{real + "guard-ludmilla2.eventlog", real + "guard-ludmilla2.pcrs.json", attest.ReasonNone},
		{real + "gotpmtools-gdc-host.bin", real + "gotpmtools-gdc-host.bin.pcrs.json", attest.ReasonNone},
		{real + "goeventlog-cos-85-amd-sev.bin", real + "goeventlog-cos-85-amd-sev.bin.pcrs.json", attest.ReasonNone},
		{real + "goeventlog-ubuntu-2104-no-secure-boot.bin", real + "goeventlog-ubuntu-2104-no-secure-boot.bin.pcrs.json", attest.ReasonNone},
		{real + "guard-dl160.eventlog", real + "guard-dl160.pcrs.json", attest.ReasonLogReplay},
		{"derived-attack/digest-flip", "derived-attack/digest-flip.pcrs.json", attest.ReasonLogReplay},
		{"derived-attack/drop-all-pcr4-events", "derived-attack/drop-all-pcr4-events.pcrs.json", attest.ReasonLogMissingEvents},
		{"derived-attack/duplicate-separator-pcr7", "derived-attack/duplicate-separator-pcr7.pcrs.json", attest.ReasonLogSeparator},
		{"derived-attack/no-separator-pcr0", "derived-attack/no-separator-pcr0.pcrs.json", attest.ReasonLogReplay},
		{"derived-attack/no-separator-pcr0-consistent", "derived-attack/no-separator-pcr0-consistent.pcrs.json", attest.ReasonLogSeparator},
		{"derived-attack/pcr4-reordered", "derived-attack/pcr4-reordered.pcrs.json", attest.ReasonLogReplay},
		{"derived-attack/truncated-to-header", "derived-attack/truncated-to-header.pcrs.json", attest.ReasonLogMissingEvents},
		{"malformed/goattestation-event-size-3GB", "", attest.ReasonLogMalformed},
		{"malformed/keylime-bogus", "", attest.ReasonLogMalformed},
	} {
		l, err := eventlog.Parse(readCorpus(t, c.file))
		if err == nil {
			pcrs := replayable(t, l, readPCRs(t, c.pcrs))
			err = check(l, pcrs)
		}
		if got := reason(t, err); got != c.want {
			t.Errorf("%s: got %v (%v), want %v", c.file, got, err, c.want)
		}
	}
}

// replayable completes the sidecar's values: user space of those machines
// extended PCRs above 7 outside the firmware log, and some sidecars end at 7.
func replayable(t *testing.T, l *eventlog.Log, pcrs map[int]attest.Digest) map[int]attest.Digest {
	t.Helper()
	logged := logtest.New()
	for _, e := range l.Events {
		logged.Add(e.PCR, e.Type, nil, e.Digest)
	}
	for i, v := range logged.PCRs() {
		if i > 7 {
			pcrs[i] = v
		}
	}
	return pcrs
}

func FuzzParse(f *testing.F) {
	boot := image.Boot()
	f.Add(boot.Bytes())
	f.Add(append(boot.Bytes(), 0, 0, 0))
	pcrs := boot.PCRs()
	ref := image.Reference("sekisho", "1")
	f.Fuzz(func(t *testing.T, data []byte) {
		l, err := eventlog.Parse(data)
		if err != nil {
			return
		}
		if len(l.Events) > eventlog.MaxEvents {
			t.Errorf("%d events", len(l.Events))
		}
		if check(l, pcrs) != nil {
			return
		}
		if _, _, err := l.Judge(pcrs, []attest.ReferenceValues{ref}); err != nil {
			t.Errorf("the right PCR values were refused: %v", err)
		}
	})
}

// check is Check without the findings, which must name what the refusal does.
func check(l *eventlog.Log, pcrs map[int]attest.Digest) error {
	findings, err := l.Check(pcrs)
	var why *attest.Refusal
	if errors.As(err, &why) && len(findings) > 0 && (findings[0].Reason != why.Reason || findings[0].Sentence.EN != why.Detail || findings[0].Action.JA == "") {
		return fmt.Errorf("refused as %w, and the first finding is %+v", err, findings[0])
	}
	return err
}
