package netd

import (
	"encoding/json"
	"net/netip"
	"testing"
)

func TestNextOverAllFacts(t *testing.T) {
	facts := func(n int) Facts {
		bit := func(i int) bool { return n>>i&1 == 1 }
		return Facts{Sealed: bit(0), Uplink: bit(1), Asked: bit(2), Affirming: bit(3), Session: bit(4), Office: bit(5), Portal: bit(6)}
	}
	for n := range 1 << 7 {
		f := facts(n)
		var want State
		if f.Sealed && f.Uplink {
			want = Linked
			if f.Asked || f.Affirming {
				want = Attesting
			}
			if f.Portal {
				want = Portal
			}
			if f.Affirming && f.Session {
				want = Tunnel
			}
			if f.Affirming && f.Office {
				want = Office
			}
		}
		if got := Next(f); got != want {
			t.Errorf("Next(%+v) = %s, want %s", f, got, want)
		}
		if open := Next(f) >= Tunnel; open && !(f.Sealed && f.Uplink && f.Affirming && (f.Session || f.Office)) {
			t.Errorf("%+v opens", f)
		}
		// Losing a fact never opens anything, and a portal neither: losing that
		// one only ever ends the state Portal.
		for i := range 6 {
			if g := facts(n &^ (1 << i)); Next(g) > Next(f) {
				t.Errorf("Next(%+v) = %s, more open than %s for %+v", g, Next(g), Next(f), f)
			}
		}
		if g := facts(n | 1<<6); Next(g) >= Tunnel && Next(g) != Next(f) {
			t.Errorf("a portal opens %+v", g)
		}
	}
	if Next(Facts{}) != Dark || State(0) != Dark {
		t.Error("the zero value is not Dark")
	}
}

func TestStateText(t *testing.T) {
	for _, s := range states() {
		b, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		var got State
		if err := json.Unmarshal(b, &got); err != nil || got != s {
			t.Errorf("%s: %s, %v", b, got, err)
		}
	}
	if _, err := ParseState("Open"); err == nil {
		t.Error("an unknown state was parsed")
	}
}

func TestStatusLine(t *testing.T) {
	up := Uplink{Name: "eth0", Carrier: true, Address: netip.MustParsePrefix("192.168.50.23/24")}
	tun := &TunnelStatus{Inner: netip.MustParseAddr("10.80.0.2"), Gateway: netip.MustParseAddrPort("203.0.113.20:443")}
	for want, s := range map[string]Status{
		"Dark no carrier":              {Detail: "no carrier", Uplink: Uplink{Name: "eth0"}},
		"Linked eth0 192.168.50.23/24": {State: Linked, Uplink: up},
		"Attesting verifier unreachable since 2026-11-21T10:00:00Z": {State: Attesting, Uplink: up, Detail: "verifier unreachable since 2026-11-21T10:00:00Z"},
		"Tunnel inner 10.80.0.2 gateway 203.0.113.20:443":           {State: Tunnel, Uplink: up, Tunnel: tun},
	} {
		if got := s.Line(); got != want {
			t.Errorf("Line() = %q, want %q", got, want)
		}
	}
}
