package connectip

import (
	"bufio"
	"bytes"
	"errors"
	"net/http"
	"net/netip"
	"slices"
	"testing"

	"sekisho/netd/tunnel"
)

func response(status int, fields ...string) *http.Response {
	r := &http.Response{ProtoMajor: 1, StatusCode: status, Header: http.Header{}}
	for i := 0; i < len(fields); i += 2 {
		r.Header.Add(fields[i], fields[i+1])
	}
	return r
}

func TestGrantedRoundTrip(t *testing.T) {
	want := tunnel.Assignment{MTU: 1380, DNS: []netip.Addr{netip.MustParseAddr("10.1.0.53"), netip.MustParseAddr("fd00::53")}}
	for major, status := range map[int]int{1: 101, 3: 200} {
		h := http.Header{}
		if err := Granted(h, major, want); err != nil {
			t.Fatal(err)
		}
		got, trains, err := parseGranted(&http.Response{ProtoMajor: major, StatusCode: status, Header: h})
		if err != nil || got.MTU != want.MTU || !slices.Equal(got.DNS, want.DNS) || !trains {
			t.Errorf("HTTP/%d: %+v, trains %v, %v, want %+v", major, got, trains, err, want)
		}
	}
}

func TestParseGranted(t *testing.T) {
	up := []string{"Upgrade", Protocol, "Capsule-Protocol", "?1"}
	with := func(v string) []string { return append(slices.Clone(up), innerHeader, v) }
	for name, c := range map[string]struct {
		r   *http.Response
		mtu int // 0: refused
	}{
		"another's gateway": {response(101, up...), DefaultMTU},
		"mtu only":          {response(101, with("mtu=1280")...), 1280},
		"unknown member":    {response(101, with("mtu=1280, x=?1")...), 1280},
		"200":               {response(200, up...), 0},
		"503":               {response(503, "Retry-After", "10"), 0},
		"websocket":         {response(101, "Upgrade", "websocket", "Capsule-Protocol", "?1"), 0},
		"no capsules":       {response(101, "Upgrade", Protocol), 0},
		"capsules off":      {response(101, "Upgrade", Protocol, "Capsule-Protocol", "?0"), 0},
		"mtu 575":           {response(101, with("mtu=575")...), 0},
		"mtu 9001":          {response(101, with("mtu=9001")...), 0},
		"mtu string":        {response(101, with(`mtu="1400"`)...), 0},
		"mtu list":          {response(101, with(`mtu=(1400)`)...), 0},
		"dns token":         {response(101, with(`dns=(a b)`)...), 0},
		"dns name":          {response(101, with(`dns=("ns.example")`)...), 0},
		"five resolvers":    {response(101, with(`dns=("1.1.1.1" "1.1.1.1" "1.1.1.1" "1.1.1.1" "1.1.1.1")`)...), 0},
		"garbage":           {response(101, with(`mtu==`)...), 0},
	} {
		a, _, err := parseGranted(c.r)
		if (err == nil) != (c.mtu != 0) || err == nil && a.MTU != c.mtu {
			t.Errorf("%s: %+v, %v", name, a, err)
		}
	}
	var refused *RefusedError
	if _, _, err := parseGranted(response(503, "Retry-After", "10")); !errors.As(err, &refused) || refused.RetryAfter != "10" {
		t.Errorf("503: %v", err)
	}
}

func FuzzResponse(f *testing.F) {
	f.Add([]byte("HTTP/1.1 101 Switching Protocols\r\nUpgrade: connect-ip\r\nCapsule-Protocol: ?1\r\nSekisho-Inner: mtu=1400, dns=(\"10.1.0.53\")\r\n\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > maxResponse {
			return
		}
		r, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(b)), nil)
		if err != nil {
			return
		}
		a, _, err := parseGranted(r)
		if err == nil && (a.MTU < tunnel.MinMTU || a.MTU > tunnel.MaxMTU || len(a.DNS) > maxDNS) {
			t.Errorf("granted %+v", a)
		}
	})
}
