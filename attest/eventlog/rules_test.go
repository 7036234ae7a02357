package eventlog_test

import (
	"bytes"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"strings"
	"testing"

	"sekisho/attest"
	"sekisho/attest/eventlog"
	"sekisho/attest/eventlog/logtest"
)

// judge appraises a log by the values that its own events give, so that only
// the rules about events speak.
func judge(t *testing.T, l *logtest.Log) *eventlog.Report {
	t.Helper()
	log, err := eventlog.Read(l.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	values := make(map[int][]byte)
	for _, p := range log.Appraise(eventlog.Options{Bank: eventlog.SHA256}).PCRs {
		v, err := hex.DecodeString(p.Replayed)
		if err != nil {
			t.Fatal(err)
		}
		values[p.PCR] = v
	}
	return log.Appraise(eventlog.Options{Bank: eventlog.SHA256, PCRs: values})
}

func TestRules(t *testing.T) {
	locality := func(at byte) []byte { return append([]byte("StartupLocality\x00"), at) }
	secureBoot := logtest.Variable("SecureBoot", []byte{1})
	for _, c := range []struct {
		name   string
		change func(*logtest.Log)
		want   attest.Reason // none: no finding that blocks
		state  eventlog.SecureBoot
	}{
		{"plain", func(*logtest.Log) {}, 0, on},
		{"locality behind its events", func(l *logtest.Log) { l.Add(0, eventlog.TypeNoAction, locality(3), attest.Digest{}) }, attest.ReasonLogOrder, on},
		{"locality of PCR 1", func(l *logtest.Log) { l.Add(1, eventlog.TypeNoAction, locality(3), attest.Digest{}) }, attest.ReasonLogOrder, on},
		{"unknown type in PCR 4", func(l *logtest.Log) { l.Hashed(4, 0x0badcafe, nil) }, attest.ReasonLogEventType, on},
		{"unknown type in PCR 7", func(l *logtest.Log) { l.Hashed(7, 0x0badcafe, nil) }, attest.ReasonLogEventType, unknown},
		{"unused event in PCR 7", func(l *logtest.Log) { l.Hashed(7, 2, secureBoot) }, attest.ReasonLogEventType, unknown},
		{"unknown type in PCR 2", func(l *logtest.Log) { l.Hashed(2, 0x0badcafe, nil) }, 0, on},
		{"variable relabelled as an action", func(l *logtest.Log) { l.Hashed(7, eventlog.TypeEFIAction, secureBoot) }, attest.ReasonLogEventType, unknown},
		{"variable relabelled as an authority", func(l *logtest.Log) { l.Hashed(7, eventlog.TypeVariableAuth, secureBoot) }, attest.ReasonLogEventType, unknown},
		{"no variable", func(l *logtest.Log) { l.Hashed(7, eventlog.TypeVariableConfig, []byte("SecureBoot")) }, attest.ReasonLogMalformed, unknown},
		{"DMA off, as HP EliteBooks say", func(l *logtest.Log) { l.Hashed(7, eventlog.TypeEFIAction, []byte("DMA Protection Disabled")) }, 0, on},
		{"action changed in the log", func(l *logtest.Log) { l.Add(5, eventlog.TypeEFIAction, []byte("a"), attest.Digest{1}) }, attest.ReasonLogEventDigest, on},
		{"Windows' containers, 3 deep", func(l *logtest.Log) { l.Hashed(12, eventlog.TypeTag, nested(3)) }, 0, on},
		{"Windows' containers, 50 deep", func(l *logtest.Log) { l.Hashed(12, eventlog.TypeTag, nested(50)) }, attest.ReasonLogMalformed, on},
		{"Windows' event changed in the log", func(l *logtest.Log) { l.Add(13, eventlog.TypeTag, nested(1), attest.Digest{1}) }, attest.ReasonLogEventDigest, on},
		{"Linux' tag, whose digest is of something else", func(l *logtest.Log) {
			l.Add(12, eventlog.TypeTag, []byte{0xed, 0x22, 0x3b, 0x8f, 1, 0, 0, 0, 'x'}, attest.Digest{1})
		}, 0, on},
	} {
		l := image.Boot()
		c.change(l)
		r := judge(t, l)
		if got := firstBlock(r); got != c.want || r.SecureBoot != c.state {
			t.Errorf("%s: %v, Secure Boot %s; want %v, %s: %+v", c.name, got, r.SecureBoot, c.want, c.state, r.Findings)
		}
	}
	for at, want := range map[byte]attest.Reason{0: 0, 3: 0, 4: 0, 1: attest.ReasonLogOrder, 5: attest.ReasonLogOrder} {
		l := logtest.New()
		l.Add(0, eventlog.TypeNoAction, locality(at), attest.Digest{})
		for pcr := range 8 {
			l.Separator(pcr)
		}
		if got := firstBlock(judge(t, l)); got != want {
			t.Errorf("startup locality %d: %v, want %v", at, got, want)
		}
	}
}

// nested is a container of Windows in a container, and so on.
func nested(depth int) []byte {
	var b []byte
	for range depth {
		head := binary.LittleEndian.AppendUint32(nil, 0x40010001)
		b = append(binary.LittleEndian.AppendUint32(head, uint32(len(b))), b...)
	}
	return b
}

// TestStartupLocalityLeftOut accepts a PCR 0 that began at locality 3 without
// a word in the log, and says so.
func TestStartupLocalityLeftOut(t *testing.T) {
	l, err := eventlog.Parse(image.Boot().Bytes())
	if err != nil {
		t.Fatal(err)
	}
	value := attest.Digest{31: 3}
	for _, e := range l.Events {
		if e.PCR == 0 {
			value = sha256.Sum256(append(value[:], e.Digest[:]...))
		}
	}
	pcrs := image.Boot().PCRs()
	pcrs[0] = value
	if err := check(l, pcrs); err != nil {
		t.Error(err)
	}
	pcrs[0] = sha256.Sum256(value[:])
	if reason(t, check(l, pcrs)) != attest.ReasonLogReplay {
		t.Error("another value of PCR 0 was accepted")
	}
}

// TestExitBootServicesMissing is a machine whose log was read before the
// firmware wrote its last events: it passes, with a warning.
func TestExitBootServicesMissing(t *testing.T) {
	l, err := eventlog.Read(readCorpus(t, "eventlog-golden/goattestation-ebs_event_missing"))
	if err != nil {
		t.Fatal(err)
	}
	value, err := hex.DecodeString("31245808d6d35849bc394f6343f2b3ff908ed5e3") // as go-attestation's test states it
	if err != nil {
		t.Fatal(err)
	}
	r := l.Appraise(eventlog.Options{Bank: eventlog.SHA1, PCRs: map[int][]byte{5: value}})
	warned := false
	for _, f := range r.Findings {
		warned = warned || strings.Contains(f.Sentence.EN, "end of boot services")
	}
	if r.Verdict != pass || !warned {
		t.Errorf("%s, %+v", r.Verdict, r.Findings)
	}
	other := sha1.Sum(value)
	if r := l.Appraise(eventlog.Options{Bank: eventlog.SHA1, PCRs: map[int][]byte{5: other[:]}}); firstBlock(r) != attest.ReasonLogReplay {
		t.Errorf("another value: %+v", r.Findings)
	}
}

// TestSeveralLogs joins the logs of one boot of Windows: it wrote one more when
// it resumed.
func TestSeveralLogs(t *testing.T) {
	first, second, whole := image.Boot(), logtest.New(), image.Boot()
	for _, l := range []*logtest.Log{second, whole} {
		l.Hashed(12, eventlog.TypeTag, nested(2))
		l.Hashed(14, eventlog.TypeSeparator, []byte("WBCL"))
	}
	join := func(data ...[]byte) (*eventlog.Log, error) {
		var logs []*eventlog.Log
		for _, d := range data {
			l, err := eventlog.Read(d)
			if err != nil {
				t.Fatal(err)
			}
			logs = append(logs, l)
		}
		return logs[0], logs[0].Append(logs[1:]...)
	}
	l, err := join(first.Bytes(), second.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	if err := check(l, whole.PCRs()); err != nil {
		t.Error(err)
	}
	if l, err = join(first.Bytes()); err != nil || reason(t, check(l, whole.PCRs())) != attest.ReasonLogMissingEvents {
		t.Error("the first log alone was enough")
	}
	if l, err = join(second.Bytes(), first.Bytes(), first.Bytes()); err != nil || check(l, whole.PCRs()) == nil {
		t.Error("the same log twice was accepted")
	}
	if _, err = join(first.Bytes(), bytes.Repeat([]byte{0}, 64)); reason(t, err) != attest.ReasonLogMalformed {
		t.Errorf("a log of TCG 1.2 was joined: %v", err)
	}
}

// TestUserSpace shows what the verifier demands and a sample need not: PCR 10
// and above, extended by user space without an event.
func TestUserSpace(t *testing.T) {
	l, err := eventlog.Read(image.Boot().Bytes())
	if err != nil {
		t.Fatal(err)
	}
	values := make(map[int][]byte)
	for i, v := range image.Boot().PCRs() {
		values[i] = v[:]
	}
	values[15] = bytes.Repeat([]byte{1}, 32)
	o := eventlog.Options{Bank: eventlog.SHA256, PCRs: values}
	if r := l.Appraise(o); r.Verdict != pass {
		t.Errorf("sample: %+v", r.Findings)
	}
	o.Complete = true
	if r := l.Appraise(o); firstBlock(r) != attest.ReasonLogMissingEvents {
		t.Errorf("complete: %+v", r.Findings)
	}
	o = eventlog.Options{Bank: eventlog.SHA256, PCRs: map[int][]byte{11: values[15]}}
	if r := l.Appraise(o); firstBlock(r) != attest.ReasonLogReplay {
		t.Errorf("PCR 11 has events here that do not give its value: %+v", r.Findings)
	}
	o = eventlog.Options{Bank: eventlog.SHA384, PCRs: map[int][]byte{0: make([]byte, 48)}}
	if r := l.Appraise(o); r.Verdict != refuse || r.SecureBoot != unknown {
		t.Errorf("a bank that the log does not have: %+v", r)
	}
}
