package quote_test

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"sekisho/attest"
	"sekisho/attest/eventlog"
	"sekisho/attest/quote"
	"sekisho/attest/tpm"
	"sekisho/attest/tpm/faketpm"
)

// TestQuoteInTheLog is guard-oss' TestWBCLQuote, TestWBCLQuoteInvalid and
// TestWBCLQuoteSigInvalid on a Supermicro with Windows: the quote inside its
// log verifies with Windows' key, and one bit of the log or of the signature
// more or less is refused.
func TestQuoteInTheLog(t *testing.T) {
	const name = "eventlog-with-pcrs/guard-win-supermicro-wbclquote"
	data := readFile(t, name+".eventlog")
	key := signer(t, readFile(t, name+".pcpkey-bla.bin"))
	judge := func(data []byte) *quote.Report {
		l, err := eventlog.Read(data)
		if err != nil {
			return &quote.Report{}
		}
		return quote.JudgeEmbedded(l, key)
	}
	r := judge(data)
	t.Logf("%s: %s, %s over %v", name, r.Verdict, r.Scheme, r.Selection)
	if r.Verdict != eventlog.VerdictPass || len(r.Selection) != 1 || len(r.Selection[0].PCRs) != 14 {
		t.Errorf("%+v", r)
	}
	l, err := eventlog.Read(data)
	if err != nil {
		t.Fatal(err)
	}
	for what, at := range map[string]int{
		"byte 400 of the log": 400,
		"the signature":       bytes.Index(data, l.Quotes()[0].Signature) + 100,
		"the message":         bytes.Index(data, l.Quotes()[0].Message) + 60,
	} {
		if r := judge(flip(data, at)); r.Verdict != eventlog.VerdictRefuse {
			t.Errorf("%s: a flipped bit passes", what)
		}
	}
	if r := quote.JudgeEmbedded(l, signer(t, faketpm.New().Identity().AK)); r.Verdict != eventlog.VerdictRefuse {
		t.Error("another key's quote passes")
	}
	l.Notes = nil
	if r := quote.JudgeEmbedded(l, key); r.Verdict != eventlog.VerdictRefuse || len(r.Findings) != 1 {
		t.Errorf("no quote at all: %+v", r)
	}
}

// TestTrustee judges Azure's vTPM quote of confidential-containers/trustee: its
// key is not in the corpus, all but the signature must hold.
func TestTrustee(t *testing.T) {
	var v struct {
		Signature, Message string
		PCRs               []string
	}
	if err := json.Unmarshal(readFile(t, "quote/trustee-az-tpm-quote-v1.json"), &v); err != nil {
		t.Fatal(err)
	}
	values := map[eventlog.Bank]map[int][]byte{eventlog.SHA256: {}}
	for i, p := range v.PCRs {
		values[eventlog.SHA256][i] = unhex(t, p)
	}
	in := quote.Input{Key: signer(t, readFile(t, "quote/azcvm-akpub.pem")), Message: unhex(t, v.Message), Signature: unhex(t, v.Signature), Nonce: []byte("challenge"), Values: values}
	if got := reasons(quote.Judge(in)); len(got) != 1 || got[0] != attest.ReasonSignatureInvalid {
		t.Errorf("%v, want only the foreign key refused", got)
	}
	in.Nonce = []byte("other")
	if got := reasons(quote.Judge(in)); len(got) != 2 || got[1] != attest.ReasonBindingMismatch {
		t.Errorf("another nonce: %v", got)
	}
	in.Nonce, values[eventlog.SHA256][7] = []byte("challenge"), make([]byte, 32)
	if got := reasons(quote.Judge(in)); len(got) != 2 || got[1] != attest.ReasonPCRDigest {
		t.Errorf("another PCR 7: %v", got)
	}
}

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestRustKeylime judges rust-keylime's quote of PCR 16 in SHA-1, in its form
// r<quote>:<signature>:<PCRs>. Its key is not in the corpus.
func TestRustKeylime(t *testing.T) {
	var parts [3][]byte
	for i, s := range strings.Split(strings.TrimPrefix(strings.TrimSpace(string(readFile(t, "quote/rustkeylime-test-quote.txt"))), "r"), ":") {
		var err error
		if parts[i], err = base64.StdEncoding.DecodeString(s); err != nil {
			t.Fatal(err)
		}
	}
	// TPML_PCR_SELECTION and TPML_DIGESTs as C lays them out: 16 selections of
	// 8 bytes behind a count, then the count of lists and of digests.
	digest := parts[2][4+16*8+8:]
	size := binary.LittleEndian.Uint16(digest)
	values := map[eventlog.Bank]map[int][]byte{eventlog.SHA1: {16: digest[2 : 2+size]}}
	in := quote.Input{Key: signer(t, readFile(t, "quote/azcvm-akpub.pem")), Message: parts[0], Signature: parts[1], Nonce: []byte("TEST"), Values: values}
	r := quote.Judge(in)
	if got := reasons(r); len(got) != 1 || got[0] != attest.ReasonSignatureInvalid || len(r.Selection) != 1 || r.Selection[0].Bank != eventlog.SHA1 {
		t.Errorf("%+v, want only the foreign key refused", r)
	}
	in.Nonce = nil
	in.Values = map[eventlog.Bank]map[int][]byte{eventlog.SHA1: {16: make([]byte, 20)}}
	if got := reasons(quote.Judge(in)); len(got) != 2 || got[1] != attest.ReasonPCRDigest {
		t.Errorf("another PCR 16: %v", got)
	}
}

// field is one field of a protocol buffer.
type field struct {
	number uint64
	value  uint64
	bytes  []byte
}

// protobuf reads the fields of a message, as far as they are numbers and bytes.
func protobuf(t *testing.T, b []byte) (list []field) {
	t.Helper()
	number := func() uint64 {
		v, n := binary.Uvarint(b)
		if n <= 0 {
			t.Fatal("protocol buffer is malformed")
		}
		b = b[n:]
		return v
	}
	for len(b) > 0 {
		tag := number()
		f := field{number: tag >> 3, value: number()}
		if tag&7 == 2 {
			f.bytes, b = b[:f.value], b[f.value:]
		}
		list = append(list, f)
	}
	return list
}

// TestGCE judges every quote of Google's attestation of a COS 85 machine with
// its log: three banks, made for no nonce; with any nonce it is refused.
func TestGCE(t *testing.T) {
	var key, log []byte
	var quotes [][]field
	for _, f := range protobuf(t, readFile(t, "quote/gotpmtools-gce-cos-85-no-nonce.pb")) {
		switch f.number {
		case 1:
			key = f.bytes
		case 2:
			quotes = append(quotes, protobuf(t, f.bytes))
		case 3:
			log = f.bytes
		}
	}
	if len(quotes) != 3 {
		t.Fatalf("%d quotes, want 3", len(quotes))
	}
	for _, q := range quotes {
		in := quote.Input{Key: signer(t, key), Nonce: []byte{}}
		for _, f := range q {
			switch f.number {
			case 1:
				in.Message = f.bytes
			case 2:
				in.Signature = f.bytes
			case 3:
				pcrs := protobuf(t, f.bytes)
				bank := eventlog.Bank(pcrs[0].value)
				in.Values = map[eventlog.Bank]map[int][]byte{bank: {}}
				for _, p := range pcrs[1:] {
					index, value := 0, []byte(nil)
					for _, x := range protobuf(t, p.bytes) {
						if x.number == 1 {
							index = int(x.value)
						} else {
							value = x.bytes
						}
					}
					in.Values[bank][index] = value
				}
			}
		}
		l, err := eventlog.Read(log)
		if err != nil {
			t.Fatal(err)
		}
		for bank := range in.Values {
			if has := bank == eventlog.SHA1 || bank == eventlog.SHA256; has {
				in.Log = l
			}
		}
		check(t, "gce-cos-85", in, map[attest.Reason]func(*quote.Input){
			attest.ReasonBindingMismatch:  func(in *quote.Input) { in.Nonce = []byte{0} },
			attest.ReasonSignatureInvalid: func(in *quote.Input) { in.Signature = flip(in.Signature, 40) },
		})
		if r := quote.Judge(in); r.Log != nil {
			t.Logf("gce-cos-85: %s, log in %s: %s, Secure Boot %s", r.Verdict, r.Log.Bank, r.Log.Verdict, r.Log.SecureBoot)
		}
	}
}

// TestBothLanguages: whatever is found is said in both languages, with what to
// do.
func TestBothLanguages(t *testing.T) {
	r := quote.Judge(quote.Input{Key: signer(t, faketpm.New().Identity().AK), Message: []byte("rubbish")})
	for _, f := range r.Findings {
		for _, s := range []string{f.Sentence.JA, f.Sentence.EN, f.Action.JA, f.Action.EN} {
			if s == "" || strings.Contains(s, "%!") {
				t.Errorf("%+v", f)
			}
		}
	}
}

// FuzzJudgeEmbedded judges the quotes in logs of anyone: one passes only behind
// events that give the quoted PCRs the values they had in the log of its TPM.
func FuzzJudgeEmbedded(f *testing.F) {
	const name = "eventlog-with-pcrs/guard-win-supermicro-wbclquote"
	var key *tpm.Signer
	var genuine map[int][]byte
	if data, err := os.ReadFile(filepath.Join(corpus, name+".pcpkey-bla.bin")); err == nil {
		key = signer(f, data)
		log := readFile(f, name+".eventlog")
		l, err := eventlog.Read(log)
		if err != nil {
			f.Fatal(err)
		}
		genuine = l.Before(eventlog.SHA256, l.Quotes()[0].Event)
		f.Add(log)
		f.Add(readFile(f, "eventlog-golden/guard-windows_event_log"))
	} else {
		key = signer(f, faketpm.New().Identity().AK)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		l, err := eventlog.Read(data)
		if err != nil {
			return
		}
		r := quote.JudgeEmbedded(l, key)
		if r.Verdict != eventlog.VerdictPass {
			return
		}
		if !slices.ContainsFunc(l.Quotes(), func(q eventlog.EmbeddedQuote) bool {
			values := l.Before(eventlog.SHA256, q.Event)
			for _, pcr := range r.Selection[0].PCRs {
				if !bytes.Equal(values[pcr], genuine[pcr]) {
					return false
				}
			}
			return true
		}) {
			t.Error("a quote of other events passes")
		}
	})
}
