package uplink

import (
	"net"
	"slices"

	"sekisho/attest"
	"sekisho/netd"
)

// Link is a network device that may become an uplink.
type Link struct {
	Index    int
	Name     string
	Hardware net.HardwareAddr
	Carrier  bool
	Flaps    uint32 // how often the carrier came or went: after it, the network may be another
	Kind     string // netd.KindWired, KindWifi or KindUSB
	Driver   string // the kernel's name of it
	Device   string // vendor and product of a USB device, "12d1:14db"
}

// Policy is the organisation's order of uplinks.
type Policy struct {
	Rules  []attest.UplinkRule
	Groups map[string][]string // device ids, by group
	Device string              // this laptop's id; empty while unknown, and then in no group
}

// defaultRules hold where the organisation says nothing.
var defaultRules = []attest.UplinkRule{{Kind: netd.KindWired}, {Kind: netd.KindWifi}, {Kind: netd.KindUSB}}

// Place returns l's place in the order, from 0, and whether it costs by
// volume. ok is false if the organisation does not allow it.
func (p Policy) Place(l Link) (place int, metered, ok bool) {
	rules := p.Rules
	if len(rules) == 0 {
		rules = defaultRules
	}
	for i, r := range rules {
		if (r.Kind == "" || r.Kind == l.Kind) && (r.Name == "" || r.Name == l.Name) && (r.Device == "" || r.Device == l.Device) && p.member(r.Groups) {
			return i, r.Metered, true
		}
	}
	return 0, false, false
}

// member reports whether the laptop is in one of groups; none is everybody.
func (p Policy) member(groups []string) bool {
	return len(groups) == 0 || p.Device != "" && slices.ContainsFunc(groups, func(g string) bool {
		return slices.Contains(p.Groups[g], p.Device)
	})
}
