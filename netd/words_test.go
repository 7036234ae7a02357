package netd

import (
	"go/ast"
	"go/parser"
	"go/token"
	"strings"
	"testing"
	"unicode"
)

// TestEveryReasonHasWords reads the reason codes from the source, so that none
// can be forgotten.
func TestEveryReasonHasWords(t *testing.T) {
	known := reasons()
	for _, file := range []string{"status.go", "words.go"} {
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(f, func(n ast.Node) bool {
			if v, ok := n.(*ast.ValueSpec); ok && strings.HasPrefix(v.Names[0].Name, "Reason") && len(v.Values) == 1 {
				code := strings.Trim(v.Values[0].(*ast.BasicLit).Value, `"`)
				if w := known[code]; w.EN == "" || !strings.ContainsFunc(w.JA, func(r rune) bool { return unicode.In(r, unicode.Hiragana) }) {
					t.Errorf("reason %q: words %+v", code, w)
				}
			}
			return true
		})
	}
}

func TestSay(t *testing.T) {
	for want, s := range map[string]Status{
		"Office hq": {State: Office, Office: &OfficeStatus{Site: "hq"}, Tunnel: &TunnelStatus{}},
		"Office hq; LGWAN is not reachable at the moment": {State: Office, Office: &OfficeStatus{Site: "hq"}},
		"LGWAN":                          {State: Tunnel},
		"Sign in to this Wi-Fi":          {State: Portal, Uplink: Uplink{Kind: KindWifi}},
		"Sign in to this network":        {State: Portal},
		"Blocked: no network card found": {Reason: ReasonNoLink},
		"Blocked: the gateway does not answer over this network; it says that it has a sign-in page": {State: Attesting, Reason: ReasonGateway, Uplink: Uplink{SignIn: true}},
		"Blocked: opening the tunnel": {State: Attesting, Reason: ReasonConnecting, Uplink: Uplink{SignIn: true}},
		"Blocked: the security check does not admit this laptop (pcr-mismatch); tell the help desk": {State: Attesting, Reason: "pcr-mismatch"},
	} {
		if got := s.Say(); got.EN != want || got.JA == "" {
			t.Errorf("%+v, want %q", got, want)
		}
	}
}

func TestUnservedIsSaid(t *testing.T) {
	s := Status{State: Dark, Reason: ReasonNoCarrier, Unserved: []Unserved{{Device: "pci 0000:00:14.3", ID: "8086:a0f0", Driver: "iwlwifi"}}}
	w := s.Say()
	for text, want := range map[string]string{w.EN: "its firmware may be missing", w.JA: "ファームウェアがない可能性があります"} {
		if !strings.Contains(text, want) || !strings.Contains(text, "8086:a0f0") {
			t.Errorf("%q does not say %q", text, want)
		}
	}
	s.Unserved[0].Driver = ""
	if w := s.Say(); !strings.Contains(w.EN, "has no driver") || !strings.Contains(w.JA, "ドライバーがありません") {
		t.Errorf("%+v", w)
	}
	s.State = Tunnel // nobody waits for it
	if w := s.Say(); strings.Contains(w.EN, "8086") {
		t.Errorf("%+v", w)
	}
}

func TestPlain(t *testing.T) {
	for s, want := range map[string]string{
		"ホテルの証明書":                     "ホテルの証明書",
		"a\nREADY=1\x1b[2J\u202eevil": "a?READY=1?[2J?evil",
		"\xff":                        "\ufffd",
		strings.Repeat("長", 1000):     strings.Repeat("長", maxPlain),
	} {
		if got := Plain(s); got != want {
			t.Errorf("%q: %q, want %q", s, got, want)
		}
	}
}
