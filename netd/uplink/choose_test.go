package uplink

import (
	"net/netip"
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/netd"
)

var noon = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

// candidate is sound for an hour, changed by how.
func candidate(name string, place int, how ...func(*Candidate)) Candidate {
	c := Candidate{Place: place, Index: place + 2, Settle: 3 * time.Second, Uplink: netd.Uplink{
		Name: name, Carrier: true, Address: netip.MustParsePrefix("192.168.50.23/24"), Health: netd.HealthGood, Since: noon.Add(-time.Hour)}}
	for _, f := range how {
		f(&c)
	}
	return c
}

func TestChoose(t *testing.T) {
	unplugged := func(c *Candidate) { c.Carrier = false }
	noLease := func(c *Candidate) { c.Address, c.Reason = netip.Prefix{}, netd.ReasonNoLease }
	blackHole := func(c *Candidate) { c.Health = netd.HealthDead }
	unproven := func(c *Candidate) { c.Health = netd.HealthUnknown }
	forbidden := func(c *Candidate) { c.Reason = netd.ReasonNotAllowed }
	since := func(d time.Duration) func(*Candidate) { return func(c *Candidate) { c.Since = noon.Add(-d) } }
	flapped := func(c *Candidate) { c.Settle = time.Minute }
	for name, c := range map[string]struct {
		candidates []Candidate
		present    string
		want       string
	}{
		"none":                                {nil, "eth0", ""},
		"the only one, dead or alive":         {[]Candidate{candidate("eth0", 0, unplugged)}, "", "eth0"},
		"order decides at first":              {[]Candidate{candidate("wlan0", 1), candidate("eth0", 0, unproven)}, "", "eth0"},
		"sound before preferred":              {[]Candidate{candidate("eth0", 0, noLease), candidate("wlan0", 1)}, "", "wlan0"},
		"carrier lost":                        {[]Candidate{candidate("eth0", 0, unplugged), candidate("wlan0", 1)}, "eth0", "wlan0"},
		"carrier lost, the other not probed":  {[]Candidate{candidate("eth0", 0, unplugged), candidate("wlan0", 1, unproven)}, "eth0", "wlan0"},
		"lease lost":                          {[]Candidate{candidate("eth0", 0, noLease), candidate("wlan0", 1)}, "eth0", "wlan0"},
		"black hole":                          {[]Candidate{candidate("eth0", 0, blackHole), candidate("wlan0", 1)}, "eth0", "wlan0"},
		"black hole, the other not probed":    {[]Candidate{candidate("eth0", 0, blackHole), candidate("wlan0", 1, unproven)}, "eth0", "wlan0"},
		"both dead: no swapping":              {[]Candidate{candidate("eth0", 0, blackHole), candidate("wlan0", 1, blackHole)}, "wlan0", "wlan0"},
		"dead, the other waits":               {[]Candidate{candidate("eth0", 0, noLease), candidate("wlan0", 1, blackHole)}, "wlan0", "wlan0"},
		"better one is ripe":                  {[]Candidate{candidate("eth0", 0, since(3*time.Second)), candidate("wlan0", 1)}, "wlan0", "eth0"},
		"better one is too new":               {[]Candidate{candidate("eth0", 0, since(2*time.Second)), candidate("wlan0", 1)}, "wlan0", "wlan0"},
		"better one not probed":               {[]Candidate{candidate("eth0", 0, unproven), candidate("wlan0", 1)}, "wlan0", "wlan0"},
		"better one has flapped":              {[]Candidate{candidate("eth0", 0, since(30*time.Second), flapped), candidate("wlan0", 1)}, "wlan0", "wlan0"},
		"better one not allowed":              {[]Candidate{candidate("eth0", 0, forbidden), candidate("wlan0", 1)}, "wlan0", "wlan0"},
		"not allowed is never a way out":      {[]Candidate{candidate("eth0", 0, forbidden), candidate("wlan0", 1, noLease)}, "wlan0", "wlan0"},
		"present not probed stays":            {[]Candidate{candidate("eth0", 0, unproven), candidate("wlan0", 1)}, "eth0", "eth0"},
		"equals: present stays":               {[]Candidate{candidate("eth0", 0), candidate("eth1", 0)}, "eth1", "eth1"},
		"present vanished":                    {[]Candidate{candidate("wlan0", 1)}, "eth0", "wlan0"},
		"present renamed, another in reserve": {[]Candidate{candidate("wlan0", 1), candidate("lan9", 0)}, "eth0", "lan9"},
	} {
		if got := Choose(c.candidates, c.present, noon); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

// TestChooseSettles: for any set of facts the choice, made again from itself,
// is the same: nothing swaps back and forth while nothing changes.
func TestChooseSettles(t *testing.T) {
	var all []Candidate
	for _, health := range []string{netd.HealthUnknown, netd.HealthGood, netd.HealthDead} {
		for n := range 8 {
			c := candidate("", 0)
			c.Health, c.Carrier = health, n&1 == 0
			if n&2 != 0 {
				c.Reason = netd.ReasonNoLease
			}
			if n&4 != 0 {
				c.Since = noon
			}
			all = append(all, c)
		}
	}
	for _, a := range all {
		for _, b := range all {
			a.Name, b.Name, b.Place, b.Index = "a", "b", 1, 3
			for _, present := range []string{"", "a", "b"} {
				list := []Candidate{a, b}
				once := Choose(list, present, noon)
				if twice := Choose(list, once, noon); twice != once {
					t.Errorf("%+v, %+v: from %q to %q to %q", a, b, present, once, twice)
				}
				if once == "" {
					t.Error("no choice although there are links")
				}
			}
		}
	}
}

func TestPolicy(t *testing.T) {
	wired, wifi, stick := Link{Kind: netd.KindWired}, Link{Kind: netd.KindWifi}, Link{Kind: netd.KindUSB, Device: "12d1:14db"}
	other := Link{Kind: netd.KindUSB, Device: "0bda:8153"}
	closedSIM := []attest.UplinkRule{{Device: "12d1:14db"}, {Kind: "wired"}, {Kind: "wifi", Groups: []string{"field"}}, {Kind: "usb", Metered: true}}
	groups := map[string][]string{"field": {"d1"}}
	for _, c := range []struct {
		name   string
		policy Policy
		link   Link
		place  int // -1: not allowed
		meter  bool
	}{
		{"default: wired", Policy{}, wired, 0, false},
		{"default: wifi", Policy{}, wifi, 1, false},
		{"default: stick", Policy{}, stick, 2, false},
		{"closed SIM first", Policy{Rules: closedSIM}, stick, 0, false},
		{"wired after it", Policy{Rules: closedSIM}, wired, 1, false},
		{"another stick last, metered", Policy{Rules: closedSIM}, other, 3, true},
		{"wifi for the group", Policy{Rules: closedSIM, Groups: groups, Device: "d1"}, wifi, 2, false},
		{"wifi for nobody else", Policy{Rules: closedSIM, Groups: groups, Device: "d2"}, wifi, -1, false},
		{"wifi while the device is unknown", Policy{Rules: closedSIM, Groups: groups}, wifi, -1, false},
		{"wired only", Policy{Rules: []attest.UplinkRule{{Kind: "wired"}}}, stick, -1, false},
	} {
		place, metered, ok := c.policy.Place(c.link)
		if !ok {
			place = -1
		}
		if place != c.place || metered != c.meter {
			t.Errorf("%s: place %d, metered %v, want %d, %v", c.name, place, metered, c.place, c.meter)
		}
	}
}
