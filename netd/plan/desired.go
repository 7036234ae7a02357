package plan

import (
	"fmt"
	"net/netip"
	"strings"
)

// Plan is the complete desired configuration of the two namespaces.
type Plan struct {
	Outside Namespace
	Inside  Namespace
}

func (p Plan) String() string {
	return "outside\n" + p.Outside.String() + "inside\n" + p.Inside.String()
}

// Namespace is the complete desired configuration of one network namespace.
// Addresses and routes of the links named in Links are exactly those listed.
type Namespace struct {
	// Alone says that nobody else has a say in the namespace. Links that are
	// not named are down, but for the loopback device, which has no address
	// but its own; the table local holds what follows from the addresses and
	// nothing else; nftables tables but Ruleset go, and IP rules but those that
	// look up the tables local and main, so that routes in other tables lead
	// nowhere. A gateway's namespace is its server's, and not its alone: other
	// links are left as they are.
	Alone     bool
	Sysctls   []Sysctl
	Ruleset   Ruleset
	Links     []Link
	Addresses []Address
	Routes    []Route
}

// Sysctl is a path below /proc/sys and its value.
type Sysctl struct{ Path, Value string }

// Link is a network device that is managed: its flags, addresses and routes.
type Link struct {
	Name string
	Up   bool
	MTU  int // bytes, 0 leaves it alone
	// Maybe says that the link may be missing: others make it and take it away.
	Maybe bool
}

// Address puts a prefix on a link, without the connected route that the
// kernel would add (IFA_F_NOPREFIXROUTE).
type Address struct {
	Link   string
	Prefix netip.Prefix
}

// Route leads to a prefix over a link, through a router if Via is valid.
type Route struct {
	Destination netip.Prefix
	Via         netip.Addr
	Link        string
	Metric      int // the lower is taken, by whoever is not bound to a link
	MTU         int // bytes, for a way that is narrower than its link; 0 if it is not
}

// Ruleset is one nftables table of family inet, replaced as a whole.
type Ruleset struct {
	Table  string
	Chains []Chain
}

// Hook is where a chain sees packets (nft(8), "ADDRESS FAMILIES").
type Hook string

// The hooks in use, each also the name of its chain.
const (
	Input   Hook = "input"
	Output  Hook = "output"
	Forward Hook = "forward"
	// Prerouting and Postrouting stand outside of connection tracking, first
	// and last (priority raw and its mirror), for address translation.
	Prerouting  Hook = "prerouting"
	Postrouting Hook = "postrouting"
)

// Chain is a base chain. Its policy is drop unless Open.
type Chain struct {
	Hook  Hook
	Open  bool
	Rules []Rule
}

// Verdict is what a rule does with a packet that it matches.
type Verdict uint8

// The verdicts. The zero value drops.
const (
	Drop   Verdict = 0
	Accept Verdict = 1
	// Clamp lowers the TCP maximum segment size to Rule.MSS and goes on with
	// the next rule.
	Clamp Verdict = 2
	// RewriteSource and RewriteDestination put Rule.To in place of the address,
	// whatever came before and without a memory, and go on with the next rule.
	RewriteSource      Verdict = 3
	RewriteDestination Verdict = 4
)

// Tracked is a connection-tracking state that a rule asks for.
type Tracked uint8

// The connection-tracking states (linux/netfilter/nf_conntrack_common.h).
const (
	Any         Tracked = 0
	Established Tracked = 1 // belongs to a connection seen in both directions
	Related     Tracked = 2 // an ICMP error about such a connection
)

// Protocol is an IP protocol number.
type Protocol uint8

// The protocols in use (IANA "Assigned Internet Protocol Numbers").
const (
	ICMP   Protocol = 1
	TCP    Protocol = 6
	UDP    Protocol = 17
	ICMPv6 Protocol = 58
)

// Types is a range of ICMPv6 types, both ends included. The zero value is all.
type Types struct{ From, To uint8 }

// Rule matches IPv4 packets by every field that is set, or IPv6 packets if its
// addresses are such, or IPv6 says so.
type Rule struct {
	IPv6                bool   // for a rule without addresses: see Six
	In, Out             string // link names
	Source, Destination netip.Prefix
	Protocol            Protocol
	Types               Types // of ICMPv6
	SourcePort          uint16
	DestinationPort     uint16
	Tracked             Tracked
	Verdict             Verdict
	MSS                 uint16     // bytes, for Clamp: matches SYN packets only
	To                  netip.Addr // for RewriteSource and RewriteDestination
}

// Six reports whether the rule is for IPv6 packets.
func (r Rule) Six() bool {
	return r.IPv6 || r.Protocol == ICMPv6 || r.Source.Addr().Is6() || r.Destination.Addr().Is6()
}

func (n Namespace) String() string {
	var b strings.Builder
	if n.Alone {
		b.WriteString("  alone\n")
	}
	for _, s := range n.Sysctls {
		fmt.Fprintf(&b, "  sysctl %s=%s\n", s.Path, s.Value)
	}
	for _, l := range n.Links {
		state := "down"
		if l.Up {
			state = "up"
		}
		fmt.Fprintf(&b, "  link %s %s", l.Name, state)
		if l.MTU != 0 {
			fmt.Fprintf(&b, " mtu %d", l.MTU)
		}
		if l.Maybe {
			b.WriteString(" if there")
		}
		b.WriteByte('\n')
	}
	for _, a := range n.Addresses {
		fmt.Fprintf(&b, "  addr %s dev %s\n", a.Prefix, a.Link)
	}
	for _, r := range n.Routes {
		fmt.Fprintf(&b, "  %s\n", r)
	}
	b.WriteString(n.Ruleset.String())
	return b.String()
}

func (r Route) String() string {
	s := "route " + r.Destination.String()
	if r.Via.IsValid() {
		s += " via " + r.Via.String()
	}
	s += " dev " + r.Link
	if r.Metric != 0 {
		s += fmt.Sprintf(" metric %d", r.Metric)
	}
	if r.MTU != 0 {
		s += fmt.Sprintf(" mtu %d", r.MTU)
	}
	return s
}

func (r Ruleset) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "  table inet %s\n", r.Table)
	for _, c := range r.Chains {
		policy := "drop"
		if c.Open {
			policy = "accept"
		}
		fmt.Fprintf(&b, "    %s policy %s\n", c.Hook, policy)
		for _, rule := range c.Rules {
			fmt.Fprintf(&b, "      %s\n", rule)
		}
	}
	return b.String()
}

func (r Rule) String() string {
	var w []string
	add := func(set bool, format string, a any) {
		if set {
			w = append(w, fmt.Sprintf(format, a))
		}
	}
	add(r.IPv6, "%s", "ip6")
	add(r.In != "", "iif %s", r.In)
	add(r.Out != "", "oif %s", r.Out)
	add(r.Source.IsValid(), "src %s", r.Source)
	add(r.Destination.IsValid(), "dst %s", r.Destination)
	add(r.Protocol == TCP, "%s", "tcp")
	add(r.Protocol == UDP, "%s", "udp")
	add(r.Protocol == ICMP, "%s", "icmp")
	add(r.Protocol == ICMPv6, "%s", "icmp6")
	add(r.Types != Types{}, "type %s", fmt.Sprintf("%d-%d", r.Types.From, r.Types.To))
	add(r.SourcePort != 0, "sport %d", r.SourcePort)
	add(r.DestinationPort != 0, "dport %d", r.DestinationPort)
	add(r.Tracked == Established, "%s", "established")
	add(r.Tracked == Related, "%s", "related")
	switch r.Verdict {
	case Accept:
		w = append(w, "accept")
	case Clamp:
		w = append(w, fmt.Sprintf("syn mss<=%d", r.MSS))
	case RewriteSource:
		w = append(w, fmt.Sprintf("src:=%s", r.To))
	case RewriteDestination:
		w = append(w, fmt.Sprintf("dst:=%s", r.To))
	default:
		w = append(w, "drop")
	}
	return strings.Join(w, " ")
}
