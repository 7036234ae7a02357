package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sekisho/attest/archive"
	"sekisho/attest/auditlog"
	"sekisho/attest/eventlog/logtest"
	"sekisho/attest/report"
)

// TestAuditCommands keeps three reports in a log and judges it as an auditor
// does, as it is and changed.
func TestAuditCommands(t *testing.T) {
	dir := t.TempDir()
	in := func(name ...string) string { return filepath.Join(append([]string{dir}, name...)...) }
	write := func(name string, data []byte) {
		t.Helper()
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := policyKeygen(t.Context(), &options{}, []string{in("verifier")}); err != nil {
		t.Fatal(err)
	}
	reportKey, err := privateKey(in("verifier.key"))
	if err != nil {
		t.Fatal(err)
	}
	image := logtest.Image{Kernel: "kernel", Initramfs: "initramfs", Cmdline: "quiet"}
	evil := image
	evil.Kernel = "evil"
	a, err := archive.Open(in("archive"), archive.Retention{}, time.Now, func() error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	secret, err := auditlog.NewKey("v.test", "Test City")
	if err != nil {
		t.Fatal(err)
	}
	key, err := auditlog.ParseKey(secret)
	if err != nil {
		t.Fatal(err)
	}
	write(in("log.pub"), []byte(strings.Fields(string(secret))[1]+"\n"))
	ids := make(map[string]string)
	keep := func(name string, boot logtest.Image) {
		t.Helper()
		writeReport(t, in("reports", name), reportKey, boot, image)
		data, err := os.ReadFile(in("reports", name))
		if err != nil {
			t.Fatal(err)
		}
		r, _, err := report.Parse(data, nil)
		if err != nil {
			t.Fatal(err)
		}
		ids[name] = report.ID(r.Evidence.Value)
		id, err := archive.ParseID(ids[name])
		if err != nil {
			t.Fatal(err)
		}
		if err := a.Append(t.Context(), archive.Entry{ID: id, Device: sha256.Sum256(r.Device.ID), Time: time.Now(), Data: data}); err != nil {
			t.Fatal(err)
		}
	}
	takeIn := func() {
		t.Helper()
		l, err := auditlog.Open(t.Context(), in("log"), key, a, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(in("reports"), 0o700); err != nil {
		t.Fatal(err)
	}
	keep("good", image)
	takeIn()
	since, err := os.ReadFile(in("log", "checkpoint"))
	if err != nil {
		t.Fatal(err)
	}
	write(in("since"), since)
	keep("bad", evil)
	keep("again", image)
	takeIn()
	if _, err := policyKeygen(t.Context(), &options{}, []string{in("other")}); err != nil {
		t.Fatal(err)
	}
	otherSecret, _ := auditlog.NewKey("v.test", "Test City")
	write(in("other.log.pub"), []byte(strings.Fields(string(otherSecret))[1]))
	mirror := httptest.NewServer(http.FileServer(http.Dir(in("log"))))
	defer mirror.Close()
	run := func(want int, args ...string) string {
		t.Helper()
		var stdout, stderr bytes.Buffer
		exit, ok := audits(append([]string{"audit"}, args...), &stdout, &stderr)
		if !ok || exit != want {
			t.Errorf("audit %s: exit status %d, want %d\n%s%s", args, exit, want, stdout.String(), stderr.String())
		}
		return stdout.String() + stderr.String()
	}
	verify := func(want int, copy string, args ...string) string {
		t.Helper()
		return run(want, append([]string{"verify", copy, "-key", in("log.pub"), "-lang", "en"}, args...)...)
	}
	for _, copy := range []string{in("log"), mirror.URL} {
		if out := verify(0, copy, "-since", in("since"), "-report-key", in("verifier.pub"), in("reports")); !strings.Contains(out, "2 of them affirming") || !strings.Contains(out, "leaves     3") {
			t.Error(out)
		}
	}
	var got audited
	if err := json.Unmarshal([]byte(verify(0, in("log"), "-json", in("reports", "bad"))), &got); err != nil || got.Size != 3 || got.Reports != 1 || got.Reverified || len(got.Wrong) != 0 {
		t.Errorf("%+v %v", got, err)
	}

	// Proofs, by id and by file; each proves its own report alone.
	proof := run(0, "proof", in("reports", "bad"), "-log", in("log"), "-key", in("log.pub"))
	if again := run(0, "proof", ids["bad"], "-log", mirror.URL, "-key", in("log.pub")); again != proof {
		t.Errorf("two proofs:\n%s\n%s", proof, again)
	}
	write(in("proof"), []byte(proof))
	verify(0, in("proof"), in("reports", "bad"))
	verify(1, in("proof"), in("reports", "good"))
	write(in("wrong"), []byte(strings.Replace(proof, "index ", "index 1", 1)))
	verify(1, in("wrong"), in("reports", "bad"))

	// What is not as it was signed.
	good, err := os.ReadFile(in("reports", "good"))
	if err != nil {
		t.Fatal(err)
	}
	changed := bytes.Clone(good)
	changed[len(changed)-1] ^= 1 // of its signature
	write(in("changed"), changed)
	if out := verify(1, in("log"), in("changed")); !strings.Contains(out, "in the log") {
		t.Error(out)
	}
	verify(1, in("log"), "-report-key", in("verifier.pub"), in("changed"))
	verify(1, in("log"), "-report-key", in("other.pub"), in("reports", "good"))
	writeReport(t, in("stranger"), reportKey, image, image)
	if out := verify(1, in("log"), "-report-key", in("verifier.pub"), in("stranger")); !strings.Contains(out, "not in the log") {
		t.Error(out)
	}
	run(1, "verify", in("log"), "-key", in("other.log.pub"))
	now, err := os.ReadFile(in("log", "checkpoint"))
	if err != nil {
		t.Fatal(err)
	}
	write(in("now"), now)
	write(in("log", "checkpoint"), since) // the log is cut
	verify(0, in("log"), in("reports", "good"))
	verify(1, in("log"), in("reports", "again"))
	verify(1, in("log"), "-since", in("now"))
	write(in("log", "checkpoint"), now)
	leaves := in("log", "tile", "entries", "000.p", "3")
	data, err := os.ReadFile(leaves)
	if err != nil {
		t.Fatal(err)
	}
	write(leaves, bytes.Replace(data, sum(good), sum(changed), 1))
	verify(1, in("log"))

	// What cannot be judged.
	verify(2, in("nothing"))
	verify(2, in("log"), in("nothing"))
	run(2, "verify", in("log"))
	run(1, "proof", hex.EncodeToString(make([]byte, 16)), "-log", mirror.URL, "-key", in("log.pub"))
	run(2, "verify", "http://127.0.0.1:1/", "-key", in("log.pub"))
	run(2, "nonsense")
	run(0, "-h")
}

func sum(data []byte) []byte {
	s := sha256.Sum256(data)
	return s[:]
}
