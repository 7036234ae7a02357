package attest

import "testing"

// TestEveryReasonHasWords: a refusal without a sentence, or without something
// to do, in either language is worth little to those who read it.
func TestEveryReasonHasWords(t *testing.T) {
	for r, name := range reasonNames {
		if _, own := reasonWords[r]; !own {
			t.Errorf("%d %s: no words of its own", r, name)
		}
		w := r.Words()
		for _, s := range []string{w.Sentence.JA, w.Sentence.EN, w.Action.JA, w.Action.EN} {
			if s == "" {
				t.Errorf("%s: %+v", name, w)
			}
		}
	}
}

func TestSeverity(t *testing.T) {
	if (Finding{}).Severity != SeverityBlock {
		t.Error("the zero severity does not block")
	}
	for _, s := range []Severity{SeverityBlock, SeverityDegrade, SeverityWarn} {
		if got, err := ParseSeverity(s.String()); err != nil || got != s {
			t.Errorf("%v: %v %v", s, got, err)
		}
	}
	if s, err := ParseSeverity("none"); err == nil || s != SeverityBlock {
		t.Errorf("%v %v", s, err)
	}
}
