package eventlog

import (
	"bytes"
	"encoding/hex"
	"slices"

	"sekisho/attest"
)

// Options say what a log is judged against.
type Options struct {
	// Bank is the bank of the values; only its digests count.
	Bank Bank
	// PCRs are the values that a quote has proven, nil if there are none: then
	// the log can be read and its form judged, but nothing in it is proven.
	PCRs map[int][]byte
	// Complete says that every PCR in PCRs is explained by this log alone. If
	// not set, PCR 10 and above may have been extended by user space without an
	// event here.
	Complete bool
}

// State is how a PCR's value and its events go together. The zero value is not
// judged.
type State string

// The states.
const (
	StateUnjudged  State = ""          // no value to compare with
	StateReset     State = "reset"     // neither extended nor with events
	StateMatch     State = "match"     // the events give the value
	StateMismatch  State = "mismatch"  // they do not
	StateMissing   State = "missing"   // extended, and no event says by what
	StateUserSpace State = "userspace" // extended, and by user space, as far as this log goes
)

// PCRReport is the replay of one PCR.
type PCRReport struct {
	PCR      int    `json:"pcr"`
	Events   int    `json:"events"`
	Replayed string `json:"replayed,omitempty"` // hexadecimal; absent without events
	Value    string `json:"value,omitempty"`    // as given; absent if none was given
	State    State  `json:"state,omitempty"`
}

// Verdict is the outcome of an appraisal. The zero value refuses.
type Verdict uint8

// The verdicts.
const (
	VerdictRefuse Verdict = 0
	VerdictPass   Verdict = 1
)

func (v Verdict) String() string {
	if v == VerdictPass {
		return "pass"
	}
	return "refuse"
}

// MarshalText implements encoding.TextMarshaler.
func (v Verdict) MarshalText() ([]byte, error) { return []byte(v.String()), nil }

// Report is what Appraise found.
type Report struct {
	Verdict    Verdict         `json:"verdict"`
	SecureBoot SecureBoot      `json:"secureBoot"`
	Format     Format          `json:"format"`
	Bank       Bank            `json:"bank"`
	Banks      []Bank          `json:"banks"` // that the log can be judged by
	Events     int             `json:"events"`
	Proven     bool            `json:"proven"` // PCR values were given and the verdict is pass
	PCRs       []PCRReport     `json:"pcrs"`
	Findings   []attest.Remark `json:"findings"`
}

// Unreadable is the report on a log that Read refused with err.
func Unreadable(err *attest.Refusal) *Report {
	return &Report{Findings: []attest.Remark{err.Remark()}, PCRs: []PCRReport{}, Banks: []Bank{}}
}

// appraisal is an Appraise under way.
type appraisal struct {
	*Log
	Options
	report *Report
	pcrs   [24]pcrState
}

// pcrState is what the events of one PCR add up to.
type pcrState struct {
	events, separators int
	value              [64]byte // replayed, first Bank.Size bytes
	locality           bool     // PCR 0: the log names the startup locality
}

// Appraise judges the log. The verdict is pass if no finding is of severity
// block.
//
// With the values of a quote, and Complete, pass and no finding of severity
// degrade prove what Check lists. Without Complete, the same is proven for PCR
// 0 to 9 and for every other PCR that has events.
func (l *Log) Appraise(o Options) *Report {
	r := &Report{Format: l.Format, Bank: o.Bank, Banks: l.Banks(), Events: l.count, PCRs: make([]PCRReport, 0, 24), Findings: []attest.Remark{}}
	a := &appraisal{Log: l, Options: o, report: r}
	if a.digests() {
		a.locality()
		a.replay()
		a.compare()
		a.separators()
		a.rules()
		r.SecureBoot = a.state()
	}
	r.Verdict = VerdictPass
	for _, f := range r.Findings {
		if f.Severity == attest.SeverityBlock {
			r.Verdict = VerdictRefuse
		}
	}
	r.Proven = o.PCRs != nil && r.Verdict == VerdictPass
	return r
}

func say(ja, en string, a ...any) attest.Text { return attest.Say(ja, en, a...) }

func joined(a, b attest.Text) attest.Text { return attest.Text{JA: a.JA + b.JA, EN: a.EN + b.EN} }

// find adds a finding on the whole log.
func (a *appraisal) find(severity attest.Severity, code attest.Reason, what attest.Text) *attest.Remark {
	a.report.Findings = append(a.report.Findings, attest.NewRemark(severity, code, what))
	return &a.report.Findings[len(a.report.Findings)-1]
}

func (a *appraisal) findPCR(severity attest.Severity, code attest.Reason, pcr int, what attest.Text) *attest.Remark {
	f := a.find(severity, code, what)
	f.PCR = &pcr
	return f
}

func (a *appraisal) findEvent(severity attest.Severity, code attest.Reason, e *Event, what attest.Text) *attest.Remark {
	f := a.findPCR(severity, code, e.PCR, joined(say("イベント %d：", "event %d: ", e.Number), what))
	n := e.Number
	f.Event = &n
	return f
}

// digests reports whether the log can be replayed in the bank at all.
func (a *appraisal) digests() bool {
	if a.Bank.Size() == 0 {
		a.find(attest.SeverityBlock, attest.ReasonLogNoSHA256, say("バンク %s は再現できません。", "bank %s cannot be replayed", a.Bank))
		return false
	}
	for i := range a.Events {
		if e := &a.Events[i]; e.DigestIn(a.Bank) == nil {
			a.findEvent(attest.SeverityBlock, attest.ReasonLogNoSHA256, e, say("%s のダイジェストがありません。このログは %v で判定できます。", "it has no %s digest; the log can be judged by %v", a.Bank, a.report.Banks))
			return false
		}
	}
	if a.Bank == SHA1 {
		a.find(attest.SeverityWarn, attest.ReasonLogNoSHA256, say("SHA-1 は偽造できます。", "SHA-1 can be forged")).Action = attest.ReasonLogNoSHA256.Words().Action
	}
	if a.PCRs == nil {
		a.find(attest.SeverityWarn, attest.ReasonPCRSelection, say("比較する PCR の値がありません。形式だけを判定し、内容は何も証明されていません。", "no PCR values to compare with: the log's form was judged, nothing in it is proven")).Action = attest.Text{JA: "証明された PCR の値を -pcrs で指定してください。", EN: "Give the PCR values that a quote proves with -pcrs."}
	}
	return true
}

// localityEvent begins a TCG_EfiStartupLocalityEvent (section 10.4.5.3); one
// byte follows.
const localityEvent = "StartupLocality\x00"

// locality sets PCR 0's initial value. The event may stand only before what it
// explains, only for PCR 0, only once.
func (a *appraisal) locality() {
	first := a.count // first event that extends PCR 0
	for i := range a.Events {
		if a.Events[i].PCR == 0 {
			first = a.Events[i].Number
			break
		}
	}
	for i := range a.Notes {
		e := &a.Notes[i]
		if !bytes.HasPrefix(e.Data, []byte(localityEvent)) {
			continue
		}
		if e.PCR != 0 || e.Number > first || a.pcrs[0].locality || len(e.Data) != len(localityEvent)+1 {
			a.findEvent(attest.SeverityBlock, attest.ReasonLogOrder, e, say("StartupLocality は PCR 0 の最初のイベントの前に一度だけ置けます。", "a startup locality may only stand once, for PCR 0, before its first event"))
			continue
		}
		switch at := e.Data[len(localityEvent)]; at {
		case 0, 3, 4:
			a.pcrs[0].locality = true
			a.pcrs[0].value[a.Bank.Size()-1] = at
		default:
			a.findEvent(attest.SeverityBlock, attest.ReasonLogOrder, e, say("StartupLocality が %d です（0、3、4 のいずれか）。", "startup locality %d, want 0, 3 or 4", at))
		}
	}
}

// replay extends each PCR with its events.
func (a *appraisal) replay() {
	for i := range a.Events {
		e := &a.Events[i]
		p := &a.pcrs[e.PCR]
		p.events++
		a.Bank.extend(&p.value, e.DigestIn(a.Bank))
	}
}

// extend replaces value with the digest of value and digest.
func (b Bank) extend(value *[64]byte, digest []byte) {
	var buf [128]byte
	n := copy(buf[:], value[:b.Size()])
	n += copy(buf[n:], digest)
	b.Sum(value[:0], buf[:n])
}

// from replays one PCR from a value, with more digests at its end.
func (a *appraisal) from(pcr int, value [64]byte, more ...[]byte) []byte {
	size := a.Bank.Size()
	for i := range a.Events {
		if e := &a.Events[i]; e.PCR == pcr {
			a.Bank.extend(&value, e.DigestIn(a.Bank))
		}
	}
	for _, d := range more {
		a.Bank.extend(&value, d)
	}
	return value[:size]
}

// compare judges every PCR that has a value, then reports all that have
// something to show.
func (a *appraisal) compare() {
	for pcr := range a.pcrs {
		p := &a.pcrs[pcr]
		line := PCRReport{PCR: pcr, Events: p.events}
		replayed := p.value[:a.Bank.Size()]
		if p.events > 0 {
			line.Replayed = hex.EncodeToString(replayed)
		}
		if value, given := a.PCRs[pcr]; given {
			line.Value = hex.EncodeToString(value)
			line.State = a.judge(pcr, value, replayed)
		} else if p.events == 0 {
			continue
		} else if a.PCRs != nil && pcr <= 7 {
			a.findPCR(attest.SeverityWarn, attest.ReasonPCRSelection, pcr, say("PCR %d の値がありません。そのイベントは何も証明されていません。", "no value of PCR %d was given: nothing in its events is proven", pcr))
		}
		a.report.PCRs = append(a.report.PCRs, line)
	}
	for pcr := range a.PCRs {
		if pcr < 0 || pcr >= len(a.pcrs) {
			a.find(attest.SeverityBlock, attest.ReasonPCRSelection, say("PCR %d は存在しません。", "PCR %d does not exist", pcr))
		}
	}
}

func (a *appraisal) judge(pcr int, value, replayed []byte) State {
	switch p := &a.pcrs[pcr]; {
	case len(value) != a.Bank.Size():
		a.findPCR(attest.SeverityBlock, attest.ReasonPCRSelection, pcr, say("PCR %d の値が %d バイトです（%d バイトが必要）。", "value of PCR %d has %d bytes, want %d", pcr, len(value), a.Bank.Size()))
		return StateMismatch
	case p.events == 0 && isReset(pcr, value):
		return StateReset
	case p.events == 0 && pcr >= 10 && !a.Complete && !(pcr >= 11 && pcr <= 14 && a.isWindows()):
		a.findPCR(attest.SeverityWarn, attest.ReasonLogMissingEvents, pcr, say("PCR %d は起動後に拡張されており、ファームウェアのログには現れません。", "PCR %d was extended by user space, which a firmware log does not show", pcr))
		return StateUserSpace
	case p.events == 0:
		a.findPCR(attest.SeverityBlock, attest.ReasonLogMissingEvents, pcr, say("PCR %d は拡張されていますが、その内容がイベントログにありません。", "PCR %d was extended and the event log does not say by what", pcr))
		return StateMissing
	case bytes.Equal(value, replayed):
		return StateMatch
	case a.quirk(pcr, value):
		return StateMatch
	}
	severity, why := attest.SeverityBlock, attest.Text{}
	if pcr == 0 && a.isHPE() {
		severity = attest.SeverityDegrade
		why = say("HPE サーバーのログで知られている欠落です。PCR 0 は値で判断してください。", ": known of HPE servers, whose logs leave something out; judge PCR 0 by its value")
	}
	f := a.findPCR(severity, attest.ReasonLogReplay, pcr, joined(say("イベントログから PCR %d の値を再現できません。", "the event log does not give the value of PCR %d", pcr), why))
	f.Expected, f.Seen = hex.EncodeToString(value), hex.EncodeToString(replayed)
	return StateMismatch
}

// isWindows reports whether Windows has written into the log: then all of what
// it measures stands there, and that is PCR 11 to 14 (BitLocker, boot
// configuration, boot details, boot authorities).
func (a *appraisal) isWindows() bool {
	return slices.ContainsFunc(a.Events, func(e Event) bool {
		return e.PCR >= 11 && e.PCR <= 14 && e.Type == TypeTag && sipaTag(&e)
	})
}

// isReset reports whether value is what a PCR holds after a reset: zeros, or
// ones for those of a dynamic launch that did not take place (section 3.3.1).
func isReset(pcr int, value []byte) bool {
	want := byte(0)
	if pcr >= 17 && pcr <= 22 && len(value) > 0 && value[0] == 0xff {
		want = 0xff
	}
	for _, b := range value {
		if b != want {
			return false
		}
	}
	return true
}

// state is the log's Secure Boot state, unknown unless PCR 7 stands firm.
func (a *appraisal) state() SecureBoot {
	for _, f := range a.report.Findings {
		if f.Severity == attest.SeverityBlock && (f.PCR == nil || *f.PCR == 7) {
			return SecureBootUnknown
		}
	}
	if _, given := a.PCRs[7]; a.PCRs != nil && !given {
		return SecureBootUnknown
	}
	return a.secureBoot(a.Bank)
}
