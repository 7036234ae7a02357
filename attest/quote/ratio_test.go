package quote_test

import (
	"bytes"
	"crypto"
	"slices"
	"testing"
	"time"

	parser "github.com/google/go-attestation/attest"

	"sekisho/attest"
	"sekisho/attest/eventlog"
	"sekisho/attest/tpm"
	"sekisho/attest/tpm/faketpm"
)

// BenchmarkRatioQuoteAndLog compares the judgement of a P-256 quote with a 43 KB
// Windows log, strict layer included, with go-attestation's verification of the
// same quote and log in one run: how many we judge for each one of theirs (bar
// of issue 3: 0.8). Both take turns; medians count.
func BenchmarkRatioQuoteAndLog(b *testing.B) {
	const name = "eventlog-with-pcrs/guard-win-supermicro-wbclquote"
	data := readFile(b, name+".eventlog")
	values, err := eventlog.ParseValues(readFile(b, name+".pcrs.json"))
	if err != nil {
		b.Fatal(err)
	}
	dev, nonce := faketpm.New(), attest.Digest{1}
	dev.PCRs = make(map[int]attest.Digest)
	quoted := make(map[int][]byte)
	var list []parser.PCR
	for _, i := range attest.QuotedPCRs {
		v := values[eventlog.SHA256][i]
		dev.PCRs[i], quoted[i] = attest.Digest(v), v
		list = append(list, parser.PCR{Index: i, Digest: v, DigestAlg: crypto.SHA256})
	}
	p, err := dev.Attest(nonce)
	if err != nil {
		b.Fatal(err)
	}
	area := dev.Identity().AK
	theirs := func() {
		key, err := parser.ParseAKPublic(area)
		if err != nil {
			b.Fatal(err)
		}
		if err := key.Verify(parser.Quote{Quote: p.Quote, Signature: p.QuoteSig}, list, nonce[:]); err != nil {
			b.Fatal(err)
		}
		log, err := parser.ParseEventLog(data)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := log.Verify(list); err != nil {
			b.Fatal(err)
		}
	}
	ours := func() {
		key, err := tpm.ParsePublic(area)
		if err != nil {
			b.Fatal(err)
		}
		if err := tpm.VerifySignature(key, p.Quote, p.QuoteSig); err != nil {
			b.Fatal(err)
		}
		s, err := tpm.ParseStatement(p.Quote)
		if err != nil {
			b.Fatal(err)
		}
		digest, err := tpm.PCRDigest(dev.PCRs)
		if err != nil {
			b.Fatal(err)
		}
		if !s.IsSigner(key) || !s.ExactlyQuoted() || !bytes.Equal(s.ExtraData, nonce[:]) || !bytes.Equal(s.PCRDigest, digest[:]) {
			b.Fatal("quote is not as it must be")
		}
		log, err := eventlog.Parse(data)
		if err != nil {
			b.Fatal(err)
		}
		if r := log.Appraise(eventlog.Options{Bank: eventlog.SHA256, PCRs: quoted, Complete: true}); r.Verdict != eventlog.VerdictPass {
			b.Fatal(r.Findings)
		}
	}
	var xs, ys []time.Duration
	for b.Loop() {
		start := time.Now()
		ours()
		middle := time.Now()
		theirs()
		xs, ys = append(xs, middle.Sub(start)), append(ys, time.Since(middle))
	}
	slices.Sort(xs)
	slices.Sort(ys)
	x, y := xs[len(xs)/2], ys[len(ys)/2]
	b.ReportMetric(float64(y)/float64(x), "ratio")
	b.ReportMetric(float64(x.Nanoseconds())/1000, "µs-strict")
	b.ReportMetric(float64(y.Nanoseconds())/1000, "µs-bare")
}
