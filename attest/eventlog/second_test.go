package eventlog_test

import (
	"bytes"
	"crypto"
	"encoding/hex"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	parser "github.com/google/go-attestation/attest"

	"sekisho/attest/eventlog"
)

// agree demands that go-attestation, which knows no padding, reads from data
// the events that we read, and that it replays to the value of each PCR what
// replays for us.
func agree(t *testing.T, data []byte) {
	t.Helper()
	l, err := eventlog.Parse(data)
	if err != nil {
		return
	}
	var second *parser.EventLog
	for {
		if second, err = parser.ParseEventLog(data); err == nil {
			break
		}
		if n := len(data); n == 0 || data[n-1] != 0 && data[n-1] != 0xff {
			return // an algorithm that it does not know, or the like
		}
		data = data[:len(data)-1]
	}
	extends := slices.DeleteFunc(second.Events(parser.HashSHA256), func(e parser.Event) bool {
		return uint32(e.Type) == eventlog.TypeNoAction
	})
	// Bytes of padding can be an event of nothing to who does not know padding.
	if len(extends) < len(l.Events) {
		t.Fatalf("%d events, go-attestation reads %d", len(l.Events), len(extends))
	}
	for i, e := range l.Events {
		s := extends[i]
		if s.Index != e.PCR || uint32(s.Type) != e.Type || !bytes.Equal(s.Data, e.Data) || !bytes.Equal(s.Digest, e.Digest[:]) {
			t.Fatalf("event %d: %+v, go-attestation reads %+v", e.Number, e, s)
		}
	}
}

// TestSecondReader reads every crypto-agile log of the corpus with both.
func TestSecondReader(t *testing.T) {
	readCorpus(t, "MANIFEST.md")
	for _, s := range samples {
		data := readCorpus(t, s.file)
		agree(t, data)
		if s.want != pass || !strings.HasPrefix(s.file, "eventlog-with-pcrs/") || strings.Contains(s.file, "dl160") {
			continue
		}
		pcrs := readBanks(t, strings.TrimSuffix(s.file, ".eventlog")+".pcrs.json")[eventlog.SHA256]
		l, err := eventlog.Parse(data)
		if err != nil || pcrs == nil {
			continue
		}
		second, err := parser.ParseEventLog(data)
		if err != nil {
			t.Fatalf("%s: %v", s.file, err)
		}
		for _, p := range l.Appraise(eventlog.Options{Bank: eventlog.SHA256, PCRs: pcrs}).PCRs {
			_, err := second.Verify([]parser.PCR{{Index: p.PCR, Digest: pcrs[p.PCR], DigestAlg: crypto.SHA256}})
			if p.Events > 0 && pcrs[p.PCR] != nil && (err == nil) != (p.State == eventlog.StateMatch) {
				t.Errorf("%s: PCR %d: %s, go-attestation: %v", s.file, p.PCR, p.State, err)
			}
		}
	}
}

// seeds adds small logs of the corpus, where there is one.
func seeds(f *testing.F) {
	f.Add(image.Boot().Bytes())
	f.Add(append(image.Boot().Bytes(), 0, 0, 0))
	for _, s := range samples {
		if data, err := os.ReadFile(filepath.Join(corpus, s.file)); err == nil && len(data) < 25000 {
			f.Add(data)
		}
	}
}

func FuzzSecondReader(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, data []byte) { agree(t, data) })
}

// FuzzAppraise judges logs of either format in every bank.
func FuzzAppraise(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, data []byte) {
		l, err := eventlog.Read(data)
		if err != nil {
			return
		}
		for _, b := range l.Banks() {
			r := l.Appraise(eventlog.Options{Bank: b})
			if r.Proven {
				t.Error("proven without PCR values")
			}
			if r.Verdict == refuse && r.SecureBoot == on && len(l.Events) == 0 {
				t.Error("Secure Boot out of nothing")
			}
			// One's own replay never refuses by replay.
			values := make(map[int][]byte)
			for _, p := range r.PCRs {
				v, err := hex.DecodeString(p.Replayed)
				if err != nil {
					t.Fatal(err)
				}
				values[p.PCR] = v
			}
			for _, p := range l.Appraise(eventlog.Options{Bank: b, PCRs: values}).PCRs {
				if p.State == eventlog.StateMismatch {
					t.Errorf("%s PCR %d does not replay to its own replay", b, p.PCR)
				}
			}
		}
		two, err := eventlog.Read(data)
		if err != nil {
			t.Fatal(err)
		}
		l.Append(two)
	})
}

func FuzzParseValues(f *testing.F) {
	f.Add([]byte(`{"sha256":{"0":"00"},"sha1":{"23":"da39a3ee5e6b4b0d3255bfef95601890afd80709"}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		values, err := eventlog.ParseValues(data)
		if err != nil {
			return
		}
		for b, pcrs := range values {
			for i, v := range pcrs {
				if len(v) != b.Size() || i < 0 || i > 23 {
					t.Errorf("%s PCR %d of %d bytes", b, i, len(v))
				}
			}
		}
	})
}
