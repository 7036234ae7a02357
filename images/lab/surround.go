package lab

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"syscall"
)

// surround.go changes what the laptop's cable leads to: the home, an office of
// the organisation's, a hotel, and networks that fail in one way or another.

// Addresses of the office's LAN.
var (
	officePrefix  = netip.MustParsePrefix("10.20.0.0/24")
	beaconAddress = netip.MustParseAddrPort("10.20.0.9:8443")
)

// Addresses of the office's server and of the hotel's sign-in page.
const (
	AssetsAddress = "10.20.0.77:80"
	PortalAddress = "192.168.50.1:8080"
)

const (
	beaconName = "beacon.sekisho.example"
	officeSite = "hq"
)

// surrounding is a LAN and what it does to packets.
type surrounding struct {
	office bool
	rules  string // in the table of the home's router, nft(8)
	mtu    int    // of its way to the site in bytes; 1500 if 0
	portal bool   // a sign-in page answers in place of every server
}

var surroundings = map[string]surrounding{
	"home":   {},
	"office": {office: true},
	"hotel": {portal: true, rules: "chain p { type nat hook prerouting priority -100; iifname uplink tcp dport { 80, 443 } dnat ip to " + PortalAddress + "; }\n" +
		"chain f { type filter hook forward priority 0; drop; }"},
	"udp-blocked": {rules: "chain f { type filter hook forward priority 0; meta l4proto udp drop; }"},
	"black-hole":  {rules: "chain f { type filter hook forward priority 0; drop; }"},
	"mtu-1280": {mtu: 1280, rules: "chain f { type filter hook forward priority 0; icmp type destination-unreachable drop; }\n" +
		"chain o { type filter hook output priority 0; icmp type destination-unreachable drop; }"},
}

// Surroundings lists what Surround knows.
func Surroundings() []string { return slices.Sorted(maps.Keys(surroundings)) }

// Surround pulls the cable, changes the LAN at its far end, and plugs it in again.
func (l *Lab) Surround(ctx context.Context, name string) error {
	s, ok := surroundings[name]
	if !ok {
		return fmt.Errorf("lab: scenario %q: want one of %q", name, Surroundings())
	}
	if err := setCable(ctx, false); err != nil {
		return err
	}
	for _, p := range []string{"dnsmasq", "beacon", "assets", "portal"} {
		if proc, err := l.find(p); err == nil {
			if err := errors.Join(proc.kill(syscall.SIGKILL), proc.wait(ctx)); err != nil {
				return err
			}
		}
	}
	mtu := s.mtu
	if mtu == 0 {
		mtu = 1500
	}
	commands := [][]string{
		{"ip", "-n", "sekisho-home", "address", "flush", "dev", "uplink"},
		{"ip", "-n", "sekisho-home", "link", "set", "site0", "mtu", fmt.Sprint(mtu)},
	}
	addresses := []string{"192.168.50.1/24"}
	if s.office {
		addresses = []string{"10.20.0.1/24", "10.20.0.9/24", "10.20.0.77/24"}
	}
	for _, a := range addresses {
		commands = append(commands, []string{"ip", "-n", "sekisho-home", "address", "add", a, "dev", "uplink"})
	}
	for _, c := range commands {
		if err := command(ctx, "", c...); err != nil {
			return err
		}
	}
	if err := command(ctx, "table inet place {}\ndelete table inet place\ntable inet place {\n"+s.rules+"\n}\n", "ip", "netns", "exec", "sekisho-home", "nft", "-f", "-"); err != nil {
		return err
	}
	if err := l.serveLAN(ctx, s); err != nil {
		return err
	}
	return setCable(ctx, true)
}

// setCable plugs the laptop's cable in or pulls it.
func setCable(ctx context.Context, in bool) error {
	_, err := qmp(ctx, "set_link", map[string]any{"name": "uplink", "up": in})
	return err
}

// serveLAN starts the servers of a LAN.
func (l *Lab) serveLAN(ctx context.Context, s surrounding) error {
	self := l.bin("lab")
	net24 := "192.168.50"
	if s.office {
		net24 = "10.20.0"
	}
	list := []spec{dhcpServer(net24, l.lab("dnsmasq.leases"))}
	if s.portal {
		list = append(list, spec{name: "portal", namespace: "sekisho-home", argv: []string{self, "helper", "portal"}})
	}
	if s.office {
		if err := writeJSON(l.lab("beacon.json"), l.beaconConfig()); err != nil {
			return err
		}
		list = append(list,
			spec{name: "beacon", namespace: "sekisho-home", argv: []string{l.bin("beacon"), "serve", "-config", l.lab("beacon.json")}},
			spec{name: "assets", namespace: "sekisho-home", argv: []string{self, "helper", "assets"}})
	}
	for _, s := range list {
		if _, err := l.start(s); err != nil {
			return err
		}
	}
	return nil
}

// beaconConfig is the configuration of the office's beacon.
func (l *Lab) beaconConfig() map[string]any {
	return map[string]any{
		"site": officeSite, "interface": "uplink", "listen": beaconAddress, "networks": []netip.Prefix{officePrefix},
		"certificate": l.lab("pki", "beacon.pem"), "key": l.lab("pki", "beacon.key"), "client_ca": l.lab("pki", "device-ca.pem"),
	}
}

// dhcpServer is the LAN's.
func dhcpServer(net24, leases string) spec {
	return spec{name: "dnsmasq", namespace: "sekisho-home", argv: []string{"dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--port=0",
		"--interface=uplink", "--interface=air", "--interface=lte", "--bind-dynamic", "--no-ping", "--user=root", "--dhcp-authoritative", "--log-dhcp", "--log-facility=-", "--pid-file=",
		"--dhcp-range=" + net24 + ".20," + net24 + ".99,255.255.255.0,1h", "--dhcp-range=192.168.60.20,192.168.60.99,255.255.255.0,1h", "--dhcp-range=192.168.70.20,192.168.70.99,255.255.255.0,1h", "--dhcp-leasefile=" + leases}}
}
