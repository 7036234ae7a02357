package attest

import "fmt"

// Say makes a Text of two formats that take the same arguments; where the
// languages want them in another order, a format names them by index.
func Say(ja, en string, a ...any) Text {
	return Text{fmt.Sprintf(ja, a...), fmt.Sprintf(en, a...)}
}

// Remark is one thing about a sample (an event log, a certificate, a bare
// quote): something that a good one does not do, or that a reader should know.
type Remark struct {
	Code     Reason   `json:"code"`
	Severity Severity `json:"severity"` // block: the sample is refused
	PCR      *int     `json:"pcr,omitempty"`
	Event    *int     `json:"event,omitempty"` // position in the log, the header being 0
	Expected string   `json:"expected,omitempty"`
	Seen     string   `json:"seen,omitempty"`
	Sentence Text     `json:"sentence"`
	Action   Text     `json:"action"` // what to do
}

// NewRemark returns a remark with the action of its reason. One that is only
// reported asks for nothing but attention.
func NewRemark(s Severity, code Reason, sentence Text) Remark {
	r := Remark{Code: code, Severity: s, Sentence: sentence, Action: code.Words().Action}
	if s == SeverityWarn {
		r.Action = Text{"ほかに問題がなければ、何もする必要はありません。", "Nothing needs to be done if this is all."}
	}
	return r
}

// Remark returns what a refusal says of a sample that could not be read. Its
// detail is technical and in English only.
func (r *Refusal) Remark() Remark {
	return NewRemark(SeverityBlock, r.Reason, Text{r.Reason.Words().Sentence.JA + "（" + r.Detail + "）", r.Detail})
}

// Finding returns the remark as a finding of a Result.
func (r Remark) Finding() Finding {
	f := Finding{Reason: r.Code, Severity: r.Severity, Expected: r.Expected, Seen: r.Seen, Sentence: r.Sentence, Action: r.Action}
	if r.PCR != nil {
		f.PCR = *r.PCR
	}
	if r.Event != nil {
		f.Number = *r.Event
	}
	return f
}
