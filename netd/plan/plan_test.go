package plan

import (
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sekisho/netd"
)

var update = flag.Bool("update", false, "rewrite the golden files")

var (
	uplink = netd.Uplink{Name: "eth0", Carrier: true, Address: netip.MustParsePrefix("192.168.50.23/24"), Router: netip.MustParseAddr("192.168.50.1"), MTU: 1500}
	ends   = []netip.AddrPort{netip.MustParseAddrPort("203.0.113.20:443"), netip.MustParseAddrPort("203.0.113.10:443")}
	inner  = netip.MustParseAddr("10.80.0.2")
	inner6 = netip.MustParseAddr("fd00:80::2")
)

var ends6 = []netip.AddrPort{netip.MustParseAddrPort("[2001:db8:f::20]:443"), netip.MustParseAddrPort("[2001:db8:f::10]:443")}

// sixth gives u IPv6.
func sixth(u netd.Uplink) netd.Uplink {
	u.Address6, u.Local6, u.Router6, u.MTU6 = netip.MustParseAddr("2001:db8:50::23"), netip.MustParseAddr("fe80::23"), netip.MustParseAddr("fe80::1"), 1480
	return u
}

func (in Situation) insideOnly() string { return Make(in).Inside.String() }

func situation(s netd.State) Situation {
	return Situation{State: s, Links: []string{"eth1", "eth0"}, Uplink: uplink, Endpoints: ends, Inner: inner, MTU: 1400, Work: true, Tun: true, Pipe: true,
		Networks: []netip.Prefix{netip.MustParsePrefix("192.168.50.0/24"), netip.MustParsePrefix("10.20.0.0/16")},
		Beacons:  []netip.AddrPort{netip.MustParseAddrPort("192.168.50.9:8443"), netip.MustParseAddrPort("10.20.0.9:8443")}}
}

func TestGolden(t *testing.T) {
	onLink := situation(netd.Attesting)
	onLink.Endpoints = []netip.AddrPort{netip.MustParseAddrPort("192.168.50.9:8443"), netip.MustParseAddrPort("192.168.50.1:443")}
	noWork := situation(netd.Tunnel)
	noWork.Work = false
	atDesk := situation(netd.Office)
	atDesk.Session = true
	away := situation(netd.Office)
	away.Networks = []netip.Prefix{netip.MustParsePrefix("192.168.0.0/16")}
	both := situation(netd.Tunnel)
	both.Inner6 = inner6
	dual := situation(netd.Tunnel)
	dual.Uplink = sixth(dual.Uplink)
	dual.Endpoints, dual.QUIC = append(dual.Endpoints, ends6...), ends6[:1]
	alone := situation(netd.Attesting)
	alone.Uplink = netd.Uplink{Name: "eth0", Carrier: true, MTU: 1500, PathMTU: 1000}
	alone.Uplink, alone.Endpoints = sixth(alone.Uplink), dual.Endpoints
	gw6 := MakeGateway(Gateway{Tun: "tunlg", LGWAN: "lgwan0", Self: netip.MustParseAddr("10.80.0.1"), Pool: netip.MustParsePrefix("10.80.0.0/16"),
		Self6: netip.MustParseAddr("fd00:80::1"), Pool6: netip.MustParsePrefix("fd00:80::/112"), MTU: 1400})
	gw := MakeGateway(Gateway{Tun: "tunlg", LGWAN: "lgwan0", Self: netip.MustParseAddr("10.80.0.1"), Pool: netip.MustParsePrefix("10.80.0.0/16"), MTU: 1400})
	for name, got := range map[string]string{
		"closed":       Closed().String(),
		"dark":         Make(situation(netd.Dark)).String(),
		"linked":       Make(situation(netd.Linked)).String(),
		"tunnel":       Make(situation(netd.Tunnel)).String(),
		"on-link":      Make(onLink).String(),
		"no-work":      Make(noWork).String(),
		"attesting":    Make(situation(netd.Attesting)).String(),
		"office":       Make(atDesk).String(),
		"office-alone": Make(away).String(),
		"gateway":      gw.String(),
		"tunnel6":      both.insideOnly(),
		"gateway6":     gw6.String(),
		"dual":         Make(dual).Outside.String(),
		"alone6":       Make(alone).Outside.String(),
	} {
		path := filepath.Join("testdata", name+".txt")
		if *update {
			if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if got != string(want) {
			t.Errorf("%s:\n%s\nwant:\n%s", name, got, want)
		}
	}
}

// TestOfficeLeavesTheHostsOwn: a gateway inside an office's networks speaks to
// the host by TCP and UDP, and the work domain does not reach it.
func TestOfficeLeavesTheHostsOwn(t *testing.T) {
	s := situation(netd.Office)
	gateway := netip.MustParseAddrPort("10.20.0.7:443")
	s.Endpoints, s.QUIC = append([]netip.AddrPort{gateway}, ends...), []netip.AddrPort{gateway}
	rules := Make(s).Outside.Ruleset.String()
	for _, p := range []string{"tcp", "udp"} {
		for _, want := range []string{"iif eth0 src 10.20.0.7/32 " + p + " sport 443 accept", "iif office1 dst 10.20.0.7/32 " + p + " dport 443 drop"} {
			if !strings.Contains(rules, want) {
				t.Errorf("no rule %q in:\n%s", want, rules)
			}
		}
	}
}

// TestNothingOpensButTunnelAndOffice checks, over every state and every missing
// piece, what must never be planned.
func TestNothingOpensButTunnelAndOffice(t *testing.T) {
	for state := netd.State(0); state < 8; state++ {
		for n := range 1 << 9 {
			s := situation(state)
			s.Endpoints = append(s.Endpoints, ends6...)
			if n&256 != 0 {
				s.Uplink = sixth(s.Uplink)
			}
			if n&64 != 0 {
				s.Inner6 = inner6
			}
			if n&128 != 0 {
				s.MTU = 1279 // too narrow for IPv6
			}
			s.Work, s.Tun, s.Pipe, s.Session = n&1 == 0, n&2 == 0, n&4 == 0, n&32 != 0
			if n&8 != 0 {
				s.Inner = netip.Addr{}
			}
			if n&16 != 0 {
				s.Uplink.Carrier = false
			}
			tunnel := s.Work && s.Tun && n&8 == 0 && (state == netd.Tunnel || state == netd.Office && s.Session)
			office := s.Work && s.Pipe && n&24 == 0 && state == netd.Office
			p := Make(s)
			six := tunnel && n&64 != 0 && n&128 == 0
			for _, setting := range p.Inside.Sysctls {
				if strings.HasSuffix(setting.Path, "0/disable_ipv6") && (setting.Value == "0") != six || setting.Path == "net/ipv6/conf/all/forwarding" && (setting.Value == "1") != six {
					t.Errorf("state %s, pieces %b: %v", state, n, setting)
				}
			}
			for _, r := range p.Inside.Routes {
				if r.Destination.Addr().Is6() && !six {
					t.Errorf("state %s, pieces %b: inside %s", state, n, r)
				}
			}
			six6 := state != netd.Dark && n&16 == 0 && n&256 != 0
			for _, setting := range p.Outside.Sysctls {
				if strings.HasSuffix(setting.Path, "eth0/disable_ipv6") && (setting.Value == "0") != six6 || strings.HasSuffix(setting.Path, "/forwarding") && setting.Value != "0" {
					t.Errorf("state %s, pieces %b: %v outside", state, n, setting)
				}
			}
			for _, c := range p.Outside.Ruleset.Chains {
				for _, r := range c.Rules {
					if r.Six() && (!six6 || c.Hook == Output && r.Verdict == Accept && !r.Source.IsSingleIP() || c.Hook != Output && c.Hook != Input) {
						t.Errorf("state %s, pieces %b: outside %s: %s", state, n, c.Hook, r)
					}
				}
			}
			for _, r := range p.Outside.Routes {
				if r.Destination.Addr().Is6() && (!six6 || r.Via.String() != "fe80::1") {
					t.Errorf("state %s, pieces %b: outside %s", state, n, r)
				}
			}
			if open := len(p.Inside.Routes) > 0 || len(p.Inside.Ruleset.Chains[2].Rules) > 0; open != (tunnel || office) {
				t.Errorf("state %s, pieces %b: inside open = %v", state, n, open)
			}
			for _, c := range append(p.Inside.Ruleset.Chains, p.Outside.Ruleset.Chains...) {
				if c.Open && c.Hook != Prerouting && c.Hook != Postrouting {
					t.Errorf("state %s: chain %s is not closed by default", state, c.Hook)
				}
			}
			if len(p.Inside.Addresses) > 0 {
				t.Errorf("state %s: an address inside", state)
			}
			for _, r := range p.Inside.Routes {
				if r.Link == netd.OfficeLink && !office || r.Link == netd.TunnelLink && !tunnel {
					t.Errorf("state %s, pieces %b: inside %s", state, n, r)
				}
			}
			if office {
				for _, r := range p.Outside.Ruleset.Chains[2].Rules {
					if r.Verdict != Drop && !(r.In == "eth0" && r.Out == netd.OfficeOuterLink && r.Source.IsValid() && r.Destination == host(inner) ||
						r.In == netd.OfficeOuterLink && r.Out == "eth0" && r.Source == host(inner) && r.Destination.IsValid()) {
						t.Errorf("state %s forwards outside: %s", state, r)
					}
				}
				continue
			}
			if len(p.Outside.Ruleset.Chains) != 3 || len(p.Outside.Ruleset.Chains[2].Rules) > 0 || p.Outside.Sysctls[0].Value != "0" {
				t.Errorf("state %s: forwarding outside", state)
			}
			for _, r := range p.Outside.Routes {
				if !r.Destination.IsSingleIP() {
					t.Errorf("state %s: route outside to more than one host: %s", state, r)
				}
			}
			if strings.Contains(p.Outside.Ruleset.String(), "10.80.") {
				t.Errorf("state %s: the inner address appears outside", state)
			}
		}
	}
}
