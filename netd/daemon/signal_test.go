//go:build linux

package daemon

import (
	"fmt"
	"testing"
	"time"

	"sekisho/netd"
	"sekisho/netd/uplink"
)

// TestSignals: a radio's history has the changes that matter, is bounded, and
// ends with the radio.
func TestSignals(t *testing.T) {
	begin := time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	s := signals{}
	hears := func(after time.Duration, dbm int) {
		s.note([]uplink.Candidate{
			{Uplink: netd.Uplink{Name: "wlan0", Kind: netd.KindWifi, Signal: dbm}},
			{Uplink: netd.Uplink{Name: "eth0", Kind: netd.KindWired}},
		}, begin.Add(after))
	}
	for _, c := range []struct {
		after time.Duration
		dbm   int
	}{
		{0, 0}, // joined to nothing yet
		{time.Second, -50},
		{2 * time.Second, -52}, // little, and soon
		{3 * time.Second, -53},
		{2 * time.Minute, -52}, // little, and late
		{3 * time.Minute, -52}, // nothing
		{4 * time.Minute, 0},   // lost
		{5 * time.Minute, -70},
	} {
		hears(c.after, c.dbm)
	}
	got := ""
	for _, x := range s.clone()["wlan0"] {
		got += fmt.Sprintf("%v %d;", x.At.Sub(begin), x.DBM)
	}
	if want := "1s -50;3s -53;2m0s -52;4m0s 0;5m0s -70;"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	for i := range 2 * maxSamples {
		hears(time.Duration(i)*time.Hour, -50-10*(i%2))
	}
	if list := s["wlan0"]; len(list) != maxSamples || list[len(list)-1].DBM != -60 {
		t.Errorf("%d samples", len(list))
	}
	if _, ok := s["eth0"]; ok {
		t.Error("a cable has a signal")
	}
	s.note(nil, begin)
	if len(s.clone()) != 0 {
		t.Error("the history of a radio that is gone is still there")
	}
}
