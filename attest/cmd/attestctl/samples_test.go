package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sekisho/attest"
	"sekisho/attest/eventlog/logtest"
	"sekisho/attest/tpm/faketpm"
)

// corpus is public data beside the repository.
const corpus = "../../../../shared/corpus/attest"

// ctl runs attestctl with words and returns its exit status and output.
func ctl(t *testing.T, words ...string) (int, string) {
	t.Helper()
	var out, errs bytes.Buffer
	exit, ok := samples(words, &out, &errs)
	if !ok {
		t.Fatalf("%v: judges no samples", words)
	}
	return exit, out.String() + errs.String()
}

func write(t *testing.T, dir, name string, data []byte) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestSamplesMade judges samples made here: exit status and what is printed.
func TestSamplesMade(t *testing.T) {
	dir := t.TempDir()
	boot := logtest.Image{Kernel: "k", Initramfs: "i", Cmdline: "c"}.Boot()
	values := map[string]map[int]attest.Digest{"sha256": boot.PCRs()}
	good, err := json.Marshal(values)
	if err != nil {
		t.Fatal(err)
	}
	values["sha256"][11] = attest.Digest{1}
	bad, err := json.Marshal(values)
	if err != nil {
		t.Fatal(err)
	}
	dev, nonce := faketpm.New(), attest.Digest{7}
	dev.PCRs = boot.PCRs()
	p, err := dev.Attest(nonce)
	if err != nil {
		t.Fatal(err)
	}
	log := write(t, dir, "log", boot.Bytes())
	goodPCRs, badPCRs := write(t, dir, "good.json", good), write(t, dir, "bad.json", bad)
	ak, msg, sig := write(t, dir, "ak", dev.Identity().AK), write(t, dir, "msg", p.Quote), write(t, dir, "sig", p.QuoteSig)
	rubbish := write(t, dir, "rubbish", []byte("rubbish"))
	bare := []string{"quote", "--ak", ak, "--msg", msg, "--sig", sig}
	for _, c := range []struct {
		words []string
		exit  int
		says  string
	}{
		{[]string{"eventlog", log}, 0, "nothing in it is proven"},
		{[]string{"eventlog", log, "--lang", "ja"}, 0, "内容は何も証明されていません"},
		{[]string{"eventlog", log, "--lang", "fr"}, 2, "want ja or en"},
		{[]string{"eventlog", "--pcrs", badPCRs, log, "--lang", "ja"}, 1, "PCR 11 の値を再現できません"},
		{[]string{"eventlog", "--pcrs", badPCRs, log, "--json"}, 1, "PCR 11 の値を再現できません"},
		{[]string{"eventlog", log, "--ak", ak}, 1, "the log has no quote in it"},
		{[]string{"eventlog", log, "--ak", rubbish}, 2, "attestation key"},
		{[]string{"eventlog", log, "--pcrs", goodPCRs}, 0, "secure boot  on"},
		{[]string{"eventlog", "--pcrs", badPCRs, log, "--json"}, 1, `"code": "log-replay"`},
		{[]string{"eventlog", log, "--bank", "sha384"}, 1, "log-no-sha256"},
		{[]string{"eventlog", log, "--bank", "md5"}, 2, "unknown PCR bank"},
		{[]string{"eventlog", log, "--pcrs", goodPCRs, "--bank", "sha1"}, 2, "no values of bank sha1"},
		{[]string{"eventlog", log, "--pcrs", rubbish}, 2, "PCR values"},
		{[]string{"eventlog", rubbish}, 1, "log-malformed"},
		{[]string{"eventlog", filepath.Join(dir, "absent")}, 2, "no such file"},
		{[]string{"eventlog"}, 2, "wrong command line"},
		{[]string{"eventlog", "-h"}, 0, "exit status"},
		{[]string{"ek", rubbish}, 1, "refuse"},
		{[]string{"ek", rubbish, "--lang", "ja"}, 1, "拒否"},
		{[]string{"ek", filepath.Join(dir, "absent")}, 2, "no such file"},
		{append(bare, "--nonce", nonce.String(), "--pcrs", goodPCRs, "--log", log), 0, "event log"},
		{append(bare, "--nonce", "00"), 1, "another nonce"},
		{append(bare, "--nonce", ""), 1, "another nonce"},
		{append(bare, "--nonce", "00", "--lang", "ja"), 1, "別のノンス"},
		{append(bare, "--nonce", "xx"), 2, "nonce"},
		{append(bare, "--pcrs", badPCRs), 1, "not the quoted ones"},
		{append(bare, "--log", log), 2, "-log needs -pcrs"},
		{append(bare, "--pcrs", goodPCRs, "--log", rubbish), 1, "log-malformed"},
		{[]string{"quote", "--ak", rubbish, "--msg", msg, "--sig", sig}, 2, "attestation key"},
		{[]string{"quote", "--ak", ak, "--msg", rubbish, "--sig", sig}, 1, "quote-magic"},
		{[]string{"quote"}, 2, "wrong command line"},
	} {
		exit, out := ctl(t, c.words...)
		if exit != c.exit || !strings.Contains(out, c.says) {
			t.Errorf("%v: exit %d, want %d with %q:\n%s", c.words, exit, c.exit, c.says, out)
		}
	}
	if _, ok := samples([]string{"device", "list"}, os.Stdout, os.Stderr); ok {
		t.Error("device list was taken for a sample")
	}
}

// TestSamplesOfTheCorpus shows the commands on files of real machines, and the
// bundle from the makers' certificates.
func TestSamplesOfTheCorpus(t *testing.T) {
	if _, err := os.Stat(corpus); errors.Is(err, os.ErrNotExist) {
		t.Skip("needs the corpus beside the repository: " + corpus)
	}
	in := func(name string) string { return filepath.Join(corpus, name) }
	bundle := filepath.Join(t.TempDir(), "bundle.pem")
	for _, c := range []struct {
		words []string
		exit  int
		says  string
	}{
		{[]string{"ek", "bundle", "--from", in("vendor-roots"), "--out", bundle}, 0, "certificates of TPM makers"},
		{[]string{"ek", in("ekcert/guard-sr630-ek.pem"), "--roots", bundle, "--json"}, 0, `"verdict": "pass"`},
		{[]string{"ek", in("ekcert/hirs-nuc-1-ek_cert_untouched.cer"), "--roots", in("vendor-roots")}, 1, "RSAES-OAEP"},
		{[]string{"ek", in("ekcert/gotpmtools-gce-pca_tpm_ecc_enc_cert.pem"), "--roots", in("ekcert")}, 0, "us-central1-a, google.com:wuale-gcp-testing"},
		{[]string{"ek", in("ekcert/gotpmtools-gce-uca_tpm_rsa_enc_cert.pem"), "--roots", bundle, "--json"}, 1, `"instanceName": "cs-debug"`},
		{[]string{"eventlog", in("eventlog-with-pcrs/guard-win-supermicro-wbclquote.eventlog"), "--ak", in("eventlog-with-pcrs/guard-win-supermicro-wbclquote.pcpkey-bla.bin")}, 0, "quote in the log"},
		{[]string{"ek", in("ekcert/hirs-ci-ek_cert.der"), "--roots", in("ekcert/hirs-ci-ca.crt")}, 0, "pass"},
		{[]string{"eventlog", in("eventlog-with-pcrs/guard-laptop-haruhi-failed2.eventlog"), "--pcrs", in("eventlog-with-pcrs/guard-laptop-haruhi-failed2.pcrs.json")}, 1, "value of PCR 0"},
		{[]string{"eventlog", in("eventlog-with-pcrs/goeventlog-debian-10.bin"), "--pcrs", in("eventlog-with-pcrs/goeventlog-debian-10.bin.pcrs.json")}, 0, "bank sha1"},
		{[]string{"quote", "--ak", in("quote/keylime-testdata-akpub.pem"), "--msg", in("quote/keylime-testdata-quote.out"), "--sig", in("quote/keylime-testdata-quotesig.out")}, 0, "known as PEM only"},
	} {
		exit, out := ctl(t, c.words...)
		if exit != c.exit || !strings.Contains(out, c.says) {
			t.Errorf("%v: exit %d, want %d with %q:\n%s", c.words, exit, c.exit, c.says, out)
		}
	}
}
