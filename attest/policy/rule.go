package policy

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"sekisho/attest"
)

// Op is how a rule judges a fact. The zero value is none and is refused.
type Op uint8

// The operations, numbered by hand.
const (
	OpIn       Op = 1 // the fact is one of the values
	OpEqual    Op = 2 // the fact is the value
	OpMinimum  Op = 3 // the fact, a version, is at least the value
	OpContains Op = 4 // the fact, a set, holds every value
)

var opNames = map[Op]string{OpIn: "in", OpEqual: "equal", OpMinimum: "minimum", OpContains: "contains"}

func (o Op) String() string {
	if s, ok := opNames[o]; ok {
		return s
	}
	return fmt.Sprintf("op-%d", uint8(o))
}

// ParseOp is the inverse of Op.String.
func ParseOp(s string) (Op, error) {
	for o, name := range opNames {
		if s == name {
			return o, nil
		}
	}
	return 0, fmt.Errorf("unknown operation %.64q: want in, equal, minimum or contains", s)
}

// MarshalText implements encoding.TextMarshaler.
func (o Op) MarshalText() ([]byte, error) { return []byte(o.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (o *Op) UnmarshalText(b []byte) (err error) {
	*o, err = ParseOp(string(b))
	return err
}

// Facts are what an appraisal has proven about a device, by name. A fact that
// is absent is unknown, and no rule about it is met.
type Facts map[string][]string

// The facts. PCRs are "pcr.N" for each N of attest.QuotedPCRs.
const (
	FactImage         = "image"                  // "NAME VERSION" of the image that matched
	FactImageVersion  = "image.version"          // of that image
	FactSecureBoot    = "secure-boot"            // on, off; unknown if it cannot be derived
	FactDBX           = "dbx"                    // SHA-256 digests that the firmware refuses to start
	FactTPMFirmware   = "tpm.firmware"           // of the TPM, four numbers of 16 bits
	FactFirmware      = "firmware.version"       // as the firmware calls itself
	FactDevices       = "firmware.devices"       // other devices with the same PCR 0 to 3
	FactOrganizations = "firmware.organizations" // of so many organisations
	FactModel         = "model"                  // of the machine, as its firmware says
	FactVolume        = "volume"                 // first, same, changed; absent until the work disk is unlocked
)

// FactPCR names the fact that holds the value of a PCR.
func FactPCR(pcr int) string { return "pcr." + strconv.Itoa(pcr) }

// kinds says which operations each fact allows.
func kinds(fact string) []Op {
	word := []Op{OpIn, OpEqual}
	switch fact {
	case FactImage, FactSecureBoot, FactFirmware, FactModel, FactVolume:
		return word
	case FactImageVersion, FactTPMFirmware, FactDevices, FactOrganizations:
		return []Op{OpIn, OpEqual, OpMinimum}
	case FactDBX:
		return []Op{OpContains}
	}
	for _, pcr := range attest.QuotedPCRs {
		if fact == FactPCR(pcr) {
			return word
		}
	}
	return nil
}

// Rule is one demand on one fact.
type Rule struct {
	ID       string          `json:"id"`
	Fact     string          `json:"fact"`
	Op       Op              `json:"op"`
	Values   []string        `json:"values"`
	Severity attest.Severity `json:"severity"`
	Why      attest.Text     `json:"why"`         // both languages
	Do       attest.Text     `json:"do,omitzero"` // what to do when it is not met
}

func (r Rule) validate() error {
	var errs []error
	if r.ID == "" || len(r.ID) > maxName {
		errs = append(errs, fmt.Errorf("id %.64q: want 1 to %d bytes", r.ID, maxName))
	}
	allowed := kinds(r.Fact)
	if allowed == nil {
		errs = append(errs, fmt.Errorf("unknown fact %.64q", r.Fact))
	} else if !slices.Contains(allowed, r.Op) {
		errs = append(errs, fmt.Errorf("%s cannot be judged by %s, only by %v", r.Fact, r.Op, allowed))
	}
	if r.Severity > attest.SeverityWarn {
		errs = append(errs, fmt.Errorf("severity %d is unknown", r.Severity))
	}
	if r.Why.JA == "" || r.Why.EN == "" {
		errs = append(errs, errors.New("why: both ja and en are needed"))
	}
	for _, text := range []string{r.Why.JA, r.Why.EN, r.Do.JA, r.Do.EN} {
		if len(text) > maxText {
			errs = append(errs, fmt.Errorf("text of %d bytes, at most %d", len(text), maxText))
		}
	}
	if slices.ContainsFunc(r.Values, func(v string) bool { return len(v) > maxText }) {
		errs = append(errs, fmt.Errorf("value of over %d bytes", maxText))
	}
	switch {
	case len(r.Values) == 0 || len(r.Values) > maxValues:
		errs = append(errs, fmt.Errorf("%d values, want 1 to %d", len(r.Values), maxValues))
	case len(r.Values) > 1 && (r.Op == OpEqual || r.Op == OpMinimum):
		errs = append(errs, fmt.Errorf("%d values, %s wants 1", len(r.Values), r.Op))
	case r.Op == OpMinimum:
		if _, err := version(r.Values[0]); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// maxFindings bounds what one result says; the most severe come first.
const maxFindings = 32

// Evaluate returns a finding for each rule that facts do not meet, the most
// severe first.
func Evaluate(rules []Rule, facts Facts) []attest.Finding {
	var list []attest.Finding
	for _, r := range rules {
		met, expected := r.met(facts[r.Fact])
		if met {
			continue
		}
		seen := "unknown"
		if v := facts[r.Fact]; len(v) == 1 {
			seen = v[0]
		} else if len(v) > 1 {
			seen = fmt.Sprintf("%d values", len(v))
		}
		f := attest.Finding{
			Reason: attest.ReasonPolicyRule, Component: r.Fact, Expected: expected, Seen: seen,
			Severity: r.Severity, Rule: r.ID, Sentence: r.Why, Action: r.Do,
		}
		if n, ok := strings.CutPrefix(r.Fact, "pcr."); ok {
			f.PCR, _ = strconv.Atoi(n) // validate knows only numbers
		} else if r.Fact == FactSecureBoot || r.Fact == FactDBX {
			f.PCR = 7
		}
		list = append(list, f.Explained())
	}
	slices.SortStableFunc(list, func(a, b attest.Finding) int { return cmp.Compare(a.Severity, b.Severity) })
	return list[:min(len(list), maxFindings)]
}

// met judges a fact and says in short what was expected of it.
func (r Rule) met(fact []string) (ok bool, expected string) {
	switch r.Op {
	case OpIn, OpEqual:
		expected = r.Values[0]
		if len(r.Values) > 1 {
			expected = fmt.Sprintf("one of %d values", len(r.Values))
		}
		return len(fact) == 1 && slices.Contains(r.Values, fact[0]), expected
	case OpMinimum:
		expected = "at least " + r.Values[0]
		if len(fact) != 1 {
			return false, expected
		}
		have, err := version(fact[0])
		want, err2 := version(r.Values[0])
		return err == nil && err2 == nil && slices.Compare(have, want) >= 0, expected
	case OpContains:
		have := make(map[string]bool, len(fact))
		for _, v := range fact {
			have[strings.ToLower(v)] = true
		}
		missing := 0
		for _, v := range r.Values {
			if !have[strings.ToLower(v)] {
				missing++
			}
		}
		return missing == 0, fmt.Sprintf("%d entries, of which %d are missing", len(r.Values), missing)
	}
	return false, "an operation that is known"
}

// version reads dotted numbers. Zeros at the end do not count: 1.2 is 1.2.0.
func version(s string) ([]uint64, error) {
	var v []uint64
	if len(s) > maxName {
		return nil, fmt.Errorf("version of %d bytes", len(s))
	}
	for part := range strings.SplitSeq(s, ".") {
		n, err := strconv.ParseUint(part, 10, 64)
		if err != nil {
			return nil, fmt.Errorf("version %.64q: want numbers with dots between them", s)
		}
		v = append(v, n)
	}
	for len(v) > 0 && v[len(v)-1] == 0 {
		v = v[:len(v)-1]
	}
	return v, nil
}
