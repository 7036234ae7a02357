//go:build linux

package kernel_test

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"sekisho/netd"
	"sekisho/netd/internal/nstest"
	"sekisho/netd/kernel"
	"sekisho/netd/plan"
)

var situation = plan.Situation{
	State: netd.Tunnel, Links: []string{"eth0"},
	Uplink:    netd.Uplink{Name: "eth0", Carrier: true, Address: netip.MustParsePrefix("192.168.50.23/24"), Router: netip.MustParseAddr("192.168.50.1"), MTU: 1400},
	Endpoints: []netip.AddrPort{netip.MustParseAddrPort("203.0.113.20:443"), netip.MustParseAddrPort("203.0.113.10:443")},
	Inner:     netip.MustParseAddr("10.80.0.2"), Inner6: netip.MustParseAddr("fd00:80::2"), MTU: 1400, Work: true, Tun: true,
}

func open(t *testing.T, ns *nstest.NS) *kernel.Namespace {
	t.Helper()
	n, err := kernel.Open(ns.Path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.Close)
	return n
}

func TestApplyReadBackAndRepair(t *testing.T) {
	nstest.Require(t, "nft")
	outside, inside := nstest.New(t, "outside"), nstest.New(t, "inside")
	outside.Run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "far")
	outside.Run("ip", "link", "set", "far", "up")
	inside.Run("ip", "tuntap", "add", "work0", "mode", "tun")
	o, i := open(t, outside), open(t, inside)
	dev, err := i.CreateTUN(netd.TunnelLink, 1400)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()

	want := plan.Make(situation)
	for _, step := range []struct {
		name string
		n    *kernel.Namespace
		want plan.Namespace
	}{{"outside", o, want.Outside}, {"inside", i, want.Inside}} {
		if step.n.Check(step.want) == nil {
			t.Fatalf("%s: a fresh namespace passes the check", step.name)
		}
		for range 2 { // the second time finds nothing to do
			if err := step.n.Apply(step.want); err != nil {
				t.Fatalf("%s: %v", step.name, err)
			}
		}
	}
	rules := outside.Run("nft", "list", "ruleset")
	for _, line := range []string{
		"type filter hook input priority filter; policy drop;",
		"type filter hook forward priority filter; policy drop;",
		`oifname "eth0" ip saddr 192.168.50.23 ip daddr 203.0.113.20 tcp dport 443 accept`,
		`iifname "eth0" ip saddr 203.0.113.10 ip daddr 192.168.50.23 tcp sport 443 ct state established accept`,
	} {
		if !strings.Contains(rules, line) {
			t.Errorf("nft does not show %q in:\n%s", line, rules)
		}
	}
	rules = inside.Run("nft", "list", "ruleset")
	for _, line := range []string{
		`iifname "work0" oifname "tun0" ip saddr 10.80.0.2 accept`,
		`tcp option maxseg size set 1360`,
		`tcp option maxseg size set 1340`,
		`iifname "work0" oifname "tun0" ip6 saddr fd00:80::2 accept`,
		`iifname "tun0" ip6 saddr fd00:80::2 drop`,
		`icmpv6 type 130-255 drop`,
	} {
		if !strings.Contains(rules, line) {
			t.Errorf("nft does not show %q in:\n%s", line, rules)
		}
	}

	// Whatever somebody else changes is found and put right.
	for _, meddle := range [][]string{
		{"nft", "add rule inet sekisho output accept"},
		{"nft", "delete table inet sekisho"},
		{"nft", "table inet sekisho { flags dormant; }"},
		{"nft", "chain inet sekisho input { policy accept; }"},
		{"ip", "route", "add", "0.0.0.0/0", "dev", "eth0"},
		{"ip", "route", "add", "0.0.0.0/1", "via", "192.168.50.1", "dev", "eth0", "onlink"},
		{"ip", "address", "add", "10.9.9.9/24", "dev", "eth0"},
		{"ip", "link", "set", "eth0", "mtu", "1300"},
		{"ip", "link", "set", "eth0", "down"},
		{"nft", "add table ip nat"},
		{"nft", "table netdev other { chain c { type filter hook ingress device eth0 priority 0; }; }"},
		{"nft", "add table ip6 sekisho"},
		{"sysctl", "-qw", "net.ipv6.conf.eth0.disable_ipv6=0"},
		{"sysctl", "-qw", "net.ipv6.conf.eth0.accept_ra=2"},
		{"sysctl", "-qw", "net.ipv6.conf.all.forwarding=1"},
		{"ip", "rule", "add", "priority", "100", "fwmark", "1", "lookup", "77"},
		{"ip", "rule", "add", "priority", "101", "from", "10.9.9.0/24", "lookup", "main"},
		{"ip", "-6", "rule", "add", "priority", "100", "iif", "eth0", "lookup", "78"},
		{"ip", "rule", "add", "priority", "32767", "lookup", "default"},
		{"ip", "link", "add", "br0", "up", "type", "bridge"},
		{"ip", "link", "set", "br0", "up"},
		{"ip", "tuntap", "add", "stray", "mode", "tun"},
		{"ip", "link", "set", "stray", "up"},
		{"ip", "address", "add", "203.0.113.20/32", "dev", "lo"},
		{"ip", "route", "add", "local", "203.0.113.20", "dev", "lo", "table", "local"},
		{"ip", "route", "add", "10.0.0.0/8", "dev", "eth0", "table", "local"},
		{"ip", "route", "add", "local", "10.9.9.9", "dev", "eth0", "table", "local"},
		{"sysctl", "-qw", "net.ipv4.ip_forward=1"},
		{"sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=0"},
	} {
		outside.Run(meddle[0], meddle[1:]...)
		if harmless := slices.Contains(meddle, "tuntap"); o.Check(want.Outside) == nil && !harmless {
			t.Errorf("%v: not noticed", meddle)
		}
		if err := o.Apply(want.Outside); err != nil {
			t.Errorf("%v: not repaired: %v", meddle, err)
		}
	}

	for _, r := range []string{outside.Run("ip", "rule"), outside.Run("ip", "-6", "rule")} {
		if strings.Count(r, "\n") != 2 || !strings.Contains(r, "0:\tfrom all lookup local") || !strings.Contains(r, "32766:\tfrom all lookup main") {
			t.Errorf("ip rules:\n%s", r)
		}
	}
	// Where we are not alone, as on a gateway's server, others' tables stay.
	shared := want.Outside
	shared.Alone = false
	outside.Run("nft", "add table ip nat")
	if err := o.Apply(shared); err != nil || !strings.Contains(outside.Run("nft", "list tables"), "table ip nat") {
		t.Errorf("a shared namespace lost another's table (%v)", err)
	}
	outside.Run("nft", "delete table ip nat")

	// The office: two more chains, translation with and without connections.
	for _, l := range []struct {
		n    *kernel.Namespace
		name string
	}{{o, netd.OfficeOuterLink}, {i, netd.OfficeLink}} {
		dev, err := l.n.CreateTUN(l.name, 1400)
		if err != nil {
			t.Fatal(err)
		}
		defer dev.Close()
	}
	atDesk := situation
	atDesk.State, atDesk.Session, atDesk.Pipe = netd.Office, true, true
	atDesk.Networks = []netip.Prefix{netip.MustParsePrefix("192.168.50.0/24"), netip.MustParsePrefix("10.20.0.0/16")}
	for range 2 {
		if err := o.Apply(plan.Make(atDesk).Outside); err != nil {
			t.Fatal(err)
		}
		if err := i.Apply(plan.Make(atDesk).Inside); err != nil {
			t.Fatal(err)
		}
	}
	rules = outside.Run("nft", "list", "ruleset")
	for _, line := range []string{
		`ip daddr 192.168.50.23 ip daddr set 10.80.0.2`,
		`oifname "eth0" ip saddr 10.80.0.2 ip saddr set 192.168.50.23`,
		"type filter hook prerouting priority raw; policy accept;",
	} {
		if !strings.Contains(rules, line) {
			t.Errorf("nft does not show %q in:\n%s", line, rules)
		}
	}

	// Closing leaves nothing that carries a packet.
	closed := plan.Closed()
	closed.Outside.Links = []plan.Link{{Name: "eth0", Up: true}}
	closed.Inside.Links = []plan.Link{{Name: "work0"}, {Name: "tun0"}}
	if err := o.Apply(closed.Outside); err != nil {
		t.Error(err)
	}
	if err := i.Apply(closed.Inside); err != nil {
		t.Error(err)
	}
	if r := outside.Run("ip", "route"); r != "" {
		t.Errorf("routes outside after closing: %s", r)
	}
	if r := inside.Run("ip", "route"); r != "" {
		t.Errorf("routes inside after closing: %s", r)
	}
	if a := outside.Run("ip", "-o", "address", "show", "dev", "eth0"); a != "" {
		t.Errorf("addresses after closing: %s", a)
	}
}

// TestChangeOfUplinkLeavesNoGap: while another uplink comes into use, each has
// a route to the gateway all the time: sockets are bound to theirs.
func TestChangeOfUplinkLeavesNoGap(t *testing.T) {
	nstest.Require(t, "nft")
	outside := nstest.New(t, "outside")
	for _, name := range []string{"eth0", "eth1"} {
		outside.Run("ip", "link", "add", name, "type", "veth", "peer", "name", "far"+name)
		outside.Run("ip", "link", "set", "far"+name, "up")
	}
	o := open(t, outside)
	other := netd.Uplink{Name: "eth1", Carrier: true, Address: netip.MustParsePrefix("192.168.60.23/24"), Router: netip.MustParseAddr("192.168.60.1"), MTU: 1400}
	s := situation
	s.Links = []string{"eth0", "eth1"}
	for _, change := range [][2]netd.Uplink{{situation.Uplink, other}, {other, situation.Uplink}} {
		s.Uplink, s.Standby = change[0], change[1:]
		if err := o.Apply(plan.Make(s).Outside); err != nil {
			t.Fatal(err)
		}
		links, err := o.Links()
		if err != nil {
			t.Fatal(err)
		}
		name := map[int]string{}
		for _, l := range links {
			name[l.Index] = l.Name
		}
		ns, err := netns.GetFromPath(outside.Path)
		if err != nil {
			t.Fatal(err)
		}
		updates := make(chan netlink.RouteUpdate, 256)
		if err := netlink.RouteSubscribeWithOptions(updates, t.Context().Done(), netlink.RouteSubscribeOptions{Namespace: &ns}); err != nil {
			t.Fatal(err)
		}
		ns.Close()
		by := map[int]string{} // the links of the routes to the gateway, by metric
		for _, r := range plan.Make(s).Outside.Routes {
			if r.Destination.Addr() == s.Endpoints[0].Addr() {
				by[r.Metric] = r.Link
			}
		}
		s.Uplink, s.Standby = change[1], change[:1]
		if err := o.Apply(plan.Make(s).Outside); err != nil {
			t.Fatal(err)
		}
		for end := time.After(10 * time.Second); len(by) != 2 || by[1] != change[1].Name; {
			select {
			case u := <-updates:
				if u.Dst == nil || u.Dst.IP.String() != s.Endpoints[0].Addr().String() {
					continue
				}
				if u.Type == unix.RTM_NEWROUTE {
					by[u.Priority] = name[u.LinkIndex]
				} else if by[u.Priority] == name[u.LinkIndex] {
					delete(by, u.Priority)
				}
				for _, l := range s.Links {
					if !slices.Contains(slices.Collect(maps.Values(by)), l) {
						t.Errorf("from %s to %s: no route over %s in between: %v", change[0].Name, change[1].Name, l, by)
					}
				}
			case <-end:
				t.Fatalf("routes by metric %v", by)
			}
		}
	}
}

func TestWatchAndLinks(t *testing.T) {
	nstest.Require(t)
	ns := nstest.New(t, "outside")
	n := open(t, ns)
	changes, err := n.Watch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ns.Run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "far")
	ns.Run("ip", "link", "add", "br0", "type", "bridge")
	ns.Run("ip", "link", "set", "eth0", "up")
	carrier := func() bool {
		links, err := n.Links()
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range links {
			if l.Name == "br0" && l.Ethernet {
				t.Error("a bridge is taken for an Ethernet device")
			}
			if l.Name == "eth0" && l.Ethernet && l.Carrier {
				return true
			}
		}
		return false
	}
	if carrier() {
		t.Error("carrier although the far end is down")
	}
	ns.Run("ip", "link", "set", "far", "up")
	flaps := func() uint32 {
		links, err := n.Links()
		if err != nil {
			t.Fatal(err)
		}
		return links[slices.IndexFunc(links, func(l kernel.Link) bool { return l.Name == "eth0" })].Flaps
	}
	was := flaps()
	ns.Run("ip", "link", "set", "far", "down")
	ns.Run("ip", "link", "set", "far", "up")
	if now := flaps(); now != was+2 {
		t.Errorf("%d carrier changes after a flap, %d before it", now, was)
	}
	limit := time.After(10 * time.Second)
	for !carrier() {
		select {
		case <-changes:
		case <-limit:
			t.Fatal("no carrier seen within 10 s")
		}
	}
}
