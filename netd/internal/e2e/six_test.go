//go:build linux

package e2e

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gopacket/gopacket/layers"
	"github.com/insomniacslk/dhcp/dhcpv6"
	"github.com/insomniacslk/dhcp/dhcpv6/server6"
	"github.com/insomniacslk/dhcp/iana"
	"golang.org/x/sys/unix"

	"sekisho/attest/gate"
	"sekisho/netd"
	"sekisho/netd/internal/nstest"
)

// What the world has of IPv6 outside, where a scenario asks for it.
const (
	gateway6  = "[2001:db8:f::20]:443"
	verifier6 = "[2001:db8:f::10]:443"
	homeNet   = "2001:db8:50::"
	// homeRouter is one of its router's link-local addresses.
	homeRouter = "fe80::50:1"
)

// six gives site, gateway, organisation and home IPv6. The home's router
// advertises as dnsmasq's arguments say; with none it is silent.
func (w *world) six(dnsmasq ...string) {
	w.t.Helper()
	for ns, addresses := range map[*nstest.NS]map[string]string{
		w.home: {homeNet + "1/64": "lan0", "2001:db8:f::1/64": "wan0"},
		w.site: {"2001:db8:f::20/64": "wan0", "2001:db8:f::10/64": "wan0"},
	} {
		for a, link := range addresses {
			ns.Run("sysctl", "-qw", "net.ipv6.conf."+link+".disable_ipv6=0", "net.ipv6.conf.all.forwarding=1", "net.ipv6.conf."+link+".accept_dad=0")
			ns.Run("ip", "address", "add", a, "dev", link, "nodad")
		}
	}
	w.home.Run("ip", "address", "add", homeRouter+"/64", "dev", "lan0", "nodad")
	w.site.Run("ip", "route", "add", "2001:db8:50::/48", "via", "2001:db8:f::1")
	w.organization.Gateways[0].Address6 = netip.MustParseAddrPort(gateway6)
	w.organization.Verifiers[0].Address6 = netip.MustParseAddrPort(verifier6)
	w.gatewayOn("[::]:443")
	if len(dnsmasq) > 0 {
		w.advertiser(dnsmasq...)
	}
}

// gatewayOn starts the gateway anew, with another address.
func (w *world) gatewayOn(listen string) {
	w.kill(w.gateway)
	w.gatewayConfig["listen"] = listen
	w.write("gateway.json", w.gatewayConfig)
	w.startGateway()
}

// advertiser starts a router's advertisements on the home's LAN.
func (w *world) advertiser(dnsmasq ...string) *exec.Cmd {
	return w.home.Start("dnsmasq", append([]string{"--keep-in-foreground", "--log-facility=-", "--conf-file=/dev/null", "--port=0", "--interface=lan0", "--bind-interfaces", "--leasefile-ro",
		"--enable-ra", "--ra-param=lan0,high,4,1800", "--no-ping", "--pid-file=" + w.path("ra6.pid"),
		"--dhcp-option=option6:dns-server,[" + homeNet + "1]", "--dhcp-option=option6:domain-search,evil.test"}, dnsmasq...)...)
}

// slaacOnly has a dnsmasq advertise the home's prefix for hosts' own addresses.
const slaacOnly = "--dhcp-range=" + homeNet + ",ra-only,64,10m"

// alone takes the home's DHCPv4 away, and with it IPv4.
func (w *world) alone(dnsmasq ...string) {
	w.six(dnsmasq...)
	w.kill(w.dhcp)
	w.dhcp = nil
}

// over waits for a session by one address family, and reads both pages.
func (w *world) over(limit time.Duration, six bool) (s netd.Status) {
	w.t.Helper()
	nstest.Eventually(w.t, limit, func() (err error) {
		if s, err = w.status(); err == nil && (s.State != netd.Tunnel || s.Tunnel == nil || s.Tunnel.Gateway.Addr().Is6() != six) {
			err = fmt.Errorf("%s; tunnel %+v; uplink %+v", s.Line(), s.Tunnel, s.Uplink)
		}
		return err
	})
	w.readPage(10 * time.Second)
	w.readPage6(20 * time.Second)
	return s
}

// readPage6 is readPage, over IPv6 in the tunnel.
func (w *world) readPage6(limit time.Duration) {
	w.t.Helper()
	nstest.Eventually(w.t, limit, func() error {
		text, err := w.fetch(page6, time.Second)
		if err == nil && text != pageText {
			err = fmt.Errorf("page is %q", text)
		}
		return err
	})
}

// quiet6 fails the test if the laptop took more from the LAN than one address
// and host routes.
func (w *world) quiet6() {
	w.t.Helper()
	for line := range strings.Lines(w.laptop.Run("ip", "-6", "-o", "address", "show", "dev", "eth0")) {
		if !strings.Contains(line, "/128 ") {
			w.t.Errorf("an address of the kernel's own: %s", line)
		}
	}
	for line := range strings.Lines(w.laptop.Run("ip", "-6", "route", "show")) {
		if !strings.HasPrefix(line, "2001:db8:f::10 via fe80::") && !strings.HasPrefix(line, "2001:db8:f::20 via fe80::") {
			w.t.Errorf("a route that is not the plan's: %s", line)
		}
	}
}

// none6 waits until the uplink says why it has no IPv6, and it is used with IPv4.
func none6(why string) func(*testing.T, *world) {
	return func(t *testing.T, w *world) {
		nstest.Eventually(t, 30*time.Second, func() error {
			s, err := w.status()
			if err == nil && (!strings.Contains(s.Uplink.IPv6, why) || s.Uplink.Address6.IsValid() || s.State != netd.Tunnel) {
				err = fmt.Errorf("%s; uplink %+v", s.Line(), s.Uplink)
			}
			return err
		})
		if a := w.laptop.Run("ip", "-6", "-o", "address", "show", "dev", "eth0"); a != "" {
			t.Errorf("an IPv6 address was taken: %s", a)
		}
		w.readPage(10 * time.Second)
	}
}

func scenarios6() []scenario {
	return []scenario{
		{name: "IPv6: both families, one dies after the other", before: func(w *world) { w.six(slaacOnly) }, run: func(t *testing.T, w *world) {
			// IPv4 is there a second earlier, for nobody has to be asked about its address.
			s := w.over(20*time.Second, false)
			w.has6(homeNet + "/64")
			w.quiet6()
			for i, dies := range []string{"ip", "ip6"} {
				w.home.Run("nft", "add table "+dies+" evil; add chain "+dies+" evil f { type filter hook forward priority 0; }; add rule "+dies+" evil f drop")
				start := time.Now()
				w.over(30*time.Second, dies == "ip")
				t.Logf("page %v after %s has died", time.Since(start).Round(time.Millisecond), dies)
				w.home.Run("nft", "delete table "+dies+" evil")
				if i == 0 && !s.Uplink.Address.IsValid() {
					t.Errorf("uplink %+v", s.Uplink)
				}
			}
		}},
		{name: "IPv6 alone, by SLAAC", before: func(w *world) { w.alone(slaacOnly) }, run: func(t *testing.T, w *world) {
			s := w.over(20*time.Second, true)
			w.quiet6()
			if s.Uplink.Address.IsValid() {
				t.Errorf("uplink %+v", s.Uplink)
			}
			for range 5 { // the carrier flaps
				w.home.Run("ip", "link", "set", "lan0", "down")
				w.home.Run("ip", "link", "set", "lan0", "up")
			}
			w.home.Run("ip", "address", "replace", homeNet+"1/64", "dev", "lan0", "nodad")
			if again := w.over(40*time.Second, true); again.Uplink.Address6 != s.Uplink.Address6 {
				t.Errorf("another address in the same network: %s, then %s", s.Uplink.Address6, again.Uplink.Address6)
			}
			w.netd.Process.Signal(unix.SIGSTOP) // and it sleeps
			<-time.After(3 * time.Second)
			w.netd.Process.Signal(unix.SIGCONT)
			w.over(40*time.Second, true)
			w.attestd.set(gate.StateRefused, 0)
			w.waitState(10*time.Second, netd.Attesting, "")
			w.attestd.set(gate.StateAffirming, time.Hour)
			w.over(20*time.Second, true)
		}},
		{name: "IPv6 alone, by DHCPv6", before: func(w *world) { w.alone("--dhcp-range=" + homeNet + "1000," + homeNet + "1fff,64,2m") }, run: func(t *testing.T, w *world) {
			s := w.over(30*time.Second, true)
			w.quiet6()
			if !netip.MustParsePrefix(homeNet + "1000/116").Contains(s.Uplink.Address6) {
				t.Errorf("uplink %+v", s.Uplink)
			}
			w.home.Run("ip", "link", "set", "lan0", "down")
			w.home.Run("ip", "link", "set", "lan0", "up")
			w.home.Run("ip", "address", "replace", homeNet+"1/64", "dev", "lan0", "nodad")
			w.home.Run("ip", "address", "replace", homeRouter+"/64", "dev", "lan0", "nodad")
			w.over(40*time.Second, true)
		}},
		{name: "IPv6: absurd answers of DHCPv6", waits: true, before: func(w *world) { w.rogue6("ff02::1", "fe80::66", "::1", "::", "64:ff9b::a01:50") }, run: none6("absurd lease: address ")},
		{name: "IPv6: DHCPv6 gives the gateway's address", before: func(w *world) { w.rogue6("2001:db8:f::20") }, run: none6("which holds the organisation's server")},
		{name: "IPv6: DHCPv6 gives the inner address", before: func(w *world) { w.rogue6(inner6) }, run: func(t *testing.T, w *world) {
			w.has6("fd00:80::/64")
			w.over(10*time.Second, false)
		}},
		{name: "IPv6: prefix of the inner network, and routes to it", before: func(w *world) {
			w.alone()
			w.forge(forged{router: homeRouter, prefixes: []string{"fd00:80::/64", homeNet + "/64"}, route: "fd00:1::/64"})
		}, dark: true, run: func(t *testing.T, w *world) {
			w.waitState(30*time.Second, netd.Tunnel, "")
			w.readPage6(20 * time.Second)
		}},
		{name: "IPv6: another router takes over", before: func(w *world) { w.alone() }, dark: true, run: func(t *testing.T, w *world) {
			const first = homeRouter
			stop := w.forge(forged{router: first, prefixes: []string{homeNet + "/64"}})
			s := w.over(30*time.Second, true)
			stop()
			w.second()
			w.send(forged{router: first, lifetime: -1}.packet()) // it says goodbye
			w.by(secondRouter)
			if n := w.over(10*time.Second, true); n.Uplink.Address6 == s.Uplink.Address6 {
				t.Errorf("still %s", n.Uplink.Address6)
			}
		}},
		{name: "IPv6: router falls silent, another is there", before: func(w *world) { w.alone() }, dark: true, run: func(t *testing.T, w *world) {
			stop := w.forge(forged{router: homeRouter, prefixes: []string{homeNet + "/64"}})
			w.over(30*time.Second, true)
			w.second()
			w.by(homeRouter)
			stop()
			start := time.Now()
			w.home.Run("ip", "address", "del", homeRouter+"/64", "dev", "lan0")
			w.home.Run("nft", "add table ip6 evil; add chain ip6 evil f { type filter hook forward priority 0; }; add rule ip6 evil f ip6 saddr "+homeNet+"/64 drop")
			w.by(secondRouter)
			w.over(10*time.Second, true)
			t.Logf("page %v after it", time.Since(start).Round(time.Millisecond))
		}},
		{name: "IPv6: RA says MTU 68", before: func(w *world) {
			w.six()
			w.forge(forged{router: "fe80::bad", mtu: 68, prefixes: []string{homeNet + "/64"}})
		}, run: none6("mtu 68")},
		{name: "IPv6: RA with a router of no time", before: func(w *world) {
			w.six()
			w.forge(forged{router: "fe80::bad", lifetime: 3, prefixes: []string{homeNet + "/64"}})
		}, run: none6("for 3s")},
		{name: "IPv6: RA with a prefix of no time", before: func(w *world) {
			w.six()
			w.forge(forged{router: "fe80::bad", valid: 5, prefixes: []string{homeNet + "/64"}})
		}, run: none6("valid for 5s")},
		{name: "IPv6: RA with absurd prefixes", before: func(w *world) {
			w.six()
			w.forge(forged{router: "fe80::bad", prefixes: []string{"2001:db8:50::/63", "ff02::/64", "fe80::/64", "::/64", "::/0", "64:ff9b::/96"}})
		}, run: none6("prefix")},
		{name: "IPv6: prefix of the organisation's servers", before: func(w *world) {
			w.six()
			w.forge(forged{router: "fe80::bad", prefixes: []string{"2001:db8:f::/64"}})
		}, run: none6("which holds the organisation's server")},
		{name: "IPv6: every address is somebody's", before: func(w *world) { w.claimEverything(); w.six(slaacOnly) }, run: none6("in use by somebody else")},
		{name: "IPv6: flood of routers and prefixes", before: func(w *world) { w.six(slaacOnly) }, run: func(t *testing.T, w *world) {
			w.has6(homeNet + "/64")
			w.flood6(20000)
			w.over(20*time.Second, false)
			w.has6(homeNet + "/64") // it has not moved
			w.quiet6()
		}},
	}
}

const secondRouter = "fe80::2:2"

// second puts another router with another prefix into the home's LAN.
func (w *world) second() {
	w.home.Run("ip", "address", "add", secondRouter+"/64", "dev", "lan0", "nodad")
	w.home.Run("ip", "address", "add", "2001:db8:51::1/64", "dev", "lan0", "nodad")
	w.site.Run("ip", "route", "add", "2001:db8:51::/64", "via", "2001:db8:f::1")
	w.forge(forged{router: secondRouter, prefixes: []string{"2001:db8:51::/64"}})
}

// by waits until the tunnel goes by a router.
func (w *world) by(router string) {
	w.t.Helper()
	nstest.Eventually(w.t, 60*time.Second, func() error {
		s, err := w.status()
		if err == nil && (s.State != netd.Tunnel || s.Uplink.Router6.String() != router) {
			err = fmt.Errorf("%s; uplink %+v", s.Line(), s.Uplink)
		}
		return err
	})
}

// has6 waits until the uplink has an address in a prefix.
func (w *world) has6(prefix string) {
	w.t.Helper()
	nstest.Eventually(w.t, 20*time.Second, func() error {
		s, err := w.status()
		if err == nil && !netip.MustParsePrefix(prefix).Contains(s.Uplink.Address6) {
			err = fmt.Errorf("uplink %+v, want an address in %s", s.Uplink, prefix)
		}
		return err
	})
}

// forged is a router's advertisement that nobody's router would send.
type forged struct {
	router   string
	lifetime int // seconds; 1800 if 0, none if negative
	mtu      uint32
	valid    uint32 // seconds, of the prefixes; 7200 if 0
	prefixes []string
	route    string // of a route information option, RFC 4191
	managed  bool
}

// packet is the frame, from a hardware address of its own unless the router's is real.
func (f forged) packet() []byte {
	lifetime, valid := f.lifetime, f.valid
	if lifetime == 0 {
		lifetime = 1800
	}
	if valid == 0 {
		valid = 7200
	}
	var options []layers.ICMPv6Option
	for _, p := range f.prefixes {
		prefix := netip.MustParsePrefix(p)
		b := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32([]byte{byte(prefix.Bits()), 0xc0}, valid), valid)
		options = append(options, layers.ICMPv6Option{Type: 3, Data: append(append(b, 0, 0, 0, 0), prefix.Addr().AsSlice()...)})
	}
	if f.mtu != 0 {
		options = append(options, layers.ICMPv6Option{Type: 5, Data: binary.BigEndian.AppendUint32([]byte{0, 0}, f.mtu)})
	}
	if f.route != "" {
		p := netip.MustParsePrefix(f.route)
		options = append(options, layers.ICMPv6Option{Type: 24, Data: append([]byte{byte(p.Bits()), 0x08, 0, 0, 7, 8}, p.Addr().AsSlice()...)})
	}
	// Resolvers and search domains (RFC 8106), a portal (RFC 8910).
	options = append(options, layers.ICMPv6Option{Type: 25, Data: append([]byte{0, 0, 0, 0, 7, 8}, net.ParseIP(f.router)...)},
		layers.ICMPv6Option{Type: 31, Data: append([]byte{0, 0, 0, 0, 7, 8}, "\x04evil\x04test\x00\x00\x00\x00\x00\x00"...)},
		layers.ICMPv6Option{Type: 37, Data: []byte("http://portal.evil.te/")})
	flags := uint8(0)
	if f.managed {
		flags = 0x80
	}
	ip := &layers.IPv6{Version: 6, HopLimit: 255, NextHeader: layers.IPProtocolICMPv6, SrcIP: net.ParseIP(f.router), DstIP: net.ParseIP("ff02::1")}
	icmp := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(layers.ICMPv6TypeRouterAdvertisement, 0)}
	icmp.SetNetworkLayerForChecksum(ip)
	return serialize(&layers.Ethernet{SrcMAC: net.HardwareAddr{2, 0xba, 0xd, 0, 0, 1}, DstMAC: net.HardwareAddr{0x33, 0x33, 0, 0, 0, 1}, EthernetType: layers.EthernetTypeIPv6},
		ip, icmp, &layers.ICMPv6RouterAdvertisement{HopLimit: 64, Flags: flags, RouterLifetime: uint16(max(0, lifetime)), Options: options})
}

// send puts frames on the home's LAN.
func (w *world) send(frames ...[]byte) {
	w.t.Helper()
	if err := w.home.Do(func() error {
		fd, err := packetSocket("lan0")
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for _, f := range frames {
			if _, err := unix.Write(fd, f); err != nil && err != unix.ENOBUFS {
				return err
			}
		}
		return nil
	}); err != nil {
		w.t.Fatal(err)
	}
}

// forge sends an advertisement twice a second until stop or the test's end.
func (w *world) forge(f forged) (stop func()) {
	ctx, cancel := context.WithCancel(w.t.Context())
	var all sync.WaitGroup
	all.Go(func() {
		tick := time.NewTicker(500 * time.Millisecond)
		defer tick.Stop()
		for {
			w.send(f.packet())
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
		}
	})
	stop = func() { cancel(); all.Wait() }
	w.t.Cleanup(stop)
	return stop
}

// flood6 sends n advertisements, each of another router with other prefixes.
func (w *world) flood6(n int) {
	for range n / 500 {
		var frames [][]byte
		for range 500 {
			f := forged{router: fmt.Sprintf("fe80::%x:%x", rand.N(1<<16), rand.N(1<<16))}
			for range 8 {
				f.prefixes = append(f.prefixes, fmt.Sprintf("2001:db8:%x:%x::/64", 0x1000+rand.N(1<<15), rand.N(1<<16)))
			}
			frames = append(frames, f.packet())
		}
		w.send(frames...)
	}
}

// rogue6 gives whoever asks one address after the other by DHCPv6, and resolvers
// with it, on a link whose router says that this is the way.
func (w *world) rogue6(addresses ...string) {
	w.six()
	w.forge(forged{router: "fe80::bad", managed: true})
	var server *server6.Server
	var n atomic.Int64 // of answers
	handler := func(conn net.PacketConn, peer net.Addr, d dhcpv6.DHCPv6) {
		m, err := d.GetInnerMessage()
		if err != nil || m.Options.OneIANA() == nil {
			return
		}
		modify := []dhcpv6.Modifier{
			dhcpv6.WithServerID(&dhcpv6.DUIDLL{HWType: iana.HWTypeEthernet, LinkLayerAddr: net.HardwareAddr{2, 0xba, 0xd, 0, 0, 3}}),
			dhcpv6.WithIAID(m.Options.OneIANA().IaId), dhcpv6.WithIANA(dhcpv6.OptIAAddress{IPv6Addr: net.ParseIP(addresses[int(n.Add(1))%len(addresses)]), PreferredLifetime: time.Hour, ValidLifetime: time.Hour}),
			dhcpv6.WithDNS(net.ParseIP(homeNet + "1")), dhcpv6.WithDomainSearchList("evil.test"),
		}
		r, err := dhcpv6.NewReplyFromMessage(m, modify...)
		if m.MessageType == dhcpv6.MessageTypeSolicit {
			r, err = dhcpv6.NewAdvertiseFromSolicit(m, modify...)
		}
		if err == nil {
			conn.WriteTo(r.ToBytes(), peer)
		}
	}
	if err := w.home.Do(func() (err error) { server, err = server6.NewServer("lan0", nil, handler); return err }); err != nil {
		w.t.Fatal(err)
	}
	go server.Serve()
	w.t.Cleanup(func() { server.Close() })
}

// claimEverything answers every question whether an address is somebody's.
func (w *world) claimEverything() {
	var fd int
	if err := w.home.Do(func() (err error) { fd, err = packetSocket("lan0"); return err }); err != nil {
		w.t.Fatal(err)
	}
	stop, done := make(chan struct{}), make(chan struct{})
	w.t.Cleanup(func() { close(stop); <-done; unix.Close(fd) })
	go func() {
		defer close(done)
		for b := make([]byte, 1<<16); ; {
			n, _, err := unix.Recvfrom(fd, b, 0)
			select {
			case <-stop:
				return
			default:
			}
			if err != nil || n < 78 || string(b[6:12]) != string(w.hardware) || binary.BigEndian.Uint16(b[12:]) != 0x86dd || b[20] != 58 || b[54] != 135 || netip.AddrFrom16([16]byte(b[22:38])) != netip.IPv6Unspecified() {
				continue
			}
			target := net.IP(append([]byte(nil), b[62:78]...))
			ip := &layers.IPv6{Version: 6, HopLimit: 255, NextHeader: layers.IPProtocolICMPv6, SrcIP: target, DstIP: net.ParseIP("ff02::1")}
			icmp := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(layers.ICMPv6TypeNeighborAdvertisement, 0)}
			icmp.SetNetworkLayerForChecksum(ip)
			mac := net.HardwareAddr{2, 0xba, 0xd, 0, 0, 2}
			unix.Write(fd, serialize(&layers.Ethernet{SrcMAC: mac, DstMAC: net.HardwareAddr{0x33, 0x33, 0, 0, 0, 1}, EthernetType: layers.EthernetTypeIPv6}, ip, icmp,
				&layers.ICMPv6NeighborAdvertisement{Flags: 0x20, TargetAddress: target, Options: []layers.ICMPv6Option{{Type: 2, Data: mac}}}))
		}
	}()
}
