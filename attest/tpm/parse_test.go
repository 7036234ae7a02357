package tpm_test

import (
	"bytes"
	"errors"
	"os"
	"testing"

	"sekisho/attest"
	"sekisho/attest/tpm"
	"sekisho/attest/tpm/faketpm"
)

func TestParseStatementRefuses(t *testing.T) {
	p, err := faketpm.New().Attest(attest.Digest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tpm.ParseStatement(p.Quote); err != nil {
		t.Fatal(err)
	}
	for i := range p.Quote {
		if _, err := tpm.ParseStatement(p.Quote[:i]); !errors.Is(err, tpm.ErrStatement) {
			t.Errorf("first %d bytes: %v", i, err)
		}
	}
	magic := bytes.Clone(p.Quote)
	magic[0] ^= 1
	kind := bytes.Clone(p.Quote)
	kind[5] = 0x19 // TPM_ST_ATTEST_TIME
	for name, data := range map[string][]byte{
		"rubbish behind": append(bytes.Clone(p.Quote), 0), "magic": magic, "type": kind, "too large": make([]byte, attest.MaxTPMBytes+1),
	} {
		if _, err := tpm.ParseStatement(data); !errors.Is(err, tpm.ErrStatement) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestRealQuotes reads the quotes of real machines, among them one of a genuine
// TPM over no PCR at all (the class of CVE-2022-0317).
func TestRealQuotes(t *testing.T) {
	const corpus = "../../../shared/corpus/attest/eventlog-with-pcrs/"
	for _, name := range []string{"guard-laptop-haruhi-good1", "guard-win-dell", "guard-win-dell-bootctrs", "guard-x1carbon-before"} {
		data, err := os.ReadFile(corpus + name + ".quote.bin")
		if errors.Is(err, os.ErrNotExist) {
			t.Skip("needs the corpus beside the repository")
		}
		s, err := tpm.ParseStatement(data)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if s.ExactlyQuoted() {
			t.Errorf("%s: taken for a quote over exactly our PCRs", name)
		}
	}
}

func FuzzParseStatement(f *testing.F) {
	p, err := faketpm.New().Attest(attest.Digest{})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(p.Quote)
	f.Add(p.Certify)
	f.Fuzz(func(t *testing.T, data []byte) {
		if s, err := tpm.ParseStatement(data); err == nil {
			s.ExactlyQuoted()
		}
	})
}

func FuzzParsePublic(f *testing.F) {
	id := faketpm.New().Identity()
	f.Add(id.EK)
	f.Add(id.AK)
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := tpm.ParsePublic(data)
		if err != nil {
			return
		}
		if !bytes.Equal(p.Bytes, data) {
			t.Error("other bytes than were parsed")
		}
		p.SPKI()
		p.CheckAK()
		if p.CheckEK() == nil {
			tpm.MakeCredential(p, p.Name(), make([]byte, 32))
		}
	})
}

func FuzzVerifySignature(f *testing.F) {
	dev := faketpm.New()
	p, err := dev.Attest(attest.Digest{})
	if err != nil {
		f.Fatal(err)
	}
	key, err := tpm.ParsePublic(dev.Identity().AK)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(p.QuoteSig)
	f.Fuzz(func(t *testing.T, sig []byte) {
		if tpm.VerifySignature(key, []byte("never signed"), sig) == nil {
			t.Error("a forged signature was accepted")
		}
	})
}
