// Package plan turns facts into one complete desired configuration: links,
// addresses, routes, sysctls and rulesets of both namespaces. It is pure; the
// text form of a plan is what its tests compare and what a person reviews.
//
// Everything is closed unless a line of the plan opens it.
//
// Outside, the host sends TCP to exactly the configured endpoints, over host
// routes; there is no default route, no connected route and no forwarding.
// DHCP needs no rule: netd's packet socket stands before the inet hooks, so
// no UDP at all passes them. ARP is not IP and is left alone. IPv6 is off on
// uplinks for now.
//
// Inside, in the state Tunnel only, packets pass between work0 and tun0 if
// they bear the inner address that the gateway assigned. The host itself says
// nothing there.
package plan

import (
	"net/netip"
	"slices"

	"sekisho/netd"
)

// Table is the name of the only nftables table on a laptop.
const Table = "sekisho"

// Situation is all that a plan follows from. The zero value is closed.
type Situation struct {
	State netd.State
	// Links names every Ethernet link outside. All are up, so that their
	// carrier is seen; only the uplink's has an address.
	Links  []string
	Uplink netd.Uplink
	// Endpoints are the verifiers and gateways: all that the host may talk to.
	Endpoints []netip.AddrPort
	// Inner is the inner address that the gateway assigned, MTU that of the
	// inner packets in bytes. They count in the state Tunnel only.
	Inner netip.Addr
	MTU   int
	// Work and Tun say whether work0 and tun0 exist.
	Work, Tun bool
}

// Closed is the plan in which nothing passes.
func Closed() Plan { return Make(Situation{}) }

// Make returns the plan for in.
func Make(in Situation) Plan {
	return Plan{Outside: outside(in), Inside: inside(in)}
}

// quiet lists the settings of both namespaces: no IPv6 address of its own
// making, and no redirect or source route obeyed (kernel
// Documentation/networking/ip-sysctl.rst).
func quiet(forward string) []Sysctl {
	// First, because the kernel resets others of these when it changes.
	s := []Sysctl{{"net/ipv4/ip_forward", forward}}
	for _, where := range []string{"all", "default"} {
		v4, v6 := "net/ipv4/conf/"+where, "net/ipv6/conf/"+where
		s = append(s,
			Sysctl{v6 + "/disable_ipv6", "1"},
			Sysctl{v6 + "/accept_ra", "0"},
			Sysctl{v6 + "/autoconf", "0"},
			Sysctl{v4 + "/rp_filter", "1"},
			Sysctl{v4 + "/accept_redirects", "0"},
			Sysctl{v4 + "/send_redirects", "0"},
			Sysctl{v4 + "/accept_source_route", "0"},
			Sysctl{v4 + "/arp_ignore", "2"}, // answer only for the link's own address and prefix
			Sysctl{v4 + "/arp_announce", "2"},
		)
	}
	return s
}

func outside(in Situation) Namespace {
	n := Namespace{
		Alone:   true,
		Sysctls: append(quiet("0"), Sysctl{"net/ipv4/tcp_mtu_probing", "1"}),
		Ruleset: closed(),
	}
	up := in.Uplink
	for _, name := range slices.Sorted(slices.Values(in.Links)) {
		l := Link{Name: name, Up: true}
		if name == up.Name {
			l.MTU = up.MTU
		}
		n.Links = append(n.Links, l)
	}
	if in.State == netd.Dark || !up.Usable() {
		return n
	}
	n.Addresses = []Address{{up.Name, up.Address}}
	if up.Router.IsValid() {
		n.Routes = append(n.Routes, Route{Destination: host(up.Router), Link: up.Name})
	}
	input, output := &n.Ruleset.Chains[0], &n.Ruleset.Chains[1]
	input.Rules = []Rule{{In: up.Name, Protocol: ICMP, Tracked: Related, Verdict: Accept}}
	endpoints := slices.Clone(in.Endpoints)
	slices.SortFunc(endpoints, netip.AddrPort.Compare)
	for _, e := range slices.Compact(endpoints) {
		if !e.Addr().Is4() {
			continue // uplinks have no IPv6 yet
		}
		to := host(e.Addr())
		r := Route{Destination: to, Via: up.Router, Link: up.Name}
		if up.Address.Contains(e.Addr()) {
			r.Via = netip.Addr{}
		}
		if (r.Via.IsValid() || up.Address.Contains(e.Addr())) && e.Addr() != up.Router && !slices.Contains(n.Routes, r) {
			n.Routes = append(n.Routes, r)
		}
		output.Rules = append(output.Rules, Rule{Out: up.Name, Destination: to, Protocol: TCP, DestinationPort: e.Port(), Verdict: Accept})
		input.Rules = append(input.Rules, Rule{In: up.Name, Source: to, Protocol: TCP, SourcePort: e.Port(), Tracked: Established, Verdict: Accept})
	}
	return n
}

func inside(in Situation) Namespace {
	open := in.State == netd.Tunnel && in.Work && in.Tun && in.Inner.Is4()
	forward := "0"
	if open {
		forward = "1"
	}
	n := Namespace{
		Alone:   true,
		Sysctls: quiet(forward),
		Ruleset: closed(),
	}
	if in.Tun {
		n.Links = append(n.Links, Link{Name: netd.TunnelLink, Up: open, MTU: in.MTU})
	}
	if in.Work {
		// Up also while closed: a write to a TUN that is down is an error to linkd.
		n.Links = append(n.Links, Link{Name: netd.WorkLink, Up: true, MTU: in.MTU})
	}
	if !open {
		return n
	}
	inner := host(in.Inner)
	n.Routes = []Route{
		{Destination: netip.PrefixFrom(netip.IPv4Unspecified(), 0), Link: netd.TunnelLink},
		{Destination: inner, Link: netd.WorkLink},
	}
	mss := uint16(in.MTU - 40) // IPv4 and TCP headers without options
	n.Ruleset.Chains[2].Rules = []Rule{
		{In: netd.WorkLink, Out: netd.TunnelLink, Protocol: TCP, Verdict: Clamp, MSS: mss},
		{In: netd.TunnelLink, Out: netd.WorkLink, Protocol: TCP, Verdict: Clamp, MSS: mss},
		{In: netd.WorkLink, Out: netd.TunnelLink, Source: inner, Verdict: Accept},
		{In: netd.TunnelLink, Out: netd.WorkLink, Destination: inner, Verdict: Accept},
	}
	return n
}

// closed is the ruleset that passes nothing: input, output, forward in this order.
func closed() Ruleset {
	return Ruleset{Table: Table, Chains: []Chain{{Hook: Input}, {Hook: Output}, {Hook: Forward}}}
}

func host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
