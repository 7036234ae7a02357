package tpm_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"slices"
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/attest/tpm"
	"sekisho/attest/tpm/faketpm"
)

// BenchmarkRatioQuote compares the judgement of a quote without a log (key of
// our record, signature, statement, signer, selection, digest of the PCRs,
// binding) with the raw verification of a P-256 signature in one run: it
// reports how many quotes we judge for each raw verification (bar of issue 3:
// 0.7). Both take turns; medians count.
func BenchmarkRatioQuote(b *testing.B) {
	dev, binding := faketpm.New(), attest.Binding{Nonce: make([]byte, 64), Verifier: "verifier.example", Purpose: attest.PurposeNetwork}
	extra, err := binding.Digest()
	if err != nil {
		b.Fatal(err)
	}
	p, err := dev.Attest(extra)
	if err != nil {
		b.Fatal(err)
	}
	id := dev.Identity()
	pcrs := make(map[int]attest.Digest)
	for _, i := range attest.QuotedPCRs {
		pcrs[i] = dev.PCRs[i]
	}
	judge := func() {
		ak, err := tpm.ParsePublic(id.AK)
		if err != nil {
			b.Fatal(err)
		}
		if err := tpm.VerifySignature(ak, p.Quote, p.QuoteSig); err != nil {
			b.Fatal(err)
		}
		s, err := tpm.ParseStatement(p.Quote)
		if err != nil {
			b.Fatal(err)
		}
		extra, err := binding.Digest()
		if err != nil {
			b.Fatal(err)
		}
		values, err := tpm.PCRDigest(pcrs)
		if err != nil {
			b.Fatal(err)
		}
		if !s.IsSigner(ak) || !s.ExactlyQuoted() || !bytes.Equal(s.ExtraData, extra[:]) || !bytes.Equal(s.PCRDigest, values[:]) {
			b.Fatal("quote is not as it must be")
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	digest := sha256.Sum256(p.Quote)
	r, s, err := ecdsa.Sign(rand.Reader, key, digest[:])
	if err != nil {
		b.Fatal(err)
	}
	raw := func() {
		if !ecdsa.Verify(&key.PublicKey, digest[:], r, s) {
			b.Fatal("signature")
		}
	}
	var ours, theirs []time.Duration
	for b.Loop() {
		start := time.Now()
		judge()
		middle := time.Now()
		raw()
		ours, theirs = append(ours, middle.Sub(start)), append(theirs, time.Since(middle))
	}
	slices.Sort(ours)
	slices.Sort(theirs)
	mine, base := ours[len(ours)/2], theirs[len(theirs)/2]
	b.ReportMetric(float64(base)/float64(mine), "ratio")
	b.ReportMetric(float64(mine.Nanoseconds())/1000, "µs-quote")
	b.ReportMetric(float64(base.Nanoseconds())/1000, "µs-raw")
}
