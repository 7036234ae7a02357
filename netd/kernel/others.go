//go:build linux

package kernel

import (
	"errors"
	"fmt"
	"reflect"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
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
