//go:build linux

package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sekisho/netd/plan"
)

// protocol marks our routes (rtnetlink(7), rtm_protocol; values above
// RTPROT_STATIC are free for daemons).
const protocol = 0x5e

// change is one difference between the kernel and a plan, and its remedy.
type change struct {
	what string
	do   func() error
}

// rounds is how often Apply looks again: some changes bring others about, as
// an address that goes takes its routes along, and net.ipv4.ip_forward resets
// other settings (kernel Documentation/networking/ip-sysctl.rst).
const rounds = 3

// Apply makes the namespace equal to want and reads it back. Without
// differences it changes nothing. After an error the kernel may hold anything
// between the two: the ruleset comes first, so that a plan that closes has
// closed even then.
func (n *Namespace) Apply(want plan.Namespace) error {
	var errs []error
	for range rounds {
		todo, err := n.changes(want)
		if len(todo) == 0 {
			return err
		}
		errs = nil
		if err != nil { // what was found before it is done all the same: the ruleset
			errs = append(errs, err)
		}
		for _, c := range todo {
			if err := c.do(); err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", c.what, err))
			}
		}
	}
	if err := n.Check(want); err != nil {
		return errors.Join(append(errs, err)...)
	}
	return nil
}

// Check reads the namespace back. A nil error proves that it holds want.
func (n *Namespace) Check(want plan.Namespace) error {
	left, err := n.changes(want)
	if err != nil {
		return err
	}
	if len(left) == 0 {
		return nil
	}
	var what []string
	for _, c := range left {
		what = append(what, c.what)
	}
	return fmt.Errorf("network namespace %s does not hold the plan: %s", n.path, strings.Join(what, "; "))
}

func (n *Namespace) changes(want plan.Namespace) ([]change, error) {
	var todo []change
	add := func(what string, do func() error) { todo = append(todo, change{what, do}) }

	held, err := n.holdsRules(want.Ruleset)
	if err != nil || !held { // what cannot be read is not held
		add("ruleset", func() error { return n.replaceRules(want.Ruleset) })
	}
	if err != nil {
		return todo, fmt.Errorf("network namespace %s: %w", n.path, err)
	}
	if want.Alone {
		others, err := n.otherChanges(want.Ruleset.Table)
		todo = append(todo, others...)
		if err != nil {
			return todo, fmt.Errorf("network namespace %s: %w", n.path, err)
		}
	}
	sysctls, err := n.sysctlChanges(want.Sysctls)
	todo = append(todo, sysctls...)
	if err != nil {
		return todo, err
	}

	var present []netlink.Link
	for _, l := range want.Links {
		link, err := n.link.LinkByName(l.Name)
		if err != nil {
			if l.Up && !l.Maybe { // the rest of the plan is applied all the same; one that is gone is down
				add("link "+l.Name+" up", func() error { return err })
			}
			continue
		}
		present = append(present, link)
		attrs := link.Attrs()
		if l.MTU != 0 && attrs.MTU != l.MTU {
			add(fmt.Sprintf("link %s mtu %d", l.Name, l.MTU), func() error { return n.link.LinkSetMTU(link, l.MTU) })
		}
		if up := attrs.Flags&net.FlagUp != 0; up != l.Up {
			set := n.link.LinkSetDown
			if l.Up {
				set = n.link.LinkSetUp
			}
			add(fmt.Sprintf("link %s up=%v", l.Name, l.Up), func() error { return set(link) })
		}
		c, err := n.addressChanges(link, want.Addresses)
		if err != nil {
			return todo, err
		}
		todo = append(todo, c...)
	}
	// The link of the lowest metric last: its routes take the place of those of
	// the uplink in use before, which has others by then.
	slices.SortStableFunc(present, func(a, b netlink.Link) int {
		return highest(want.Routes, b.Attrs().Name) - highest(want.Routes, a.Attrs().Name)
	})
	var gone []change
	for _, link := range present { // after every address: routes may need one
		add, remove, err := n.routeChanges(link, want.Routes)
		if err != nil {
			return todo, err
		}
		todo, gone = append(todo, add...), append(gone, remove...)
	}
	if want.Alone {
		c, err := n.strayChanges(want, present)
		todo = append(todo, c...)
		if err != nil {
			return todo, fmt.Errorf("network namespace %s: %w", n.path, err)
		}
	}
	// New routes before old ones go: a connection on either never lacks one.
	return append(todo, gone...), nil
}

// sysctlChanges compares in the namespace: /proc/sys/net shows that of the
// thread. A kernel without IPv6 has nothing to switch off.
func (n *Namespace) sysctlChanges(want []plan.Sysctl) ([]change, error) {
	var differ []plan.Sysctl
	err := n.do(func() error {
		for _, s := range want {
			b, err := os.ReadFile(filepath.Join("/proc/sys", s.Path))
			if errors.Is(err, fs.ErrNotExist) && strings.HasPrefix(s.Path, "net/ipv6/") {
				continue
			}
			if err != nil {
				return fmt.Errorf("sysctl %s: %w", s.Path, err)
			}
			if strings.TrimSpace(string(b)) != s.Value {
				differ = append(differ, s)
			}
		}
		return nil
	})
	var todo []change
	for _, s := range differ {
		todo = append(todo, change{fmt.Sprintf("sysctl %s=%s", s.Path, s.Value), func() error {
			return n.do(func() error { return os.WriteFile(filepath.Join("/proc/sys", s.Path), []byte(s.Value), 0) })
		}})
	}
	return todo, err
}

func (n *Namespace) addressChanges(link netlink.Link, want []plan.Address) ([]change, error) {
	name := link.Attrs().Name
	have, err := n.link.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("addresses of %s: %w", name, err)
	}
	var todo []change
	var kept []netip.Prefix
	for _, a := range have {
		p := prefix(a.IPNet)
		if a.Flags&unix.IFA_F_NOPREFIXROUTE != 0 && slices.Contains(want, plan.Address{Link: name, Prefix: p}) {
			kept = append(kept, p)
			continue
		}
		todo = append(todo, change{fmt.Sprintf("remove address %s from %s", p, name), func() error { return n.link.AddrDel(link, &a) }})
	}
	for _, a := range want {
		if a.Link != name || slices.Contains(kept, a.Prefix) {
			continue
		}
		addr := &netlink.Addr{IPNet: ipNet(a.Prefix), Flags: unix.IFA_F_NOPREFIXROUTE}
		if a.Prefix.Addr().Is6() {
			addr.Flags |= unix.IFA_F_NODAD // who found the address has asked for duplicates
		}
		todo = append(todo, change{fmt.Sprintf("add address %s to %s", a.Prefix, name), func() error { return n.link.AddrAdd(link, addr) }})
	}
	return todo, nil
}

// metric6 is what the kernel gives an IPv6 route without a metric
// (IP6_RT_PRIO_USER, linux/ipv6_route.h).
const metric6 = 1024

// highest returns the highest metric of a link's routes.
func highest(routes []plan.Route, link string) (metric int) {
	for _, r := range routes {
		if r.Link == link {
			metric = max(metric, r.Metric)
		}
	}
	return metric
}

// routeChanges returns the routes to add to a link and those to remove.
func (n *Namespace) routeChanges(link netlink.Link, want []plan.Route) (add, remove []change, err error) {
	name, index := link.Attrs().Name, link.Attrs().Index
	have, err := n.link.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{LinkIndex: index, Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_OIF|netlink.RT_FILTER_TABLE)
	if err != nil {
		return nil, nil, fmt.Errorf("routes of %s: %w", name, err)
	}
	var kept, found []plan.Route
	for _, h := range have {
		r := plan.Route{Destination: prefix(h.Dst), Link: name, Metric: h.Priority, MTU: h.MTU}
		if r.Destination.Addr().Is6() && r.Metric == metric6 {
			r.Metric = 0
		}
		if via, ok := netip.AddrFromSlice(h.Gw); ok {
			r.Via = via.Unmap()
		}
		found = append(found, r)
		if h.Protocol == protocol && slices.Contains(want, r) {
			kept = append(kept, r)
		}
	}
	for i, h := range have {
		r := found[i]
		if h.Protocol == protocol && slices.Contains(want, r) {
			continue
		}
		// One that differs in its router or MTU alone is replaced below.
		if slices.ContainsFunc(want, func(w plan.Route) bool {
			return w.Link == name && w.Destination == r.Destination && w.Metric == r.Metric && !slices.Contains(kept, w)
		}) {
			continue
		}
		remove = append(remove, change{"remove " + r.String(), func() error {
			if err := n.link.RouteDel(&h); !errors.Is(err, unix.ESRCH) { // one that replaced it took it away
				return err
			}
			return nil
		}})
	}
	for _, r := range want {
		if r.Link != name || slices.Contains(kept, r) {
			continue
		}
		route := &netlink.Route{LinkIndex: index, Dst: ipNet(r.Destination), Protocol: protocol, Scope: netlink.SCOPE_LINK, Table: unix.RT_TABLE_MAIN, Priority: r.Metric, MTU: r.MTU}
		if r.Via.IsValid() {
			route.Gw, route.Scope = r.Via.AsSlice(), netlink.SCOPE_UNIVERSE
		}
		// Another link's route of the same metric gives way to this one.
		add = append(add, change{"add " + r.String(), func() error { return n.link.RouteReplace(route) }})
	}
	return add, remove, nil
}

// prefix converts what netlink reports; nil is the IPv4 default route.
func prefix(n *net.IPNet) netip.Prefix {
	if n == nil {
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	a, _ := netip.AddrFromSlice(n.IP)
	bits, _ := n.Mask.Size()
	return netip.PrefixFrom(a.Unmap(), bits)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
