//go:build linux

package e2e

import (
	"encoding/binary"
	"net"
	"sync"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
)

// pester writes what a hostile work domain can send, past its own kernel: every
// combination of sources, destinations and protocols, each with the secret in
// it. It returns a function that stops it.
func (w *world) pester() (stop func()) {
	packets, odd := hostile(), malformed()
	done := make(chan struct{})
	var all sync.WaitGroup
	all.Go(func() {
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for i := 0; ; i++ {
			batch := [][]byte{packets[0]} // an honest one, so that it shows when the way is open
			for k := range 63 {
				batch = append(batch, packets[(i*63+k)%len(packets)])
			}
			if w.inject(batch) == nil {
				w.tapped.sent.Add(int64(len(batch)))
			}
			if w.inject([][]byte{odd[i%len(odd)]}) == nil { // alone: the kernel takes some of these from nobody
				w.tapped.sent.Add(1)
			}
			select {
			case <-done:
				return
			case <-tick.C:
			}
		}
	})
	return sync.OnceFunc(func() { close(done); all.Wait() })
}

// hostile makes the packets.
func hostile() (out [][]byte) {
	sources := []string{"10.80.0.2", "10.80.9.9", "192.168.50.144", "10.20.0.144", "127.0.0.1", "169.254.169.254", "0.0.0.0", "203.0.113.20", "10.1.0.80", "255.255.255.255"}
	destinations := []string{
		"10.1.0.80", "10.80.0.1", "10.80.0.2", "8.8.8.8", "1.1.1.1", "192.168.50.1", "192.168.50.144", "10.20.0.77", "10.20.0.1", "203.0.113.10", "203.0.113.20",
		"169.254.169.254", "127.0.0.1", "255.255.255.255", "192.168.50.255", "224.0.0.1", "224.0.0.251", "224.0.0.252", "239.255.255.250", "240.0.0.1", "0.0.0.0",
	}
	make4 := func(src, dst string, p layers.IPProtocol, l gopacket.SerializableLayer, more func(*layers.IPv4)) {
		ip := &layers.IPv4{Version: 4, TTL: 64, Id: uint16(len(out)), Protocol: p, SrcIP: net.ParseIP(src), DstIP: net.ParseIP(dst)}
		if more != nil {
			more(ip)
		}
		if t, ok := l.(interface {
			SetNetworkLayerForChecksum(gopacket.NetworkLayer) error
		}); ok {
			t.SetNetworkLayerForChecksum(ip)
		}
		out = append(out, serialize(ip, l, gopacket.Payload(secret)))
	}
	make4(sources[0], destinations[0], layers.IPProtocolUDP, &layers.UDP{SrcPort: 40000, DstPort: 80}, nil)
	for _, src := range sources {
		for _, dst := range destinations {
			for _, port := range []layers.UDPPort{53, 67, 80, 443, 1900, 5353, 5355} {
				make4(src, dst, layers.IPProtocolUDP, &layers.UDP{SrcPort: 40000, DstPort: port}, nil)
			}
			make4(src, dst, layers.IPProtocolUDP, &layers.UDP{SrcPort: 68, DstPort: 67}, nil)
			make4(src, dst, layers.IPProtocolUDP, &layers.UDP{SrcPort: 40000, DstPort: 80}, func(ip *layers.IPv4) { ip.Flags = layers.IPv4MoreFragments })
			make4(src, dst, layers.IPProtocolUDP, &layers.UDP{SrcPort: 40000, DstPort: 80}, func(ip *layers.IPv4) { ip.TTL = 1 })
			make4(src, dst, layers.IPProtocolUDP, &layers.UDP{SrcPort: 40000, DstPort: 80}, func(ip *layers.IPv4) { // loose source route, RFC 791
				ip.Options = []layers.IPv4Option{{OptionType: 131, OptionLength: 7, OptionData: []byte{4, 192, 168, 50, 1}}}
			})
			for _, port := range []layers.TCPPort{443, 853, 8443} {
				make4(src, dst, layers.IPProtocolTCP, &layers.TCP{SrcPort: 40000, DstPort: port, SYN: true, Window: 1024}, nil)
				make4(src, dst, layers.IPProtocolTCP, &layers.TCP{SrcPort: 443, DstPort: port, ACK: true, Window: 1024}, nil)
			}
			make4(src, dst, layers.IPProtocolICMPv4, &layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(8, 0)}, nil)
			make4(src, dst, layers.IPProtocolICMPv4, &layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(5, 1)}, nil) // redirect
			for _, p := range []layers.IPProtocol{layers.IPProtocolIGMP, layers.IPProtocolGRE, layers.IPProtocolESP, layers.IPProtocolSCTP, 253} {
				make4(src, dst, p, gopacket.Payload(nil), nil)
			}
		}
	}
	return append(out, hostile6()...)
}

// hostile6 are those of IPv6, with what only a link's neighbours say.
func hostile6() (out [][]byte) {
	sources := []string{inner6, "fd00:80::9999", "fe80::2", "::", "::1", "2001:db8:50::144", "2001:db8:f::20", "fd00:1::80", "::ffff:192.168.50.144", "ff02::1"}
	destinations := []string{
		"fd00:1::80", "fd00:80::1", inner6, "2001:4860:4860::8888", "2001:db8:50::1", "2001:db8:f::10", "2001:db8:f::20", "fe80::1", "::1", "::", "::ffff:10.20.0.77",
		"64:ff9b::a01:50", "2002:cb00:7114::1", "fec0::1", "ff01::1", "ff02::1", "ff02::2", "ff02::c", "ff02::16", "ff02::fb", "ff02::1:2", "ff02::1:ff00:2", "ff05::1:3", "ff0e::1",
	}
	for _, src := range sources {
		for _, dst := range destinations {
			make6 := func(hops uint8, next layers.IPProtocol, l ...gopacket.SerializableLayer) {
				ip := &layers.IPv6{Version: 6, HopLimit: hops, NextHeader: next, SrcIP: net.ParseIP(src).To16(), DstIP: net.ParseIP(dst).To16()}
				for _, l := range l {
					if t, ok := l.(interface {
						SetNetworkLayerForChecksum(gopacket.NetworkLayer) error
					}); ok {
						t.SetNetworkLayerForChecksum(ip)
					}
				}
				out = append(out, serialize(append(append([]gopacket.SerializableLayer{ip}, l...), gopacket.Payload(secret))...))
			}
			for _, port := range []layers.UDPPort{53, 80, 443, 547, 1900, 5353, 5355} {
				make6(64, layers.IPProtocolUDP, &layers.UDP{SrcPort: 40000, DstPort: port})
			}
			make6(1, layers.IPProtocolUDP, &layers.UDP{SrcPort: 40000, DstPort: 80})
			make6(64, layers.IPProtocolTCP, &layers.TCP{SrcPort: 40000, DstPort: 443, SYN: true, Window: 1024})
			for _, icmp := range []uint8{128, 130, 133, 134, 135, 136, 137, 139, 143} {
				make6(255, layers.IPProtocolICMPv6, &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(icmp, 0)})
			}
			routing := gopacket.Payload(append([]byte{17, 2, 0, 1, 0, 0, 0, 0}, net.ParseIP("2001:db8:50::1")...)) // RFC 5095's type 0
			make6(64, layers.IPProtocolIPv6Routing, routing)
			make6(64, layers.IPProtocolIPv6HopByHop, gopacket.Payload{58, 0, 5, 2, 0, 0, 1, 0, 143, 0, 0, 0})
			make6(64, layers.IPProtocolIPv6Fragment, gopacket.Payload{17, 0, 0, 1, 0, 0, 0, 9, 0, 1, 0, 2, 0, 3, 0, 4})
			make6(64, layers.IPProtocolIPv4, gopacket.Payload(serializeIPv4())) // a tunnel of its own
		}
	}
	return out
}

func serializeIPv4() []byte {
	ip := &layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolUDP, SrcIP: net.IPv4(10, 80, 0, 2), DstIP: net.IPv4(8, 8, 8, 8)}
	udp := &layers.UDP{SrcPort: 40000, DstPort: 53}
	udp.SetNetworkLayerForChecksum(ip)
	return serialize(ip, udp)
}

// malformed are packets that no kernel makes: an honest one with wrong lengths,
// versions, checksums and fragments.
func malformed() (out [][]byte) {
	ip := ip4("10.80.0.2", "10.1.0.80", layers.IPProtocolUDP)
	whole := serialize(ip, udp(ip, 40000, 80), gopacket.Payload(secret))
	change := func(f func(p []byte) []byte) { out = append(out, f(append([]byte(nil), whole...))) }
	for _, first := range []byte{0x00, 0x05, 0x35, 0x40, 0x44, 0x4f, 0x55, 0x65, 0xf5} { // version and header length
		change(func(p []byte) []byte { p[0] = first; return p })
	}
	for _, length := range []uint16{0, 1, 19, 20, 27, uint16(len(whole) - 1), uint16(len(whole) + 1), 1400, 65535} {
		change(func(p []byte) []byte { binary.BigEndian.PutUint16(p[2:], length); return p })
		change(func(p []byte) []byte { binary.BigEndian.PutUint16(p[24:], length); return p }) // UDP's
	}
	for _, flags := range []uint16{0x2000, 0x2001, 0x1fff, 0x3fff, 0x4001, 0x8000} {
		change(func(p []byte) []byte { binary.BigEndian.PutUint16(p[6:], flags); return p })
	}
	for n := range 28 { // cut off
		change(func(p []byte) []byte { return p[:n+1] })
	}
	change(func(p []byte) []byte { p[10] ^= 0xff; return p })
	change(func(p []byte) []byte { p[26] ^= 0xff; return p })
	change(func(p []byte) []byte { return append(p, make([]byte, 1400)...) })
	return out
}

func serialize(l ...gopacket.SerializableLayer) []byte {
	buf := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, l...); err != nil {
		panic(err)
	}
	return append([]byte(nil), buf.Bytes()...)
}
