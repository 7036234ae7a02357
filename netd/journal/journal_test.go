package journal

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"sekisho/netd"
)

func TestDiff(t *testing.T) {
	eth := netd.Uplink{Name: "eth0", Kind: netd.KindWired, Carrier: true, Address: netip.MustParsePrefix("192.168.50.23/24"), MTU: 1500}
	wifi := netd.Uplink{Name: "wlan0", Kind: netd.KindWifi, Carrier: true, Network: "a home's name", Signal: -58, Reason: netd.ReasonNoLease}
	far := wifi
	far.Signal = -81
	tunnel := &netd.TunnelStatus{Gateway: netip.MustParseAddrPort("203.0.113.20:443"), MTU: 1400, Since: time.Unix(1, 0)}
	small := *tunnel
	small.MTU = 1280
	for _, c := range []struct {
		name  string
		a, b  netd.Status
		codes string
	}{
		{"nothing", netd.Status{}, netd.Status{}, ""},
		{"cable", netd.Status{Reason: netd.ReasonNoLink}, netd.Status{State: netd.Linked, Reason: netd.ReasonAttestd, Uplink: eth, Uplinks: []netd.Uplink{eth}}, "uplink usable, mtu uplink, uplink in-use, state Linked"},
		{"radio", netd.Status{}, netd.Status{Uplinks: []netd.Uplink{wifi}}, "uplink unusable, radio joined"},
		{"weaker", netd.Status{Uplinks: []netd.Uplink{wifi}}, netd.Status{Uplinks: []netd.Uplink{far}}, "radio signal"},
		{"stick pulled", netd.Status{Uplinks: []netd.Uplink{wifi}}, netd.Status{}, "uplink gone"},
		{"tunnel", netd.Status{}, netd.Status{State: netd.Tunnel, Tunnel: tunnel}, "tunnel open, mtu tunnel, state Tunnel"},
		{"smaller path", netd.Status{Tunnel: tunnel}, netd.Status{Tunnel: &small}, "mtu tunnel"},
		{"closed", netd.Status{State: netd.Tunnel, Tunnel: tunnel}, netd.Status{State: netd.Attesting, Reason: netd.ReasonLapsed}, "tunnel closed, state Attesting"},
		{"office", netd.Status{}, netd.Status{Office: &netd.OfficeStatus{Site: "hq"}}, "office proven"},
		{"left", netd.Status{Office: &netd.OfficeStatus{Site: "hq"}}, netd.Status{}, "office lost"},
	} {
		var got []string
		for _, e := range Diff(c.a, c.b, time.Unix(2, 0)) {
			got = append(got, string(e.Kind)+" "+e.Code)
			if e.EN == "" || e.JA == "" {
				t.Errorf("%s: no words: %+v", c.name, e)
			}
			if strings.Contains(e.EN+e.JA, "a home's name") {
				t.Errorf("%s: names the network: %+v", c.name, e)
			}
		}
		if s := strings.Join(got, ", "); s != c.codes {
			t.Errorf("%s: %q, want %q", c.name, s, c.codes)
		}
	}
}

func TestJournalIsBounded(t *testing.T) {
	var j Journal
	for i := range Size + 7 {
		j.Add(Event{At: time.Unix(int64(i), 0)})
	}
	if r := j.Report(time.Unix(0, 0)); len(r.Events) != Size || r.Dropped != 7 || !r.Events[0].At.Equal(time.Unix(7, 0)) {
		t.Errorf("%d events, %d dropped, first %s", len(r.Events), r.Dropped, r.Events[0].At)
	}
}
