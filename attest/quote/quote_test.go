package quote_test

import (
	"bytes"
	"crypto"
	"encoding/binary"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"sekisho/attest"
	"sekisho/attest/eventlog"
	"sekisho/attest/quote"
	"sekisho/attest/tpm"
	"sekisho/attest/tpm/faketpm"
)

// corpus is public data beside the repository.
const corpus = "../../../shared/corpus/attest"

func readFile(t testing.TB, name string) []byte {
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

func signer(t testing.TB, data []byte) *tpm.Signer {
	t.Helper()
	s, err := tpm.ParseSigner(data)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func reasons(r *quote.Report) (out []attest.Reason) {
	for _, f := range r.Findings {
		if f.Severity == attest.SeverityBlock {
			out = append(out, f.Code)
		}
	}
	return out
}

// check demands that in passes and that each change is refused for its reason.
func check(t *testing.T, name string, in quote.Input, changes map[attest.Reason]func(*quote.Input)) {
	t.Helper()
	if r := quote.Judge(in); r.Verdict != eventlog.VerdictPass {
		t.Errorf("%s: %+v", name, r.Findings)
	}
	for want, change := range changes {
		other := in
		change(&other)
		r := quote.Judge(other)
		if got := reasons(r); r.Verdict != eventlog.VerdictRefuse || len(got) == 0 || got[0] != want {
			t.Errorf("%s: refused for %v, want %v", name, got, want)
		}
	}
}

func flip(data []byte, at int) []byte {
	out := bytes.Clone(data)
	out[at] ^= 1
	return out
}

// TestFake judges a quote by a restricted P-256 key.
func TestFake(t *testing.T) {
	dev, nonce := faketpm.New(), attest.Digest{1, 2, 3}
	dev.PCRs = map[int]attest.Digest{}
	for _, i := range attest.QuotedPCRs {
		dev.PCRs[i] = attest.Digest{byte(i)}
	}
	p, err := dev.Attest(nonce)
	if err != nil {
		t.Fatal(err)
	}
	values := map[eventlog.Bank]map[int][]byte{eventlog.SHA256: {}}
	for i, v := range dev.PCRs {
		values[eventlog.SHA256][i] = v[:]
	}
	in := quote.Input{Key: signer(t, dev.Identity().AK), Message: p.Quote, Signature: p.QuoteSig, Nonce: nonce[:], Values: values}
	check(t, "fake", in, map[attest.Reason]func(*quote.Input){
		attest.ReasonQuoteMagic:       func(in *quote.Input) { in.Message = flip(in.Message, 0) },
		attest.ReasonQuoteType:        func(in *quote.Input) { in.Message = p.Certify },
		attest.ReasonSignatureInvalid: func(in *quote.Input) { in.Signature = flip(in.Signature, len(in.Signature)-1) },
		attest.ReasonKeyAttributes:    func(in *quote.Input) { *in = unrestricted(t, *in, dev) },
		attest.ReasonBindingMismatch:  func(in *quote.Input) { in.Nonce = []byte{9} },
		attest.ReasonPCRDigest: func(in *quote.Input) {
			in.Values = map[eventlog.Bank]map[int][]byte{eventlog.SHA256: {}}
			for i := range dev.PCRs {
				in.Values[eventlog.SHA256][i] = make([]byte, 32)
			}
		},
		attest.ReasonPCRSelection: func(in *quote.Input) { in.Values = map[eventlog.Bank]map[int][]byte{eventlog.SHA256: {}} },
	})
}

// unrestricted gives the same key without the attribute that makes it worth
// believing.
func unrestricted(t *testing.T, in quote.Input, dev *faketpm.TPM) quote.Input {
	t.Helper()
	area := dev.Identity().AK
	// TPMA_OBJECT is the third field; restricted is bit 16.
	binary.BigEndian.PutUint32(area[4:], binary.BigEndian.Uint32(area[4:])&^(1<<16))
	in.Key = signer(t, area)
	return in
}

// TestSamples judges the quotes of real machines of the manifest.
func TestSamples(t *testing.T) {
	readFile(t, "MANIFEST.md")
	anyKey := signer(t, faketpm.New().Identity().AK)

	// Azure: lengths and fields as azure-cvm-tooling serialises them.
	azure := readFile(t, "quote/azcvm-quote.bin")
	size := binary.LittleEndian.Uint64(azure)
	sig, rest := azure[8:8+size], azure[8+size:]
	size = binary.LittleEndian.Uint64(rest)
	check(t, "azcvm", quote.Input{
		Key: signer(t, readFile(t, "quote/azcvm-akpub.pem")), Message: rest[8 : 8+size],
		Signature: sig, Nonce: []byte("challenge"),
	}, map[attest.Reason]func(*quote.Input){
		attest.ReasonBindingMismatch:  func(in *quote.Input) { in.Nonce = []byte("other") },
		attest.ReasonSignatureInvalid: func(in *quote.Input) { in.Signature = flip(in.Signature, 9) },
	})

	// Google's Windows machine: everything of it, SHA-1.
	var gcp struct {
		AK    struct{ Public []byte }
		Quote struct{ Quote, Signature []byte }
		Log   struct {
			PCRs []struct {
				Index     int
				Digest    []byte
				DigestAlg crypto.Hash
			}
			Raw []byte
		}
	}
	if err := json.Unmarshal(readFile(t, "quote/goattestation-windows_gcp_shielded_vm.json"), &gcp); err != nil {
		t.Fatal(err)
	}
	values := map[eventlog.Bank]map[int][]byte{eventlog.SHA1: {}}
	for _, p := range gcp.Log.PCRs {
		values[eventlog.SHA1][p.Index] = p.Digest
	}
	log, err := eventlog.Read(gcp.Log.Raw)
	if err != nil {
		t.Fatal(err)
	}
	in := quote.Input{Key: signer(t, gcp.AK.Public), Message: gcp.Quote.Quote, Signature: gcp.Quote.Signature, Nonce: []byte{}, Values: values, Log: log}
	check(t, "windows_gcp", in, map[attest.Reason]func(*quote.Input){
		attest.ReasonBindingMismatch: func(in *quote.Input) { in.Nonce = []byte{1} },
	})
	if r := quote.Judge(in); r.Log.SecureBoot != eventlog.SecureBootOn {
		t.Errorf("windows_gcp: Secure Boot %s, want on", r.Log.SecureBoot)
	}

	// A genuine quote over no PCR at all (class of CVE-2022-0317).
	empty := quote.Judge(quote.Input{Key: anyKey, Message: readFile(t, "eventlog-with-pcrs/guard-win-dell.quote.bin"), Signature: readFile(t, "eventlog-with-pcrs/guard-win-dell.sig.bin")})
	if got := reasons(empty); empty.Verdict != eventlog.VerdictRefuse || len(got) != 2 || got[1] != attest.ReasonPCRSelection {
		t.Errorf("win-dell: %v", got)
	}

	// tpm2-tools' files of one TPM.
	keylime := signer(t, readFile(t, "quote/keylime-testdata-ak.pub"))
	if !bytes.Equal(keylime.Area.Name(), readFile(t, "quote/keylime-testdata-ak.name")) {
		t.Error("keylime: ak.name is not the name of ak.pub")
	}
	r := quote.Judge(quote.Input{Key: keylime, Message: readFile(t, "quote/keylime-testdata-quote.out"), Signature: readFile(t, "quote/keylime-testdata-quotesig.out")})
	t.Logf("keylime: %s %v", r.Verdict, r.Findings)
	if r.Scheme == "" || len(r.Selection) == 0 {
		t.Errorf("keylime: did not parse: %+v", r.Findings)
	}

	// The pcrDigest of every guard quote is that of its sidecar.
	for _, name := range []string{"dl160", "laptop-haruhi-failed2", "laptop-haruhi-good1", "win-dell-bootctrs", "win-supermicro-wbclquote", "x1carbon-ancient", "x1carbon-before"} {
		name = "eventlog-with-pcrs/guard-" + name
		values, err := eventlog.ParseValues(readFile(t, name+".pcrs.json"))
		if err != nil {
			t.Fatal(err)
		}
		r := quote.Judge(quote.Input{Key: anyKey, Message: readFile(t, name+".quote.bin"), Signature: readFile(t, name+".sig.bin"), Values: values})
		if got := reasons(r); len(got) != 1 || got[0] != attest.ReasonSignatureInvalid {
			t.Errorf("%s: %v, want only the foreign key refused", name, got)
		}
	}
}

func FuzzJudge(f *testing.F) {
	dev := faketpm.New()
	p, err := dev.Attest(attest.Digest{})
	if err != nil {
		f.Fatal(err)
	}
	key := signer(f, dev.Identity().AK)
	f.Add(p.Quote, p.QuoteSig)
	f.Fuzz(func(t *testing.T, message, sig []byte) {
		r := quote.Judge(quote.Input{Key: key, Message: message, Signature: sig})
		whole := bytes.Equal(message, p.Quote) || len(message) == len(p.Quote)+2 && bytes.Equal(message[2:], p.Quote)
		if r.Verdict == eventlog.VerdictPass && !whole {
			t.Error("a message that was never signed passes")
		}
	})
}
