//go:build linux

package e2e

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/insomniacslk/dhcp/dhcpv4"
	"golang.org/x/sys/unix"

	"sekisho/netd"
	"sekisho/netd/internal/nstest"
)

// attacks are scenarios of what others may try: in the laptop's LAN, in the work
// domain, on the laptop itself.
func attacks() []scenario {
	return []scenario{
		{name: "the LAN answers name servers, DoT and DoH itself", run: resolvers},
		{name: "the LAN calls every port", run: scanned},
		{name: "the LAN talks every protocol to the laptop", run: addressed},
		{name: "the LAN takes the laptop for a router", before: func(w *world) { w.newDesk() }, run: notARouter},
		{name: "forged ICMP errors about the tunnel", run: forgedErrors},
		{name: "forged resets of the tunnel", run: forgedResets},
		{name: "the router's hardware address is claimed", waits: true, run: poisoned},
		{name: "a LAN of inner addresses, the laptop's own among them", run: innerLAN},
		{name: "a LAN that claims the servers' addresses", run: serversLAN},
		{name: "DHCP: another address every two seconds", waits: true, dark: true, before: renumbering, run: func(t *testing.T, w *world) {
			seen := map[netip.Addr]bool{}
			nstest.Eventually(t, 60*time.Second, func() error {
				s, err := w.status()
				if s.State == netd.Tunnel {
					seen[s.Uplink.Address.Addr()] = true
				}
				if err == nil && len(seen) < 3 {
					err = fmt.Errorf("tunnel from %v only", seen)
				}
				return err
			})
			w.readPage(30 * time.Second)
		}},
		{name: "from the office into its twin", before: func(w *world) { w.newDesk() }, run: intoTwin},
		{name: "another program opens the laptop", run: meddled},
		{name: "a card named as the tunnel", waits: true, run: misnamed},
		{name: "100,000 flows of the work domain", run: manyFlows},
	}
}

// stranger is the hardware address of whoever attacks in a LAN.
var stranger = net.HardwareAddr{0x02, 0x66, 0x66, 0x66, 0x66, 0x66}

// wire returns what puts frames on the LAN of ns, as any device there can.
func (w *world) wire(ns *nstest.NS) (send func(frames ...[]byte), fd int) {
	w.t.Helper()
	if err := ns.Do(func() (err error) { fd, err = packetSocket("lan0"); return err }); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { unix.Close(fd) })
	return func(frames ...[]byte) {
		for _, f := range frames {
			for {
				if _, err := unix.Write(fd, f); err != unix.ENOBUFS && err != unix.EAGAIN {
					break
				}
			}
		}
	}, fd
}

// to makes a frame for the laptop, or for everybody.
func (w *world) to(everybody bool, kind layers.EthernetType, l ...gopacket.SerializableLayer) []byte {
	mac := net.HardwareAddr(w.hardware)
	if everybody {
		mac = layers.EthernetBroadcast
	}
	return serialize(append([]gopacket.SerializableLayer{&layers.Ethernet{SrcMAC: stranger, DstMAC: mac, EthernetType: kind}}, l...)...)
}

func ip4(from, to string, p layers.IPProtocol) *layers.IPv4 {
	return &layers.IPv4{Version: 4, TTL: 64, Protocol: p, SrcIP: net.ParseIP(from).To4(), DstIP: net.ParseIP(to).To4()}
}

func tcp(ip *layers.IPv4, t layers.TCP) *layers.TCP {
	t.SetNetworkLayerForChecksum(ip)
	return &t
}

func udp(ip *layers.IPv4, from, to int) *layers.UDP {
	u := &layers.UDP{SrcPort: layers.UDPPort(from), DstPort: layers.UDPPort(to)}
	u.SetNetworkLayerForChecksum(ip)
	return u
}

// resolvers puts well-known name servers into the LAN. The work domain's own
// programs ask them by every protocol: in the tunnel nobody answers.
func resolvers(t *testing.T, w *world) {
	known := []string{"8.8.8.8", "1.1.1.1", "9.9.9.9", "192.168.50.1"}
	for _, a := range known {
		if a != "192.168.50.1" {
			w.home.Run("ip", "address", "add", a+"/32", "dev", "lan0")
		}
	}
	for _, port := range []string{"53", "853", "443", "5353"} {
		go serveSecrets(w.home.Listen("0.0.0.0:" + port))
	}
	for _, state := range []string{"Tunnel", "closed"} {
		for _, a := range known {
			for _, port := range []string{"53", "853", "443", "5353"} {
				if c, err := call(w.work, net.JoinHostPort(a, port), 100*time.Millisecond); err == nil {
					c.c.Close()
					t.Errorf("%s: %s:%s answers the work domain", state, a, port)
				}
			}
		}
		if state == "Tunnel" {
			w.attestd.set("refused", 0)
			w.waitState(10*time.Second, netd.Attesting, "")
		}
	}
	w.attestd.set("affirming", time.Hour)
	w.readPage(30 * time.Second)
}

// scanned calls every port of the laptop, and of its inner address: it has to be
// as if nobody were there.
func scanned(t *testing.T, w *world) {
	own := w.waitAddress("192.168.50.").Uplink.Address.Addr().String()
	send, _ := w.wire(w.home)
	for port := 1; port < 1<<16; port++ {
		for _, dst := range []string{own, "10.80.0.2"} {
			if dst != own && port > 1024 {
				continue
			}
			ip := ip4("192.168.50.1", dst, layers.IPProtocolTCP)
			send(w.to(false, layers.EthernetTypeIPv4, ip, tcp(ip, layers.TCP{SrcPort: 443, DstPort: layers.TCPPort(port), SYN: true, Window: 1024})))
			ip = ip4("192.168.50.1", dst, layers.IPProtocolUDP)
			send(w.to(false, layers.EthernetTypeIPv4, ip, udp(ip, 53, port), gopacket.Payload("is anybody there?")))
		}
	}
	w.readPage(10 * time.Second)
}

// addressed says to the laptop whatever a LAN says, and much that it does not.
func addressed(t *testing.T, w *world) {
	own := w.waitAddress("192.168.50.").Uplink.Address.Addr().String()
	send, _ := w.wire(w.home)
	const router, all = "192.168.50.1", "255.255.255.255"
	var frames [][]byte
	v4 := func(from, dst string, p layers.IPProtocol, l ...gopacket.SerializableLayer) {
		for _, everybody := range []bool{false, true} {
			frames = append(frames, w.to(everybody, layers.EthernetTypeIPv4, append([]gopacket.SerializableLayer{ip4(from, dst, p)}, l...)...))
		}
	}
	for _, from := range []string{router, own, "127.0.0.1", "0.0.0.0", "10.80.0.2", "10.1.0.80", "203.0.113.20", all, "224.0.0.1"} {
		for _, dst := range []string{own, all, "192.168.50.255", "224.0.0.1", "224.0.0.251", "127.0.0.1", "10.80.0.2", "10.1.0.80", "8.8.8.8", "203.0.113.20"} {
			for _, kind := range []uint8{0, 3, 4, 5, 8, 9, 10, 11, 12, 13, 15, 17, 30, 37} {
				v4(from, dst, layers.IPProtocolICMPv4, &layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(kind, 0), Id: 7, Seq: 1}, gopacket.Payload(make([]byte, 56)))
			}
			for _, p := range []layers.IPProtocol{layers.IPProtocolIGMP, layers.IPProtocolIPv4, layers.IPProtocolIPv6, layers.IPProtocolGRE, layers.IPProtocolESP, layers.IPProtocolAH, layers.IPProtocolSCTP, 112, 253, 255} {
				v4(from, dst, p, gopacket.Payload(append([]byte{0x11, 0, 0xee, 0xff}, make([]byte, 60)...)))
			}
			for _, port := range []int{7, 67, 68, 137, 138, 161, 427, 443, 500, 1900, 3702, 4500, 5353, 5355} {
				ip := ip4(from, dst, layers.IPProtocolUDP)
				v4(from, dst, layers.IPProtocolUDP, udp(ip, port, port), gopacket.Payload(make([]byte, 300)))
			}
			ip := ip4(from, dst, layers.IPProtocolTCP)
			for _, s := range []layers.TCP{{SYN: true}, {SYN: true, ACK: true}, {ACK: true}, {RST: true}, {FIN: true, PSH: true, URG: true}, {}} {
				s.SrcPort, s.DstPort, s.Window = 443, 40000, 1024
				v4(from, dst, layers.IPProtocolTCP, tcp(ip, s))
			}
		}
	}
	for _, odd := range []func(*layers.IPv4){
		func(ip *layers.IPv4) { ip.Flags = layers.IPv4MoreFragments },
		func(ip *layers.IPv4) { ip.FragOffset = 185 },
		func(ip *layers.IPv4) { ip.TTL = 1 },
		func(ip *layers.IPv4) { // loose source route to LGWAN
			ip.Options = []layers.IPv4Option{{OptionType: 131, OptionLength: 7, OptionData: []byte{4, 10, 1, 0, 80}}}
		},
		func(ip *layers.IPv4) { // record route
			ip.Options = []layers.IPv4Option{{OptionType: 7, OptionLength: 7, OptionData: []byte{4, 0, 0, 0, 0}}}
		},
	} {
		ip := ip4(router, own, layers.IPProtocolUDP)
		odd(ip)
		frames = append(frames, w.to(false, layers.EthernetTypeIPv4, ip, udp(ip, 53, 40000), gopacket.Payload(make([]byte, 64))))
	}
	for _, kind := range []layers.EthernetType{layers.EthernetTypeDot1Q, layers.EthernetTypeQinQ, layers.EthernetTypePPPoEDiscovery, layers.EthernetTypeLinkLayerDiscovery, layers.EthernetTypeMPLSUnicast, 0x88e5, 0x0842, 0x9000} {
		frames = append(frames, w.to(true, kind, gopacket.Payload(make([]byte, 64))), w.to(false, kind, gopacket.Payload(make([]byte, 64))))
	}
	for _, dst := range []string{"ff02::1", "ff02::fb", "ff02::1:3", "fe80::50:ff:fe00:23", "fd00:50::1", "::1"} {
		for _, kind := range []uint8{128, 130, 133, 134, 135, 136, 137, 139, 151} {
			ip := &layers.IPv6{Version: 6, HopLimit: 255, NextHeader: layers.IPProtocolICMPv6, SrcIP: net.ParseIP("fe80::66"), DstIP: net.ParseIP(dst)}
			icmp := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(kind, 0)}
			icmp.SetNetworkLayerForChecksum(ip)
			frames = append(frames, w.to(true, layers.EthernetTypeIPv6, ip, icmp, gopacket.Payload(make([]byte, 40))), w.to(false, layers.EthernetTypeIPv6, ip, icmp, gopacket.Payload(make([]byte, 40))))
		}
	}
	arp := func(op uint16, from, about string) {
		frames = append(frames, w.to(true, layers.EthernetTypeARP, &layers.ARP{AddrType: layers.LinkTypeEthernet, Protocol: layers.EthernetTypeIPv4, HwAddressSize: 6, ProtAddressSize: 4, Operation: op,
			SourceHwAddress: stranger, SourceProtAddress: net.ParseIP(from).To4(), DstHwAddress: make([]byte, 6), DstProtAddress: net.ParseIP(about).To4()}))
	}
	for _, about := range []string{"10.80.0.2", "127.0.0.1", "10.1.0.80", "203.0.113.20", "169.254.1.1", "0.0.0.0", all} { // none is the laptop's in this LAN
		for _, from := range []string{router, "192.168.50.66", "10.80.0.1", "127.0.0.2", "0.0.0.0"} {
			arp(1, from, about)
			arp(2, from, about)
		}
	}
	for range 3 {
		send(frames...)
	}
	t.Logf("%d frames", 3*len(frames))
	w.readPage(20 * time.Second)
}

// notARouter sends packets for LGWAN and others to the laptop, at home and in
// the office, where it does forward.
func notARouter(t *testing.T, w *world) {
	try := func(where string, from *nstest.NS, via netip.Addr, link string) {
		for _, net24 := range []string{"10.1.0.0/24", "8.8.8.0/24", "10.80.0.0/24"} {
			from.Run("ip", "route", "replace", net24, "via", via.String(), "dev", link)
		}
		for _, to := range []string{"10.1.0.80:80", "8.8.8.8:53", "10.80.0.1:80"} {
			if c, err := call(from, to, 300*time.Millisecond); err == nil {
				c.c.Close()
				t.Errorf("%s: %s is reached through the laptop", where, to)
			}
		}
	}
	try("home", w.home, w.waitAddress("192.168.50.").Uplink.Address.Addr(), "lan0")
	for _, net24 := range []string{"10.1.0.0/24", "8.8.8.0/24", "10.80.0.0/24"} {
		w.home.Run("ip", "route", "del", net24)
	}
	w.desk.startBeacon(w.desk.officeCA)
	w.plug(w.home, w.desk.router)
	s := w.waitState(30*time.Second, netd.Office, "")
	try("office", w.desk.servers, s.Uplink.Address.Addr(), "eth0")
	w.waitState(10*time.Second, netd.Office, "")
	w.readPage(20 * time.Second)
}

// sniff returns the next TCP segment of the laptop to the gateway, nil if none
// comes: the tunnel may be on HTTP/3 for a while, which takes no such forgery.
func sniff(fd int) (*layers.IPv4, *layers.TCP) {
	buf := make([]byte, 1<<17)
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err != nil || n < 54 || binary.BigEndian.Uint16(buf[12:]) != 0x0800 {
			continue
		}
		p := gopacket.NewPacket(buf[:n], layers.LayerTypeEthernet, gopacket.Default)
		ip, _ := p.NetworkLayer().(*layers.IPv4)
		if seg, ok := p.TransportLayer().(*layers.TCP); ok && ip != nil && ip.DstIP.Equal(net.IPv4(203, 0, 113, 20)) && seg.ACK {
			return ip, seg
		}
	}
	return nil, nil
}

// forgedErrors tells the laptop, about the very segments of its tunnel, that its
// path is narrow, closed, or elsewhere.
func forgedErrors(t *testing.T, w *world) {
	send, fd := w.wire(w.home)
	for range 20 {
		ip, seg := sniff(fd)
		if ip == nil {
			break
		}
		quoted := append(serialize(ip4(ip.SrcIP.String(), ip.DstIP.String(), layers.IPProtocolTCP)), seg.Contents[:8]...)
		binary.BigEndian.PutUint16(quoted[2:], uint16(ip.Length))
		for _, from := range []string{"192.168.50.1", "203.0.113.20", "192.168.50.66"} {
			for _, e := range []struct {
				kind, code uint8
				rest       []byte // of the header: an MTU, a router
			}{{3, 4, []byte{0, 0, 0, 68}}, {3, 4, []byte{0, 0, 0, 0}}, {3, 4, []byte{0, 0, 2, 0}}, {3, 0, nil}, {3, 1, nil}, {3, 2, nil}, {3, 3, nil}, {3, 13, nil}, {4, 0, nil}, {5, 1, []byte{192, 168, 50, 66}}, {11, 0, nil}, {12, 0, nil}} {
				icmp := &layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(e.kind, e.code)}
				if e.rest != nil {
					icmp.Id, icmp.Seq = binary.BigEndian.Uint16(e.rest), binary.BigEndian.Uint16(e.rest[2:])
				}
				send(w.to(false, layers.EthernetTypeIPv4, ip4(from, ip.SrcIP.String(), layers.IPProtocolICMPv4), icmp, gopacket.Payload(quoted)))
			}
		}
	}
	if r := w.laptop.Run("ip", "route", "get", "203.0.113.20"); !strings.Contains(r, "via 192.168.50.1 ") {
		t.Errorf("a redirect was obeyed: %s", r)
	}
	if text, err := w.fetch(page+"?bytes=1000000", 60*time.Second); err != nil || len(text) != 1000000 {
		t.Errorf("%d bytes after it: %v", len(text), err)
	}
}

// forgedResets ends the tunnel's TCP connection again and again.
func forgedResets(t *testing.T, w *world) {
	send, fd := w.wire(w.home)
	n := 0
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); {
		ip, seg := sniff(fd)
		if ip == nil {
			continue
		}
		n++
		back := ip4(ip.DstIP.String(), ip.SrcIP.String(), layers.IPProtocolTCP)
		send(w.to(false, layers.EthernetTypeIPv4, back, tcp(back, layers.TCP{SrcPort: seg.DstPort, DstPort: seg.SrcPort, Seq: seg.Ack, RST: true})))
	}
	if n == 0 {
		t.Error("no segment of the tunnel seen: this proves nothing")
	}
	start := time.Now()
	w.readPage(60 * time.Second)
	t.Logf("%d resets; page %v after the last", n, time.Since(start).Round(time.Millisecond))
}

// poisoned says for four seconds that the router is the stranger, who lets
// nothing pass.
func poisoned(t *testing.T, w *world) {
	send, _ := w.wire(w.home)
	own := w.waitAddress("192.168.50.").Uplink.Address.Addr()
	for end := time.Now().Add(4 * time.Second); time.Now().Before(end); {
		for _, op := range []uint16{1, 2} {
			send(w.to(false, layers.EthernetTypeARP, &layers.ARP{AddrType: layers.LinkTypeEthernet, Protocol: layers.EthernetTypeIPv4, HwAddressSize: 6, ProtAddressSize: 4, Operation: op,
				SourceHwAddress: stranger, SourceProtAddress: []byte{192, 168, 50, 1}, DstHwAddress: w.hardware, DstProtAddress: own.AsSlice()}))
		}
		<-time.After(50 * time.Millisecond)
	}
	start := time.Now()
	w.readPage(90 * time.Second)
	t.Logf("page %v after the last claim", time.Since(start).Round(time.Millisecond))
}

// nat gives a LAN a way to the site behind one address.
func (d *desk) nat(number int) {
	d.connect("192.0.2", number)
	d.router.Run("nft", "add table ip n; add chain ip n p { type nat hook postrouting priority 100; }; add rule ip n p oifname wan0 masquerade")
}

// innerLAN gives the laptop its own inner address, in the gateway's pool.
func innerLAN(t *testing.T, w *world) {
	l := w.lan("inner", "10.80.0", "--dhcp-host="+net.HardwareAddr(w.hardware).String()+",10.80.0.2")
	l.nat(104)
	w.plug(w.home, l.router)
	w.waitAddress("10.80.0.2/")
	w.waitState(30*time.Second, netd.Tunnel, "")
	w.readPage(20 * time.Second)
}

// serversLAN is a LAN with the site's prefix.
func serversLAN(t *testing.T, w *world) {
	l := w.lan("servers", "203.0.113")
	w.plug(w.home, l.router)
	w.waitState(30*time.Second, netd.Dark, netd.ReasonBadLease)
	w.plug(l.router, w.home)
	w.readPage(30 * time.Second)
}

// renumbering is a DHCP server that never lets an address be kept.
func renumbering(w *world) {
	last := byte(60)
	w.dhcpServer(func(m *dhcpv4.DHCPv4) []dhcpv4.Modifier {
		if m.MessageType() == dhcpv4.MessageTypeDiscover {
			last++
		} else if !m.ClientIPAddr.IsUnspecified() {
			return []dhcpv4.Modifier{dhcpv4.WithMessageType(dhcpv4.MessageTypeNak)}
		}
		return []dhcpv4.Modifier{dhcpv4.WithYourIP(net.IPv4(192, 168, 50, last)), dhcpv4.WithLeaseTime(20),
			dhcpv4.WithGeneric(dhcpv4.OptionRenewTimeValue, []byte{0, 0, 0, 2}), dhcpv4.WithGeneric(dhcpv4.OptionRebindingTimeValue, []byte{0, 0, 0, 4})}
	})
}

// intoTwin moves the cable from the office into a LAN that looks like it, while
// the work domain sends to the office's servers: as fast as it goes, and with
// netd stopped in the act, as on a machine that hangs.
func intoTwin(t *testing.T, w *world) {
	w.desk.startBeacon(w.desk.officeCA)
	twin := w.lookalike("twin")
	go serveSecrets(twin.servers.Listen(assetsAddr))
	from := w.home
	for _, stopped := range []time.Duration{0, 300 * time.Millisecond, time.Second} {
		w.plug(from, w.desk.router)
		w.waitState(90*time.Second, netd.Office, "")
		if stopped > 0 {
			w.netd.Process.Signal(syscall.SIGSTOP)
		}
		w.plug(w.desk.router, twin.router)
		if stopped > 0 {
			<-time.After(stopped)
			w.netd.Process.Signal(syscall.SIGCONT)
		}
		from = twin.router
		nstest.Eventually(t, 20*time.Second, func() error {
			s, err := w.status()
			if err == nil && s.State == netd.Office {
				err = fmt.Errorf("still %s", s.Line())
			}
			return err
		})
		if c, err := call(w.work, assetsAddr, 300*time.Millisecond); err == nil {
			c.c.Close()
			t.Error("the work domain reached the twin's server")
		}
	}
	w.plug(from, w.home)
	w.readPage(30 * time.Second)
}

// meddled opens what can be opened, as an administrator's script or an intruder
// in the host domain would, and waits until netd has put all of it right.
func meddled(t *testing.T, w *world) {
	own := w.waitAddress("192.168.50.").Uplink.Address.Addr().String()
	for _, ns := range []*nstest.NS{w.laptop, w.inside} {
		ns.Run("nft", "flush", "ruleset")
		ns.Run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv4.conf.all.accept_redirects=1", "net.ipv4.conf.all.rp_filter=0")
		ns.Run("ip", "rule", "add", "pref", "10", "lookup", "77")
	}
	w.laptop.Run("ip", "route", "add", "default", "via", "192.168.50.1", "dev", "eth0", "onlink")
	w.laptop.Run("ip", "route", "add", "default", "via", "192.168.50.1", "dev", "eth0", "onlink", "table", "77")
	w.laptop.Run("ip", "address", "add", "192.168.50.250/24", "dev", "eth0")
	w.laptop.Run("nft", "add table ip evil; add chain ip evil p { type nat hook postrouting priority 100; }; add rule ip evil p masquerade")
	w.inside.Run("ip", "address", "add", "10.99.0.1/24", "dev", "work0")
	nstest.Eventually(t, 60*time.Second, func() error {
		for _, ns := range []*nstest.NS{w.laptop, w.inside} {
			state := ns.Run("nft", "list", "ruleset") + ns.Run("ip", "rule") + ns.Run("ip", "-o", "-4", "address") + ns.Run("ip", "route")
			for _, bad := range []string{"evil", "lookup 77", "192.168.50.250", "10.99.0.1", "default via"} {
				if strings.Contains(state, bad) {
					return fmt.Errorf("%q is still there", bad)
				}
			}
			if !strings.Contains(state, "policy drop") {
				return fmt.Errorf("no ruleset")
			}
		}
		if f := w.laptop.Run("sysctl", "-n", "net.ipv4.ip_forward"); strings.TrimSpace(f) != "0" {
			return fmt.Errorf("ip_forward is %s", f)
		}
		return nil
	})
	w.readPage(30 * time.Second)
	if s := w.waitAddress("192.168.50."); s.Uplink.Address.Addr().String() != own {
		t.Logf("the lease changed to %s", s.Uplink.Address)
	}
}

// misnamed gives the only card the names that netd gives its own devices.
func misnamed(t *testing.T, w *world) {
	was := "eth0"
	for _, name := range []string{netd.TunnelLink, netd.WorkLink, netd.OfficeLink, "lo0", "..eth", "eth0"} {
		w.laptop.Run("ip", "link", "set", was, "down")
		w.laptop.Run("ip", "link", "set", was, "name", name)
		w.laptop.Run("ip", "link", "set", name, "up")
		was = name
		nstest.Eventually(t, 30*time.Second, func() error {
			s, err := w.status()
			if err == nil && (s.State != netd.Tunnel || s.Uplink.Name != name) {
				err = fmt.Errorf("%s", s.Line())
			}
			return err
		})
	}
	w.readPage(30 * time.Second)
}

// manyFlows makes every packet a flow of its own, which fills what remembers
// flows.
func manyFlows(t *testing.T, w *world) {
	for i := range 100_000 {
		src, dst := 1024+i%60000, 1+i/60000
		ip := ip4("10.80.0.2", "10.1.0.80", layers.IPProtocolUDP)
		l := []gopacket.SerializableLayer{ip, udp(ip, src, dst), gopacket.Payload(secret)}
		if i%2 == 0 {
			ip.Protocol = layers.IPProtocolTCP
			l[1] = tcp(ip, layers.TCP{SrcPort: layers.TCPPort(src), DstPort: layers.TCPPort(dst), SYN: true, Window: 1024})
		}
		if w.inject([][]byte{serialize(l...)}) == nil {
			w.tapped.sent.Add(1)
		}
	}
	// A call from the work domain goes on; the tunnel's own is not harmed.
	w.readPage(60 * time.Second)
	w.waitState(10*time.Second, netd.Tunnel, "")
}
