// Package plan turns facts into one complete desired configuration: links,
// addresses, routes, sysctls and rulesets of both namespaces. It is pure; the
// text form of a plan is what its tests compare and what a person reviews.
//
// Everything is closed unless a line of the plan opens it.
//
// Outside, the host sends TCP to exactly the configured endpoints, and UDP to
// the gateways among them, over host routes; there is no default route, no
// connected route and no forwarding. It
// may do so over every usable uplink: the metric of the routes says which one
// is in use, and a probe or a session that drains is bound to its own.
// DHCP needs no rule: netd's packet socket stands before the inet hooks, so
// no other UDP passes them; so do routers' advertisements and solicitations. ARP
// is not IP and is left alone. IPv6 is off on a link but while netd has an
// address for it, and then makes no address and obeys no router by itself.
//
// Inside, in the states Tunnel and Office only, packets pass between work0 and
// tun0 if they bear the inner address that the gateway assigned, or the IPv6 one
// beside it. The host itself says nothing there: neither link has neighbours.
//
// In the state Office there is a second way, for the office's networks only:
// work0 ─ office0 ═ office1 ─ the proven uplink. Its two TUN devices are ends of
// a pipe that netd holds: without netd, or without its proof, there is no pipe.
// Outside, the inner address and the uplink's are put in each other's place.
package plan

import (
	"cmp"
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
	Links []string
	// Uplink is the one in use. Standby are the others that are usable.
	Uplink  netd.Uplink
	Standby []netd.Uplink
	// Endpoints are the verifiers and gateways: all that the host may talk to.
	Endpoints []netip.AddrPort
	// QUIC are those of Endpoints that it may talk to by UDP too.
	QUIC []netip.AddrPort
	// Inner is the inner address that the gateway assigned, MTU that of the
	// inner packets in bytes. They count in the states Tunnel and Office only.
	Inner netip.Addr
	// Inner6 is the IPv6 inner address, if the gateway assigned one. It is used
	// in the tunnel only: an office's networks are IPv4.
	Inner6 netip.Addr
	MTU    int
	// Session says that a tunnel session is open; in the state Tunnel one is.
	Session bool
	// Networks are the office's, reached over the uplink in the state Office.
	Networks []netip.Prefix
	// Beacons are those on the uplink's own prefix, which the host may talk to.
	Beacons []netip.AddrPort
	// Work, Tun and Pipe say whether work0, tun0, and both ends of the pipe exist.
	Work, Tun, Pipe bool
}

// office reports whether the way to the office's networks is open.
func (in Situation) office() bool {
	return in.State == netd.Office && in.Work && in.Pipe && in.Inner.Is4() && in.Uplink.Usable() && in.Uplink.Address.IsValid() && in.Uplink.Address.Addr() != in.Inner
}

// tunnel reports whether the way into the tunnel is open.
func (in Situation) tunnel() bool {
	return (in.State == netd.Tunnel || in.State == netd.Office && in.Session) && in.Work && in.Tun && in.Inner.Is4()
}

// six reports whether IPv6 has a way into the tunnel, which has to be as wide
// as every IPv6 link (RFC 8200, section 5).
func (in Situation) six() bool { return in.tunnel() && in.Inner6.Is6() && in.MTU >= minMTU6 }

const minMTU6 = 1280

// Closed is the plan in which nothing passes.
func Closed() Plan { return Make(Situation{}) }

// Make returns the plan for in.
func Make(in Situation) Plan {
	return Plan{Outside: outside(in), Inside: inside(in)}
}

// quiet lists the settings of both namespaces: no IPv6 address of its own
// making, and no redirect or source route obeyed (kernel
// Documentation/networking/ip-sysctl.rst).
//
// filter is rp_filter: 1 wants the best route to a packet's source to be that
// of the link it came by, 2 takes any route, for where there are several
// uplinks; what may come in over which link is then the ruleset's to say.
func quiet(forward, forward6, filter string) []Sysctl {
	// First, because the kernel resets others of these when it changes.
	s := []Sysctl{{"net/ipv4/ip_forward", forward}, {"net/ipv6/conf/all/forwarding", forward6}}
	for _, where := range []string{"all", "default"} {
		v4, v6 := "net/ipv4/conf/"+where, "net/ipv6/conf/"+where
		s = append(s,
			Sysctl{v6 + "/disable_ipv6", "1"},
			Sysctl{v6 + "/accept_ra", "0"},
			Sysctl{v6 + "/autoconf", "0"},
			Sysctl{v6 + "/accept_redirects", "0"},
			Sysctl{v6 + "/addr_gen_mode", "1"}, // no link-local address either
			Sysctl{v4 + "/rp_filter", filter},
			Sysctl{v4 + "/accept_redirects", "0"},
			Sysctl{v4 + "/send_redirects", "0"},
			Sysctl{v4 + "/accept_source_route", "0"},
			Sysctl{v4 + "/arp_ignore", "2"}, // answer only for the link's own address and prefix
			Sysctl{v4 + "/arp_announce", "2"},
		)
	}
	return s
}

// six switches IPv6 on a link on or off: the settings of all do not reach links
// that are there already, but for a few. It is on only where the plan has
// addresses or routes of it, and then obeys nothing that the link says.
func six(link string, on bool) []Sysctl {
	conf, disable := "net/ipv6/conf/"+link+"/", "1"
	if on {
		disable = "0"
	}
	return []Sysctl{
		{conf + "accept_ra", "0"}, {conf + "autoconf", "0"}, {conf + "accept_redirects", "0"}, {conf + "addr_gen_mode", "1"},
		{conf + "disable_ipv6", disable}, // last: the others are in force by then
	}
}

func outside(in Situation) Namespace {
	forward := "0"
	if in.office() {
		forward = "1"
	}
	n := Namespace{
		Alone:   true,
		Sysctls: append(quiet(forward, "0", "2"), Sysctl{"net/ipv4/tcp_mtu_probing", "1"}),
		Ruleset: closed(),
	}
	usable := slices.DeleteFunc(append([]netd.Uplink{in.Uplink}, in.Standby...), func(u netd.Uplink) bool { return !u.Usable() })
	if in.State == netd.Dark || !in.Uplink.Usable() {
		usable = nil
	}
	links := slices.Sorted(slices.Values(in.Links))
	for _, name := range links {
		l := Link{Name: name, Up: true}
		if i := slices.IndexFunc(usable, func(u netd.Uplink) bool { return u.Name == name }); i >= 0 {
			l.MTU = usable[i].MTU
		}
		n.Links = append(n.Links, l)
		on := slices.ContainsFunc(usable, func(u netd.Uplink) bool { return u.Name == name && u.Address6.IsValid() })
		n.Sysctls = append(n.Sysctls, six(name, on)...)
	}
	if in.Pipe {
		n.Links = append(n.Links, Link{Name: netd.OfficeOuterLink, Up: in.office(), MTU: in.MTU})
	}
	for i, up := range usable {
		metric := inUse
		if i > 0 {
			metric += 1 + slices.Index(links, up.Name) // stays while others come and go
		}
		n.open(up, in.endpoints(i == 0), in.QUIC, metric)
	}
	if in.office() {
		officeOutside(in, in.endpoints(true), &n)
	}
	return n
}

// inUse is the metric of the routes of the uplink in use.
const inUse = 1

// open lets the host talk to the endpoints over up by TCP, and to those that
// speak QUIC by UDP too, by every address family that up has.
func (n *Namespace) open(up netd.Uplink, endpoints, quic []netip.AddrPort, metric int) {
	if up.Address.IsValid() {
		n.open4(up, endpoints, quic, metric)
	}
	if up.Address6.IsValid() {
		n.open6(up, endpoints, quic, metric)
	}
}

// talk adds the rules for one endpoint.
func (n *Namespace) talk(link string, self netip.Prefix, e netip.AddrPort, quic []netip.AddrPort) {
	input, output, to := &n.Ruleset.Chains[0], &n.Ruleset.Chains[1], host(e.Addr())
	for _, p := range protocols(e, quic) {
		output.Rules = append(output.Rules, Rule{Out: link, Source: self, Destination: to, Protocol: p, DestinationPort: e.Port(), Verdict: Accept})
		input.Rules = append(input.Rules, Rule{In: link, Source: to, Destination: self, Protocol: p, SourcePort: e.Port(), Tracked: Established, Verdict: Accept})
	}
}

// open6 is open for IPv6. All goes by the router, none to neighbours. Of
// neighbour discovery solicitations and advertisements of neighbours pass, from
// the uplink's two addresses and to whoever hears them: without them there is no
// router's hardware address. Routers' advertisements and DHCPv6 reach netd by a
// packet socket; routers' solicitations, redirects and listeners' reports nobody.
func (n *Namespace) open6(up netd.Uplink, endpoints, quic []netip.AddrPort, metric int) {
	self := host(up.Address6)
	n.Addresses = append(n.Addresses, Address{up.Name, self}, Address{up.Name, host(up.Local6)})
	input, output := &n.Ruleset.Chains[0], &n.Ruleset.Chains[1]
	input.Rules = append(input.Rules,
		Rule{In: up.Name, Protocol: ICMPv6, Types: neighbours, Verdict: Accept},
		Rule{In: up.Name, Destination: self, Protocol: ICMPv6, Tracked: Related, Verdict: Accept})
	for _, own := range []netip.Prefix{self, host(up.Local6)} {
		output.Rules = append(output.Rules, Rule{Out: up.Name, Source: own, Protocol: ICMPv6, Types: neighbours, Verdict: Accept})
	}
	mtu := up.MTU6
	if up.PathMTU >= minMTU6 && (mtu == 0 || up.PathMTU < mtu) {
		mtu = up.PathMTU
	}
	for _, e := range endpoints {
		if !e.Addr().Is6() {
			continue
		}
		if r := (Route{Destination: host(e.Addr()), Via: up.Router6, Link: up.Name, Metric: metric, MTU: mtu}); !slices.Contains(n.Routes, r) {
			n.Routes = append(n.Routes, r)
		}
		n.talk(up.Name, self, e, quic)
	}
}

// neighbours are ICMPv6's neighbour solicitation and advertisement (RFC 4861,
// sections 4.3 and 4.4).
var neighbours = Types{135, 136}

func (n *Namespace) open4(up netd.Uplink, endpoints, quic []netip.AddrPort, metric int) {
	self := host(up.Address.Addr())
	n.Addresses = append(n.Addresses, Address{up.Name, up.Address})
	if up.Router.IsValid() {
		n.Routes = append(n.Routes, Route{Destination: host(up.Router), Link: up.Name, Metric: metric})
	}
	input := &n.Ruleset.Chains[0]
	input.Rules = append(input.Rules, Rule{In: up.Name, Destination: self, Protocol: ICMP, Tracked: Related, Verdict: Accept})
	for _, e := range endpoints {
		if !e.Addr().Is4() {
			continue
		}
		to := host(e.Addr())
		r := Route{Destination: to, Via: up.Router, Link: up.Name, Metric: metric, MTU: up.PathMTU}
		if up.Address.Contains(e.Addr()) {
			r.Via = netip.Addr{}
		}
		if (r.Via.IsValid() || up.Address.Contains(e.Addr())) && e.Addr() != up.Router && !slices.Contains(n.Routes, r) {
			n.Routes = append(n.Routes, r)
		}
		n.talk(up.Name, self, e, quic)
	}
}

// protocols are those that the host talks to e by.
func protocols(e netip.AddrPort, quic []netip.AddrPort) []Protocol {
	if slices.Contains(quic, e) {
		return []Protocol{TCP, UDP}
	}
	return []Protocol{TCP}
}

// endpoints are all that the host may talk to on an uplink, in order: the
// beacons only on the one in use.
func (in Situation) endpoints(present bool) []netip.AddrPort {
	out := slices.Clone(in.Endpoints)
	for _, b := range in.Beacons {
		if present && b.Addr().Is4() && in.Uplink.Address.Contains(b.Addr()) && b.Addr() != in.Uplink.Address.Addr() {
			out = append(out, b)
		}
	}
	slices.SortFunc(out, netip.AddrPort.Compare)
	return slices.Compact(out)
}

// networks are the office's, in order.
func (in Situation) networks() []netip.Prefix {
	list := slices.SortedFunc(slices.Values(in.Networks), func(a, b netip.Prefix) int {
		return cmp.Or(a.Addr().Compare(b.Addr()), a.Bits()-b.Bits())
	})
	return slices.Compact(list)
}

// officeOutside opens the way between the pipe and the proven uplink: for the
// office's networks, in both directions, with the uplink's address in place of
// the inner one. The host's own connections and DHCP share that address and
// are left alone; the work domain does not reach the host's servers this way.
func officeOutside(in Situation, endpoints []netip.AddrPort, n *Namespace) {
	up, pipe, inner, own := in.Uplink, netd.OfficeOuterLink, host(in.Inner), host(in.Uplink.Address.Addr())
	pre, post, forward := Chain{Hook: Prerouting, Open: true}, Chain{Hook: Postrouting, Open: true}, &n.Ruleset.Chains[2]
	for _, e := range endpoints {
		if !e.Addr().Is4() {
			continue
		}
		for _, p := range protocols(e, in.QUIC) {
			pre.Rules = append(pre.Rules, Rule{In: up.Name, Source: host(e.Addr()), Protocol: p, SourcePort: e.Port(), Verdict: Accept})
			forward.Rules = append(forward.Rules, Rule{In: pipe, Destination: host(e.Addr()), Protocol: p, DestinationPort: e.Port()})
		}
	}
	pre.Rules = append(pre.Rules, Rule{In: up.Name, Protocol: UDP, DestinationPort: 68, Verdict: Accept})
	n.Routes = append(n.Routes, Route{Destination: inner, Link: pipe})
	for _, net := range in.networks() {
		r := Route{Destination: net, Via: up.Router, Link: up.Name, Metric: inUse}
		if up.Address.Contains(net.Addr()) && net.Bits() >= up.Address.Bits() {
			r.Via = netip.Addr{}
		} else if local := up.Address.Masked(); net.Contains(local.Addr()) && !slices.Contains(in.Networks, local) {
			n.Routes = append(n.Routes, Route{Destination: local, Link: up.Name, Metric: inUse})
		}
		if (r.Via.IsValid() || up.Address.Contains(net.Addr())) && !slices.Contains(n.Routes, r) {
			n.Routes = append(n.Routes, r)
		}
		pre.Rules = append(pre.Rules, Rule{In: up.Name, Source: net, Destination: own, Verdict: RewriteDestination, To: in.Inner})
		forward.Rules = append(forward.Rules,
			Rule{In: pipe, Out: up.Name, Source: inner, Destination: net, Verdict: Accept},
			Rule{In: up.Name, Out: pipe, Source: net, Destination: inner, Verdict: Accept})
	}
	post.Rules = []Rule{{Out: up.Name, Source: inner, Verdict: RewriteSource, To: up.Address.Addr()}}
	n.Ruleset.Chains = append(n.Ruleset.Chains, pre, post)
}

func inside(in Situation) Namespace {
	open := in.tunnel() || in.office()
	forward, forward6 := "0", "0"
	if open {
		forward = "1"
	}
	if in.six() {
		forward6 = "1"
	}
	n := Namespace{
		Alone:   true,
		Sysctls: slices.Concat(quiet(forward, forward6, "1"), six(netd.TunnelLink, in.six()), six(netd.WorkLink, in.six())),
		Ruleset: closed(),
		Links: []Link{
			{Name: netd.TunnelLink, Up: in.tunnel(), MTU: in.MTU, Maybe: !in.Tun},
			// Up also while closed: a write to a TUN that is down is an error to linkd.
			{Name: netd.WorkLink, Up: true, MTU: in.MTU, Maybe: true},
		},
	}
	if in.Pipe {
		n.Links = append(n.Links, Link{Name: netd.OfficeLink, Up: in.office(), MTU: in.MTU})
	}
	if !open {
		return n
	}
	inner := host(in.Inner)
	n.Routes = []Route{{Destination: inner, Link: netd.WorkLink}}
	forwarded := &n.Ruleset.Chains[2]
	way := func(link string, to netip.Prefix) {
		n.Routes = append(n.Routes, Route{Destination: to, Link: link})
		out, back := Rule{In: netd.WorkLink, Out: link, Source: inner, Verdict: Accept}, Rule{In: link, Out: netd.WorkLink, Destination: inner, Verdict: Accept}
		if to.Bits() > 0 {
			out.Destination, back.Source = to, to
		}
		forwarded.Rules = append(forwarded.Rules, out, back)
	}
	mss := uint16(in.MTU - 40) // IPv4 and TCP headers without options
	for _, w := range []struct {
		link string
		open bool
		to   []netip.Prefix
	}{
		{netd.TunnelLink, in.tunnel(), []netip.Prefix{netip.PrefixFrom(netip.IPv4Unspecified(), 0)}},
		{netd.OfficeLink, in.office(), in.networks()},
	} {
		if !w.open {
			continue
		}
		forwarded.Rules = append(forwarded.Rules,
			Rule{In: netd.WorkLink, Out: w.link, Protocol: TCP, Verdict: Clamp, MSS: mss},
			Rule{In: w.link, Out: netd.WorkLink, Protocol: TCP, Verdict: Clamp, MSS: mss})
		for _, to := range w.to {
			way(w.link, to)
		}
	}
	if in.six() {
		inside6(in, &n)
	}
	return n
}

// inside6 opens the way into the tunnel for IPv6. Neither end is the other's
// neighbour: what is for one link only (link-local and multicast addresses, and
// ICMPv6 from type 130 on: listeners, routers, neighbours, redirects) stays out,
// and so does the inner address where it is not the sender's: there is no
// rp_filter for IPv6.
func inside6(in Situation, n *Namespace) {
	const work, tun = netd.WorkLink, netd.TunnelLink
	inner, mss := host(in.Inner6), uint16(in.MTU-60) // IPv6 and TCP headers without options
	n.Routes = append(n.Routes, Route{Destination: inner, Link: work}, Route{Destination: netip.PrefixFrom(netip.IPv6Unspecified(), 0), Link: tun})
	forwarded := &n.Ruleset.Chains[2]
	forwarded.Rules = append(forwarded.Rules,
		Rule{Protocol: ICMPv6, Types: neighbourly},
		Rule{Destination: linkLocal}, Rule{Source: linkLocal}, Rule{Destination: multicast},
		Rule{In: tun, Source: inner},
		Rule{IPv6: true, In: work, Out: tun, Protocol: TCP, Verdict: Clamp, MSS: mss},
		Rule{IPv6: true, In: tun, Out: work, Protocol: TCP, Verdict: Clamp, MSS: mss},
		Rule{In: work, Out: tun, Source: inner, Verdict: Accept},
		Rule{In: tun, Out: work, Destination: inner, Verdict: Accept})
}

// neighbourly are the ICMPv6 types behind errors and echo (IANA, ICMPv6
// parameters).
var neighbourly = Types{130, 255}

var linkLocal, multicast = netip.MustParsePrefix("fe80::/10"), netip.MustParsePrefix("ff00::/8")

// closed is the ruleset that passes nothing: input, output, forward in this order.
func closed() Ruleset {
	return Ruleset{Table: Table, Chains: []Chain{{Hook: Input}, {Hook: Output}, {Hook: Forward}}}
}

func host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
