package netd

import (
	"encoding/json"
	"net/netip"
	"testing"
)

func TestNextOverAllFacts(t *testing.T) {
	bit := func(n, i int) bool { return n>>i&1 == 1 }
	for n := range 1 << 5 {
		f := Facts{Sealed: bit(n, 0), Uplink: bit(n, 1), Asked: bit(n, 2), Affirming: bit(n, 3), Session: bit(n, 4)}
		var want State
		if f.Sealed && f.Uplink {
			want = Linked
			if f.Asked || f.Affirming {
				want = Attesting
			}
			if f.Affirming && f.Session {
				want = Tunnel
			}
		}
		if got := Next(f); got != want {
			t.Errorf("Next(%+v) = %s, want %s", f, got, want)
		}
		// Losing a fact never opens anything.
		for _, g := range []Facts{
			{false, f.Uplink, f.Asked, f.Affirming, f.Session},
			{f.Sealed, false, f.Asked, f.Affirming, f.Session},
			{f.Sealed, f.Uplink, false, f.Affirming, f.Session},
			{f.Sealed, f.Uplink, f.Asked, false, f.Session},
			{f.Sealed, f.Uplink, f.Asked, f.Affirming, false},
		} {
			if Next(g) > Next(f) {
				t.Errorf("Next(%+v) = %s, more open than %s for %+v", g, Next(g), Next(f), f)
			}
		}
	}
	if Next(Facts{}) != Dark || State(0) != Dark {
		t.Error("the zero value is not Dark")
	}
}

func TestStateText(t *testing.T) {
	for _, s := range []State{Dark, Linked, Attesting, Tunnel} {
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
