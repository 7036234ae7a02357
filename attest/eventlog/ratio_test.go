package eventlog_test

import (
	"crypto"
	"slices"
	"testing"
	"time"

	parser "github.com/google/go-attestation/attest"

	"sekisho/attest/eventlog"
)

// BenchmarkRatioWindowsLog compares the strict layer with bare go-attestation on
// the same 43 KB Windows log in one run: it reports how many logs we judge for
// each one that go-attestation parses and verifies (bar of issue 3: 0.8). Both
// take turns, so that the machine's moods meet both; medians count.
func BenchmarkRatioWindowsLog(b *testing.B) {
	const name = "eventlog-with-pcrs/guard-win-supermicro-wbclquote"
	data, pcrs := readCorpus(b, name+".eventlog"), readBanks(b, name+".pcrs.json")[eventlog.SHA256]
	var list []parser.PCR
	for i, v := range pcrs {
		list = append(list, parser.PCR{Index: i, Digest: v, DigestAlg: crypto.SHA256})
	}
	bare := func() {
		l, err := parser.ParseEventLog(data)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := l.Verify(list); err != nil {
			b.Fatal(err)
		}
	}
	strict := func() {
		l, err := eventlog.Parse(data)
		if err != nil {
			b.Fatal(err)
		}
		if r := l.Appraise(eventlog.Options{Bank: eventlog.SHA256, PCRs: pcrs}); r.Verdict != pass {
			b.Fatal(r.Findings)
		}
	}
	ours, theirs := medians(b, strict, bare)
	b.ReportMetric(float64(theirs)/float64(ours), "ratio")
	b.ReportMetric(float64(ours.Nanoseconds())/1000, "µs-strict")
	b.ReportMetric(float64(theirs.Nanoseconds())/1000, "µs-bare")
}

// medians times x and y in turns.
func medians(b *testing.B, x, y func()) (time.Duration, time.Duration) {
	var xs, ys []time.Duration
	for b.Loop() {
		start := time.Now()
		x()
		middle := time.Now()
		y()
		xs, ys = append(xs, middle.Sub(start)), append(ys, time.Since(middle))
	}
	slices.Sort(xs)
	slices.Sort(ys)
	return xs[len(xs)/2], ys[len(ys)/2]
}
