//go:build linux

package wpa

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"sekisho/netd"
)

func TestParseEvent(t *testing.T) {
	e, ok := ParseEvent(`<3>CTRL-EVENT-SSID-TEMP-DISABLED id=0 ssid="home" auth_failures=1 duration=10 reason=WRONG_KEY`)
	if !ok || e.Name != "CTRL-EVENT-SSID-TEMP-DISABLED" || e.Args["ssid"] != "home" || e.Args["reason"] != "WRONG_KEY" {
		t.Errorf("%+v, %v", e, ok)
	}
	for _, line := range []string{"", "OK\n", "FAIL\n", "<3>", "<x>CTRL", "<3", "PONG", "< 3>A"} {
		if e, ok := ParseEvent(line); ok {
			t.Errorf("%q is an event: %+v", line, e)
		}
	}
}

// scan is what SCAN_RESULTS answers, as recorded from wpa_supplicant 2.10.
const scan = "bssid / frequency / signal level / flags / ssid\n" +
	"02:00:00:00:00:00\t2412\t-30\t[WPA2-SAE-CCMP][ESS]\thome\n" +
	"02:00:00:00:01:00\t2437\t-71\t[WPA2-PSK-CCMP][WPS][ESS]\t\\xe6\\x9d\\xb1\\xe4\\xba\\xac\n" +
	"02:00:00:00:02:00\t2462\t-80\t[ESS]\tHotel \\\"Guest\\\"\n" +
	"02:00:00:00:03:00\t5180\t-55\t[WPA2-EAP-CCMP][ESS]\tcity\n" +
	"02:00:00:00:04:00\t5180\t-60\t[WPA-PSK-TKIP][ESS]\told\n" +
	"02:00:00:00:05:00\t5180\t-60\t[WEP][ESS]\tolder\n" +
	"02:00:00:00:06:00\t5180\t-60\t[WPA2-PSK-CCMP][ESS]\t\n" +
	"02:00:00:00:07:00\t5180\t-60\t[WPA2-PSK-CCMP][ESS]\t\\x00\\x00\n" +
	"02:00:00:00:08:00\t5180\t-60\t[WPA2-PSK-CCMP][ESS]\tbroken\\x\n" +
	"02:00:00:00:09:00\t5180\tloud\t[ESS]\tloud\n" +
	"02:00:00:00:0a:00\t5180\t-60\t[WPA2-PSK-CCMP][IBSS]\tadhoc\n"

func TestParseScan(t *testing.T) {
	var got []string
	for _, s := range ParseScan(scan) {
		got = append(got, fmt.Sprintf("%s %d %s", SSID(s.SSID), s.Signal, s.Security))
	}
	want := []string{"home -30 personal", "東京 -71 personal", `Hotel "Guest" -80 open`, "city -55 enterprise"}
	if !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	if n := len(ParseScan(strings.Repeat("02:00:00:00:00:00\t2412\t-30\t[ESS]\ta\n", 5000))); n > maxNetworks {
		t.Errorf("%d networks from a huge answer", n)
	}
}

func TestParseStatus(t *testing.T) {
	got := ParseStatus("bssid=02:00:00:00:00:00\nssid=ho=me\nwpa_state=COMPLETED\nrubbish\n")
	want := map[string]string{"bssid": "02:00:00:00:00:00", "ssid": "ho=me", "wpa_state": "COMPLETED"}
	if !maps.Equal(got, want) {
		t.Errorf("%q", got)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(scan)
	f.Add("<3>CTRL-EVENT-CONNECTED - Connection to 02:00:00:00:00:00 completed [id=0 id_str=]")
	f.Add("wpa_state=COMPLETED\nssid=a\\x00\n")
	f.Fuzz(func(t *testing.T, s string) {
		ParseEvent(s)
		ParseStatus(s)
		for _, n := range ParseScan(s) {
			if len(n.SSID) == 0 || len(n.SSID) > maxSSID || n.Security == "" {
				t.Errorf("%+v", n)
			}
		}
	})
}

func FuzzDecode(f *testing.F) {
	b, err := Encode([]Network{{SSID: SSID("home"), Security: Personal, Passphrase: "correct horse"}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		list, err := Decode(b)
		if err != nil {
			return
		}
		again, err := Encode(list)
		if err != nil {
			return // it was at the limit
		}
		if twice, err := Decode(again); err != nil || len(list) > 0 && !reflect.DeepEqual(twice, list) {
			t.Errorf("%+v, %v, want %+v", twice, err, list)
		}
	})
}

func TestSettings(t *testing.T) {
	identity := &Identity{Name: "laptop-1.city.example", Certificate: []byte{1}, Key: []byte{2}, CA: []byte{3}}
	for _, c := range []struct {
		name     string
		network  Network
		identity *Identity
		want     string // empty: refused
	}{
		{"open", Network{SSID: SSID("Hotel"), Security: Open}, nil, "ssid 486f74656c, priority 0, bgscan \"simple:30:-65:300\", key_mgmt NONE OWE"},
		{"personal, hidden", Network{SSID: SSID("home"), Security: Personal, Passphrase: `a "quoted" one`, Hidden: true, Priority: 7}, nil,
			`ssid 686f6d65, priority 7, bgscan "simple:30:-65:300", scan_ssid 1, key_mgmt WPA-PSK WPA-PSK-SHA256 SAE, proto RSN, pairwise CCMP GCMP GCMP-256 CCMP-256, ieee80211w 1, psk "a "quoted" one"`},
		{"enterprise", Network{SSID: SSID("city"), Security: Enterprise, Server: "radius.city.example"}, identity,
			`ssid 63697479, priority 0, bgscan "simple:30:-65:300", key_mgmt WPA-EAP WPA-EAP-SHA256, proto RSN, pairwise CCMP GCMP GCMP-256 CCMP-256, ieee80211w 1, eap TLS, identity "laptop-1.city.example", domain_match "radius.city.example", ` +
				`ca_cert "blob://ca", client_cert "blob://certificate", private_key "blob://key", phase1 "tls_disable_tlsv1_0=1 tls_disable_tlsv1_1=1 tls_disable_tlsv1_3=0"`},
		{"enterprise without identity", Network{SSID: SSID("city"), Security: Enterprise, Server: "radius.city.example"}, nil, ""},
		{"enterprise without server", Network{SSID: SSID("city"), Security: Enterprise}, identity, ""},
		{"server that would end the quotes", Network{SSID: SSID("city"), Security: Enterprise, Server: `a" x="`}, identity, ""},
		{"no name", Network{Security: Open}, nil, ""},
		{"long name", Network{SSID: bytes.Repeat(SSID("a"), 33), Security: Open}, nil, ""},
		{"short passphrase", Network{SSID: SSID("home"), Security: Personal, Passphrase: "1234567"}, nil, ""},
		{"passphrase with a line feed", Network{SSID: SSID("home"), Security: Personal, Passphrase: "12345678\nSET"}, nil, ""},
		{"passphrase of an open network", Network{SSID: SSID("home"), Security: Open, Passphrase: "12345678"}, nil, ""},
		{"security unknown", Network{SSID: SSID("home"), Security: "wep"}, nil, ""},
		{"zero", Network{}, nil, ""},
	} {
		set, err := c.network.settings(c.identity)
		var words []string
		for _, s := range set {
			words = append(words, s.name+" "+s.value)
		}
		if got := strings.Join(words, ", "); got != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%s: %s (%v), want %s", c.name, got, err, c.want)
		}
	}
	if s := fmt.Sprintf("%v %+v %s", Network{Passphrase: "hidden words"}, Network{Passphrase: "hidden words"}, Secret("hidden words")); strings.Contains(s, "hidden") {
		t.Errorf("a passphrase shows itself: %s", s)
	}
}

// TestHangs: wpa_supplicant has its socket and reads nothing. Whoever asks is
// not held up for longer than he wants.
func TestHangs(t *testing.T) {
	path := filepath.Join(t.TempDir(), "wlan0")
	program, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: path})
	if err != nil {
		t.Fatal(err)
	}
	defer program.Close()
	c, err := Dial(path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	full := false
	for range 2048 { // until its queue is full (net.unix.max_dgram_qlen)
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		_, err := c.Request(ctx, "STATUS", strings.Repeat("x", 1024))
		cancel()
		if err == nil {
			t.Fatal("an answer of nobody")
		}
		if full = errors.Is(err, os.ErrDeadlineExceeded); full {
			break
		}
	}
	if !full {
		t.Error("no write has waited")
	}
}

// TestFacts plays what wpa_supplicant 2.10 says when it joins, is refused, and
// finds nothing.
func TestFacts(t *testing.T) {
	for _, c := range []struct {
		name  string
		lines []string
		want  string
	}{
		{"joined", []string{"<3>CTRL-EVENT-SCAN-RESULTS ", "<3>CTRL-EVENT-CONNECTED - Connection to 02:00:00:00:00:00 completed [id=0 id_str=]"}, ""},
		{"wrong passphrase", []string{
			"<3>CTRL-EVENT-DISCONNECTED bssid=02:00:00:00:00:00 reason=15",
			"<3>WPA: 4-Way Handshake failed - pre-shared key may be incorrect",
			`<3>CTRL-EVENT-SSID-TEMP-DISABLED id=0 ssid="home" auth_failures=1 duration=10 reason=WRONG_KEY`,
			"<3>CTRL-EVENT-NETWORK-NOT-FOUND "}, netd.ReasonWrongSecret},
		{"wrong passphrase, WPA3", []string{
			"<3>CTRL-EVENT-AUTH-REJECT 02:00:00:00:01:00 auth_type=3 auth_transaction=2 status_code=1",
			`<3>CTRL-EVENT-SSID-TEMP-DISABLED id=0 ssid="home" auth_failures=1 duration=10 reason=CONN_FAILED`}, netd.ReasonWrongSecret},
		{"nothing in reach", []string{"<3>CTRL-EVENT-SCAN-RESULTS ", "<3>CTRL-EVENT-NETWORK-NOT-FOUND "}, netd.ReasonNoNetwork},
		{"lost and found", []string{"<3>CTRL-EVENT-DISCONNECTED bssid=02:00:00:00:00:00 reason=4", "<3>CTRL-EVENT-CONNECTED - x"}, ""},
		{"refused by the server", []string{"<3>CTRL-EVENT-EAP-FAILURE EAP authentication failed"}, netd.ReasonWrongSecret},
	} {
		var f Facts
		for _, line := range c.lines {
			e, ok := ParseEvent(line)
			if !ok {
				t.Fatalf("%q is no event", line)
			}
			f.event("wlan0", e)
		}
		if f.Reason != c.want || (f.Reason != "") != (f.Detail != "") {
			t.Errorf("%s: %+v, want reason %q", c.name, f, c.want)
		}
	}
}
