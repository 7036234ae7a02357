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
	MTU   int          // bytes, of inner packets
}

// MakeGateway returns the desired configuration of a gateway's namespace:
// packets pass between the tunnel and the LGWAN link and nowhere else; laptops
// reach neither the gateway itself, but for its ICMP, nor each other. Because
// it switches forwarding on for the whole server, it also forbids what that
// would open: a way between LGWAN and the server's other links.
func MakeGateway(g Gateway) Namespace {
	tun, lgwan := g.Tun, g.LGWAN
	mss := uint16(g.MTU - 40)
	return Namespace{
		Sysctls:   []Sysctl{{"net/ipv4/ip_forward", "1"}, {"net/ipv6/conf/" + tun + "/disable_ipv6", "1"}, {"net/ipv4/conf/" + tun + "/rp_filter", "1"}},
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
}
