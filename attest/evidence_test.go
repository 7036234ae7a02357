package attest

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
)

func sample() *Evidence {
	pcrs := make(map[int][]byte)
	for _, i := range QuotedPCRs {
		pcrs[i] = make([]byte, 32)
	}
	return &Evidence{
		Profile: Profile, Device: make([]byte, 32), Verifier: "v", Purpose: PurposeNetwork, Nonce: []byte("n"),
		Quote: []byte("q"), QuoteSig: []byte("s"), PCRs: pcrs, EventLog: []byte("log"),
		Key: []byte("k"), Certify: []byte("c"), CertifySig: []byte("t"),
	}
}

func encode(t testing.TB, e *Evidence) []byte {
	t.Helper()
	data, err := e.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestEvidenceRoundTrip(t *testing.T) {
	data := encode(t, sample())
	e, err := ParseEvidence(data)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(encode(t, e), data) {
		t.Error("another encoding after a round trip")
	}
}

func TestParseEvidenceRefuses(t *testing.T) {
	valid := encode(t, sample())
	for name, data := range map[string][]byte{
		"empty":              nil,
		"rubbish behind":     append(bytes.Clone(valid), 0),
		"truncated":          valid[:len(valid)-1],
		"too large":          make([]byte, MaxEvidence+1),
		"indefinite length":  append([]byte{0xbf}, append(bytes.Clone(valid[1:]), 0xff)...),
		"long form of a key": append([]byte{valid[0], 0x18, valid[1]}, valid[2:]...),
		"other type":         {0x80},
	} {
		if _, err := ParseEvidence(data); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	for name, change := range map[string]func(*Evidence){
		"profile":       func(e *Evidence) { e.Profile = "x" },
		"short device":  func(e *Evidence) { e.Device = e.Device[:31] },
		"long log":      func(e *Evidence) { e.EventLog = make([]byte, MaxEventLog+1) },
		"long quote":    func(e *Evidence) { e.Quote = make([]byte, MaxTPMBytes+1) },
		"long run log":  func(e *Evidence) { e.RunLog = make([]byte, MaxRunLog+1) },
		"pcr 24":        func(e *Evidence) { e.PCRs[24] = make([]byte, 32) },
		"short pcr":     func(e *Evidence) { e.PCRs[0] = make([]byte, 20) },
		"long verifier": func(e *Evidence) { e.Verifier = strings.Repeat("v", MaxName+1) },
	} {
		e := sample()
		change(e)
		enc, _, err := codec()
		if err != nil {
			t.Fatal(err)
		}
		data, err := enc.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ParseEvidence(data); err == nil {
			t.Errorf("%s: accepted", name)
		}
		if _, err := e.Encode(); err == nil {
			t.Errorf("%s: encoded", name)
		}
	}
	if _, err := ParseEvidence(make([]byte, MaxEvidence+1)); !errors.Is(err, ErrTooLarge) {
		t.Errorf("%v, want ErrTooLarge", err)
	}
}

func FuzzParseEvidence(f *testing.F) {
	f.Add(encode(f, sample()))
	f.Add([]byte{0xa0})
	f.Fuzz(func(t *testing.T, data []byte) {
		e, err := ParseEvidence(data)
		if err != nil {
			return
		}
		if !bytes.Equal(encode(t, e), data) {
			t.Error("accepted another encoding than its own")
		}
	})
}

// TestBinding shows that each part of the tuple counts, and that no bytes can
// be moved from one part to the next.
func TestBinding(t *testing.T) {
	base := Binding{Nonce: []byte("ab"), Verifier: "c", Purpose: PurposeNetwork}
	seen := make(map[Digest]string)
	for name, b := range map[string]Binding{
		"base":          base,
		"nonce":         {Nonce: []byte("ac"), Verifier: "c", Purpose: PurposeNetwork},
		"moved":         {Nonce: []byte("a"), Verifier: "bc", Purpose: PurposeNetwork},
		"verifier":      {Nonce: []byte("ab"), Verifier: "d", Purpose: PurposeNetwork},
		"purpose":       {Nonce: []byte("ab"), Verifier: "c", Purpose: 2},
		"device":        {Nonce: []byte("ab"), Verifier: "c", Purpose: PurposeNetwork, Device: Digest{1}},
		"key":           {Nonce: []byte("ab"), Verifier: "c", Purpose: PurposeNetwork, Key: Digest{1}},
		"log":           {Nonce: []byte("ab"), Verifier: "c", Purpose: PurposeNetwork, EventLog: Digest{1}},
		"run-time log":  {Nonce: []byte("ab"), Verifier: "c", Purpose: PurposeNetwork, RunLog: []byte{1}},
		"empty nonce":   {Verifier: "c", Purpose: PurposeNetwork},
		"nothing given": {},
	} {
		d, err := b.Digest()
		if err != nil {
			t.Fatal(err)
		}
		if other, twice := seen[d]; twice {
			t.Errorf("%s and %s have the same digest", name, other)
		}
		seen[d] = name
	}
	// A frozen value: changing the encoding would cut off every device.
	d, err := base.Digest()
	if err != nil {
		t.Fatal(err)
	}
	if want := "b5a6757124c383dc6d939b70fad11b0e92a604729548bd17b49abaca7a5c5d55"; d.String() != want {
		t.Errorf("digest of the base binding is %s, want %s", d, want)
	}
}

func TestReasonNames(t *testing.T) {
	seen := make(map[string]Reason)
	for r, name := range reasonNames {
		if other, twice := seen[name]; twice {
			t.Errorf("%d and %d are both called %q", r, other, name)
		}
		seen[name] = r
		if back, err := ParseReason(r.String()); err != nil || back != r {
			t.Errorf("%d → %q → %d, %v", r, r, back, err)
		}
	}
	if _, err := ParseReason("reason-999"); err == nil {
		t.Error("an unknown reason was parsed")
	}
}

func TestStatusIsClosedByDefault(t *testing.T) {
	var r Result
	if r.Status == StatusAffirming {
		t.Error("the zero result affirms")
	}
	for _, s := range []Status{StatusNone, StatusAffirming, StatusWarning, StatusContraindicated} {
		if back, err := ParseStatus(s.String()); err != nil || back != s {
			t.Errorf("%d → %q → %d, %v", s, s, back, err)
		}
	}
	if _, err := ParseResult([]byte(`{"ear.status":"affirming"}`)); err == nil {
		t.Error("a result without profile was parsed")
	}
}

func TestTicketIsNotShown(t *testing.T) {
	ticket := NewTicket("secret")
	var b strings.Builder
	slog.New(slog.NewJSONHandler(&b, nil)).Info("x", "ticket", ticket)
	fmt.Fprintf(&b, "%v %+v %s", ticket, struct{ T Ticket }{ticket}, ticket)
	if strings.Contains(b.String(), "secret") || ticket.Reveal() != "secret" {
		t.Error(b.String())
	}
}

func FuzzParseResult(f *testing.F) {
	f.Add([]byte(`{"eat_profile":"` + ResultType + `","ear.status":"affirming","sekisho.reason":""}`))
	f.Fuzz(func(t *testing.T, data []byte) { ParseResult(data) })
}

func FuzzParseReferenceValues(f *testing.F) {
	f.Add([]byte(`{"image":"a","pcrs":{"4":"` + Digest{}.String() + `"}}`))
	f.Fuzz(func(t *testing.T, data []byte) { ParseReferenceValues(data) })
}

func FuzzParseOrganization(f *testing.F) {
	f.Add([]byte(`{"name":"a","ca":"","verifiers":[{"address":"192.0.2.1:443","server_name":"v"}]}`))
	f.Fuzz(func(t *testing.T, data []byte) { ParseOrganization(data) })
}
