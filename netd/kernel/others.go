//go:build linux

package kernel

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"reflect"
	"slices"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sekisho/netd/plan"
)

// otherChanges removes what nobody but us may have put into the namespace:
// nftables tables of any family but ours, and IP rules.
func (n *Namespace) otherChanges(ours string) ([]change, error) {
	tables, err := n.nft.ListTables()
	if err != nil {
		return nil, fmt.Errorf("nftables tables: %w", err)
	}
	var todo []change
	for _, t := range tables {
		if t.Name == ours && t.Family == nftables.TableFamilyINet {
			continue
		}
		todo = append(todo, change{fmt.Sprintf("remove nftables table %s (family %d)", t.Name, t.Family), func() error {
			n.nft.DelTable(t)
			return n.nft.Flush()
		}})
	}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		rules, err := n.link.RuleList(family)
		if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
			continue // a kernel without IPv6, or without rules
		}
		if err != nil {
			return todo, fmt.Errorf("ip rules: %w", err)
		}
		for _, r := range rules {
			if !standard(r, family) {
				todo = append(todo, change{fmt.Sprintf("remove ip rule %d (table %d)", r.Priority, r.Table), func() error { return n.link.RuleDel(&r) }})
			}
		}
	}
	return todo, nil
}

// strayChanges takes down the links that the plan does not name, takes
// addresses off the loopback device that are not its own, and removes from the
// table local what does not follow from an address: it is asked before every
// other table.
func (n *Namespace) strayChanges(want plan.Namespace, named []netlink.Link) ([]change, error) {
	links, err := n.link.LinkList()
	if err != nil {
		return nil, fmt.Errorf("links: %w", err)
	}
	var todo []change
	loopback, index := 0, map[int]string{}
	for _, l := range named {
		index[l.Attrs().Index] = l.Attrs().Name
	}
	for _, l := range links {
		a := l.Attrs()
		if a.Flags&net.FlagLoopback != 0 {
			loopback = a.Index
			c, err := n.loopbackChanges(l)
			todo = append(todo, c...)
			if err != nil {
				return todo, err
			}
			continue
		}
		// By name as well: a device of a name in the plan may have come since.
		if slices.ContainsFunc(want.Links, func(w plan.Link) bool { return w.Name == a.Name }) || a.Flags&net.FlagUp == 0 {
			continue
		}
		todo = append(todo, change{fmt.Sprintf("link %s down", a.Name), func() error { return n.link.LinkSetDown(l) }})
	}
	local, err := n.link.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: unix.RT_TABLE_LOCAL}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return todo, fmt.Errorf("table local: %w", err)
	}
	for _, r := range local {
		if !follows(r, index[r.LinkIndex], r.LinkIndex == loopback, want.Addresses) {
			todo = append(todo, change{fmt.Sprintf("remove from table local %s dev %d", prefix(r.Dst), r.LinkIndex), func() error { return n.link.RouteDel(&r) }})
		}
	}
	return todo, nil
}

// follows reports whether a route in the table local is one that the kernel
// makes for an address of the plan, for the loopback device's own, or for IPv6
// multicast, which nothing of ours uses (net/ipv4/fib_frontend.c,
// fib_add_ifaddr; net/ipv6/addrconf.c).
func follows(r netlink.Route, link string, loopback bool, addresses []plan.Address) bool {
	to := prefix(r.Dst)
	if r.Gw != nil || len(r.MultiPath) > 0 {
		return false
	}
	if to.Addr().Is6() {
		if r.Type == unix.RTN_LOCAL {
			return loopback && to == netip.MustParsePrefix("::1/128") ||
				slices.ContainsFunc(addresses, func(a plan.Address) bool { return a.Link == link && to.IsSingleIP() && a.Prefix.Addr() == to.Addr() })
		}
		return r.Type == unix.RTN_MULTICAST || r.Type == unix.RTN_ANYCAST
	}
	if loopback && netip.MustParsePrefix("127.0.0.0/8").Overlaps(to) && to.Bits() >= 8 {
		return r.Type == unix.RTN_LOCAL || r.Type == unix.RTN_BROADCAST
	}
	return slices.ContainsFunc(addresses, func(a plan.Address) bool {
		if a.Link != link || !to.IsSingleIP() || !a.Prefix.Contains(to.Addr()) {
			return false
		}
		return r.Type == unix.RTN_LOCAL && to.Addr() == a.Prefix.Addr() || r.Type == unix.RTN_BROADCAST
	})
}

// loopbackChanges leaves 127.0.0.1/8 and ::1/128 at most.
func (n *Namespace) loopbackChanges(lo netlink.Link) ([]change, error) {
	have, err := n.link.AddrList(lo, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("addresses of %s: %w", lo.Attrs().Name, err)
	}
	var todo []change
	for _, a := range have {
		if p := prefix(a.IPNet); p != netip.MustParsePrefix("127.0.0.1/8") && p != netip.MustParsePrefix("::1/128") {
			todo = append(todo, change{fmt.Sprintf("remove address %s from %s", p, lo.Attrs().Name), func() error { return n.link.AddrDel(lo, &a) }})
		}
	}
	return todo, nil
}

// standard reports whether r is a rule that every namespace begins with and
// that our routes need: all packets look up local, then main (ip-rule(8)). The
// third, for the table default, is not needed.
func standard(r netlink.Rule, family int) bool {
	r.Protocol = 0 // who made it
	for priority, table := range map[int]int{0: unix.RT_TABLE_LOCAL, 32766: unix.RT_TABLE_MAIN} {
		want := netlink.NewRule()
		want.Family, want.Priority, want.Table = family, priority, table
		if reflect.DeepEqual(r, *want) {
			return true
		}
	}
	return false
}
