package eventlog_test

import (
	"crypto"
	"encoding/binary"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"testing"

	parser "github.com/google/go-attestation/attest"

	"sekisho/attest/eventlog"
	"sekisho/attest/eventlog/second"
)

// agree demands that the second reader accepts what Parse makes of data.
func agree(t *testing.T, data []byte) {
	t.Helper()
	l, err := eventlog.Parse(data)
	if err != nil {
		return
	}
	if err := second.Check(data, l); err != nil && !vendorInfo(data) {
		t.Fatal(err)
	}
}

// vendorInfo reports whether the Spec ID event says another length of its
// vendor's part than it has, which the second reader alone minds.
func vendorInfo(data []byte) bool {
	size := binary.LittleEndian.Uint32(data[28:])
	body := data[32 : 32+size]
	at := 28 + 4*int(binary.LittleEndian.Uint32(body[24:]))
	return at >= len(body) || int(body[at]) != len(body)-at-1
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
		other, err := parser.ParseEventLog(data)
		if err != nil {
			t.Fatalf("%s: %v", s.file, err)
		}
		for _, p := range l.Appraise(eventlog.Options{Bank: eventlog.SHA256, PCRs: pcrs}).PCRs {
			_, err := other.Verify([]parser.PCR{{Index: p.PCR, Digest: pcrs[p.PCR], DigestAlg: crypto.SHA256}})
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
