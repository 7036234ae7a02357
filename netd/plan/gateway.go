package plan

import "net/netip"

// GatewayTable is the name of the gateway's nftables table. A gateway is a
// server with other tables beside it, so its chains judge only what enters or
// leaves by the tunnel's link, and what would be forwarded by LGWAN's.
const GatewayTable = "sekisho-gateway"

// Gateway is what the gateway's configuration asks of its host's kernel.
type Gateway struct {
	Tun   string       // the tunnel's link
	LGWAN string       // the link towards LGWAN
	Self  netip.Addr   // the gateway's own inner address, source of its ICMP errors
	Pool  netip.Prefix // the laptops' inner addresses
	Self6 netip.Addr   // the same for IPv6, if laptops have such addresses
	Pool6 netip.Prefix
	MTU   int // bytes, of inner packets
}

// MakeGateway returns the desired configuration of a gateway's namespace:
// packets pass between the tunnel and the LGWAN link and nowhere else; laptops
// reach neither the gateway itself, but for its ICMP, nor each other. Because
// it switches forwarding on for the whole server, it also forbids what that
// would open: a way between LGWAN and the server's other links.
func MakeGateway(g Gateway) Namespace {
	tun, lgwan := g.Tun, g.LGWAN
	mss := uint16(g.MTU - 40)
	n := Namespace{
		Sysctls:   append([]Sysctl{{"net/ipv4/ip_forward", "1"}, {"net/ipv4/conf/" + tun + "/rp_filter", "1"}}, six(tun, g.Pool6.IsValid())...),
		Links:     []Link{{Name: tun, Up: true, MTU: g.MTU}},
		Addresses: []Address{{tun, host(g.Self)}},
		Routes:    []Route{{Destination: g.Pool.Masked(), Link: tun}},
		Ruleset: Ruleset{Table: GatewayTable, Chains: []Chain{
			{Hook: Input, Open: true, Rules: []Rule{
				{In: tun, Source: g.Pool, Destination: host(g.Self), Protocol: ICMP, Verdict: Accept},
				{In: tun},
			}},
			{Hook: Forward, Open: true, Rules: []Rule{
				{In: tun, Out: lgwan, Protocol: TCP, Verdict: Clamp, MSS: mss},
				{In: lgwan, Out: tun, Protocol: TCP, Verdict: Clamp, MSS: mss},
				{In: tun, Out: lgwan, Source: g.Pool, Verdict: Accept},
				{In: lgwan, Out: tun, Destination: g.Pool, Verdict: Accept},
				{In: tun},
				{Out: tun},
				{In: lgwan},
				{Out: lgwan},
			}},
		}},
	}
	if g.Pool6.IsValid() {
		g.six(&n)
	}
	return n
}

// six adds the same for IPv6. A laptop's source is checked by its session; what
// comes from LGWAN with a laptop's address is not a laptop's, and what is for one
// link only does not pass.
func (g Gateway) six(n *Namespace) {
	tun, lgwan, self, mss := g.Tun, g.LGWAN, host(g.Self6), uint16(g.MTU-60)
	n.Sysctls = append(n.Sysctls, Sysctl{"net/ipv6/conf/all/forwarding", "1"})
	n.Addresses = append(n.Addresses, Address{tun, self})
	n.Routes = append(n.Routes, Route{Destination: g.Pool6.Masked(), Link: tun})
	input, forward := &n.Ruleset.Chains[0], &n.Ruleset.Chains[1]
	input.Rules = append(input.Rules,
		Rule{In: tun, Source: g.Pool6, Destination: self, Protocol: ICMPv6, Types: Types{1, 129}, Verdict: Accept},
		Rule{IPv6: true, In: tun})
	forward.Rules = append(forward.Rules,
		Rule{In: tun, Protocol: ICMPv6, Types: neighbourly}, Rule{Out: tun, Protocol: ICMPv6, Types: neighbourly},
		Rule{Out: tun, Source: linkLocal}, Rule{Out: tun, Source: g.Pool6},
		Rule{IPv6: true, In: tun, Out: lgwan, Protocol: TCP, Verdict: Clamp, MSS: mss},
		Rule{IPv6: true, In: lgwan, Out: tun, Protocol: TCP, Verdict: Clamp, MSS: mss},
		Rule{In: tun, Out: lgwan, Source: g.Pool6, Verdict: Accept},
		Rule{In: lgwan, Out: tun, Destination: g.Pool6, Verdict: Accept},
		Rule{IPv6: true, In: tun}, Rule{IPv6: true, Out: tun}, Rule{IPv6: true, In: lgwan}, Rule{IPv6: true, Out: lgwan})
}
