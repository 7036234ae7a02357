package attest

import (
	"encoding/json"
	"fmt"
	"log/slog"
)

// Status is the tier of an appraisal (draft-ietf-rats-ear, "ear.status"). The
// zero value is none: no appraisal took place.
type Status int

// The tiers, numbered as AR4SI numbers them (draft-ietf-rats-ar4si, section 2.3.2).
const (
	StatusNone            Status = 0
	StatusAffirming       Status = 2
	StatusWarning         Status = 32
	StatusContraindicated Status = 96
)

func (s Status) String() string {
	switch s {
	case StatusNone:
		return "none"
	case StatusAffirming:
		return "affirming"
	case StatusWarning:
		return "warning"
	case StatusContraindicated:
		return "contraindicated"
	}
	return fmt.Sprintf("status-%d", int(s))
}

// ParseStatus is the inverse of Status.String.
func ParseStatus(s string) (Status, error) {
	for _, v := range []Status{StatusNone, StatusAffirming, StatusWarning, StatusContraindicated} {
		if v.String() == s {
			return v, nil
		}
	}
	return StatusNone, fmt.Errorf("unknown status %.64q", s)
}

// MarshalText implements encoding.TextMarshaler.
func (s Status) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *Status) UnmarshalText(b []byte) (err error) {
	*s, err = ParseStatus(string(b))
	return err
}

// Finding is one difference between what was expected and what was seen.
type Finding struct {
	Reason    Reason `json:"reason"`
	Component string `json:"component,omitempty"` // as Component.Name
	PCR       int    `json:"pcr"`
	Event     string `json:"event,omitempty"` // as Component.Event
	Expected  string `json:"expected,omitempty"`
	Seen      string `json:"seen,omitempty"`

	Severity Severity `json:"severity"`
	Rule     string   `json:"rule,omitempty"`   // id of the policy's rule
	Number   int      `json:"number,omitempty"` // position of the event in the log
	Sentence Text     `json:"sentence,omitzero"`
	Action   Text     `json:"action,omitzero"` // what to do
}

// Explained returns f with the words of its reason where it has none.
func (f Finding) Explained() Finding {
	w := f.Reason.Words()
	if f.Sentence == (Text{}) {
		f.Sentence = w.Sentence
	}
	if f.Action == (Text{}) {
		f.Action = w.Action
	}
	return f
}

// Change is one difference between the event log of a boot and that of the
// last boot of the same device that was affirmed.
type Change struct {
	PCR    int    `json:"pcr"`
	Number int    `json:"number"` // position in its log
	Type   uint32 `json:"type"`   // a hint: no PCR covers it
	Event  string `json:"event,omitempty"`
	Was    string `json:"was,omitempty"` // digest; empty if the event is new
	Is     string `json:"is,omitempty"`  // digest; empty if the event is gone
}

// PolicyID names the signed policy that a result follows.
type PolicyID struct {
	Organization string `json:"organization"`
	Version      uint64 `json:"version"`
	Digest       Digest `json:"digest"` // SHA-256 of the policy's content
}

func (p PolicyID) String() string {
	return fmt.Sprintf("%s/%d/%s", p.Organization, p.Version, p.Digest)
}

// Shadow is what a policy that is not enforced would have said.
type Shadow struct {
	Policy   PolicyID  `json:"policy"`
	Status   Status    `json:"status"`
	Reason   Reason    `json:"reason"`
	Detail   string    `json:"detail,omitempty"`
	Findings []Finding `json:"findings,omitempty"`
}

// Firmware is how common a device's firmware measurements (PCR 0 to 3) are.
type Firmware struct {
	Digest        Digest `json:"digest"`            // SHA-256 over model and values of PCR 0 to 3
	Model         string `json:"model,omitempty"`   // of the machine, as its firmware says
	Version       string `json:"version,omitempty"` // as the firmware calls itself
	Devices       int    `json:"devices"`           // other devices with these values
	Organizations int    `json:"organizations"`     // of so many organisations
}

func (f Finding) String() string {
	where := fmt.Sprintf("PCR %d", f.PCR)
	if f.Event != "" {
		where = f.Event + ", " + where
	}
	name := f.Component
	if name == "" {
		name = "measurement"
	}
	return fmt.Sprintf("%s (%s): expected %s, seen %s", name, where, short(f.Expected), short(f.Seen))
}

// short cuts a digest to what a person compares; the finding keeps the whole.
func short(s string) string {
	switch {
	case s == "":
		return "nothing"
	case len(s) > 16:
		return s[:16] + "…"
	}
	return s
}

// Result is an attestation result: the claims of an EAR (draft-ietf-rats-ear)
// that this project uses, in JSON. Only an affirming result opens anything.
type Result struct {
	Profile  string     `json:"eat_profile"`
	IssuedAt int64      `json:"iat"`             // seconds since 1970
	Verifier string     `json:"ear.verifier-id"` // name of the verifier
	Status   Status     `json:"ear.status"`
	Device   Digest     `json:"ueid"`
	Nonce    []byte     `json:"eat_nonce,omitempty"`
	Reason   Reason     `json:"sekisho.reason"`
	Detail   string     `json:"sekisho.detail,omitempty"`    // one sentence
	Findings []Finding  `json:"sekisho.findings,omitempty"`  // all differences
	Image    string     `json:"sekisho.image,omitempty"`     // name and version of the image that matched
	Events   []RunEvent `json:"sekisho.events,omitempty"`    // what was measured at run time, in order
	Policy   *PolicyID  `json:"sekisho.policy,omitempty"`    // nil: unsigned reference values only
	Shadow   *Shadow    `json:"sekisho.shadow,omitempty"`    // only if it differs
	Changes  []Change   `json:"sekisho.changes,omitempty"`   // since LastGood, if refused
	LastGood *Digest    `json:"sekisho.last_good,omitempty"` // event log of the last affirmed boot
	Firmware *Firmware  `json:"sekisho.firmware,omitempty"`
	Report   string     `json:"sekisho.report,omitempty"` // id of the stored report
}

// maxResult bounds ParseResult's input in bytes.
const maxResult = 256 << 10

// ParseResult reads a Result from JSON.
func ParseResult(data []byte) (*Result, error) {
	if len(data) > maxResult {
		return nil, fmt.Errorf("result: %d bytes, at most %d: %w", len(data), maxResult, ErrTooLarge)
	}
	var r Result
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, fmt.Errorf("result: %w", err)
	}
	if r.Profile != ResultType {
		return nil, fmt.Errorf("result: profile %.64q, want %q", r.Profile, ResultType)
	}
	return &r, nil
}

// Ticket is an enrolment ticket. Printing or logging one shows nothing of it.
type Ticket struct{ secret string }

// NewTicket wraps the text of a ticket.
func NewTicket(text string) Ticket { return Ticket{text} }

// Reveal returns the text of the ticket, for the wire and the state partition.
func (t Ticket) Reveal() string { return t.secret }

// IsZero reports whether there is no ticket.
func (t Ticket) IsZero() bool { return t.secret == "" }

func (t Ticket) String() string { return "[ticket]" }

// LogValue implements slog.LogValuer.
func (t Ticket) LogValue() slog.Value { return slog.StringValue(t.String()) }

// MarshalJSON implements json.Marshaler.
func (t Ticket) MarshalJSON() ([]byte, error) { return json.Marshal(t.String()) }
