//go:build linux

package e2e

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"

	"golang.org/x/sys/unix"

	"sekisho/netd/internal/nstest"
)

// secret marks what the work domain sends. No frame outside the tunnel may hold
// it, but those to an office's networks in that office.
const secret = "secret of the work domain"

// tap is a capture of one LAN.
type tap struct {
	file    string
	fd      int
	stop    chan struct{}
	done    chan error
	end     func() error
	lans    []netip.Prefix // those of the world
	offices []netip.Prefix // what the laptop may reach here directly
}

// tapped are the captures of a world and what its work domain sent.
type tapped struct {
	taps  []*tap
	far   *tap // where LGWAN begins
	sent  atomic.Int64
	quiet bool // the laptop is not expected to say anything
}

// tap captures lan0 in ns, whole frames, from before it is up.
func (w *world) tap(ns *nstest.NS) {
	w.t.Helper()
	w.tapped.taps = append(w.tapped.taps, w.startTap(ns, "lan0", fmt.Sprintf("tap%d.pcap", len(w.tapped.taps))))
}

func (w *world) startTap(ns *nstest.NS, link, file string) *tap {
	w.t.Helper()
	c := &tap{file: w.path(file)}
	if w.desk != nil && ns == w.desk.router {
		c.offices = []netip.Prefix{netip.MustParsePrefix("10.20.0.0/24")}
	}
	if err := ns.Do(func() (err error) { c.fd, err = packetSocket(link); return err }); err != nil {
		w.t.Fatal(err)
	}
	f, err := os.Create(c.file)
	if err != nil {
		w.t.Fatal(err)
	}
	c.stop, c.done = make(chan struct{}), make(chan error, 1)
	go func() { c.done <- errors.Join(c.record(f), f.Close(), unix.Close(c.fd)) }()
	c.end = sync.OnceValue(func() error { close(c.stop); return <-c.done })
	w.t.Cleanup(func() { c.end() })
	return c
}

// packetSocket opens a packet socket (packet(7)) on a link that may be down.
func packetSocket(link string) (int, error) {
	ifi, err := net.InterfaceByName(link)
	if err != nil {
		return -1, err
	}
	all := binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, unix.ETH_P_ALL))
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	return fd, errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 50_000}),
		unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: ifi.Index}))
}

// record writes frames until stop is closed and none is left. Frames that the
// kernel had no room for are an error: nobody judged them.
func (c *tap) record(f *os.File) error {
	w := pcapgo.NewWriterNanos(f)
	if err := w.WriteFileHeader(1<<17, layers.LinkTypeEthernet); err != nil {
		return err
	}
	for buf := make([]byte, 1<<17); ; {
		n, _, err := unix.Recvfrom(c.fd, buf, 0)
		switch {
		case err == unix.EAGAIN || err == unix.EINTR || err == unix.ENETDOWN || err == unix.ENXIO || err == unix.ENODEV:
			select {
			case <-c.stop:
				if s, err := unix.GetsockoptTpacketStats(c.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS); err == nil && s.Drops > 0 {
					return fmt.Errorf("%s: the capture lost %d frames", c.file, s.Drops)
				}
				return nil
			default:
				continue
			}
		case err != nil:
			return err
		}
		if err := w.WritePacket(gopacket.CaptureInfo{Timestamp: time.Now(), CaptureLength: n, Length: n}, buf[:n]); err != nil {
			return err
		}
	}
}

// verdict is what the captures of a scenario hold.
type verdict struct {
	frames, allowed, leaked int
	delivered               int      // of the work domain's packets, through the tunnel
	leaks                   []string // the first few
}

// judge ends the captures and fails the test if one of them holds a frame that
// the laptop must not send. Every frame on the wire is judged, whoever sent it,
// but for those that did not come from the laptop's hardware address.
func (w *world) judge() verdict {
	w.t.Helper()
	var v verdict
	mac := w.hardware
	for _, c := range w.tapped.taps {
		c.lans = w.lans
		if err := c.end(); err != nil {
			w.t.Fatal(err)
		}
		if err := v.read(c, mac, w.allowed()); err != nil {
			w.t.Fatal(err)
		}
	}
	if err := errors.Join(w.tapped.far.end(), v.lgwan(w.tapped.far)); err != nil {
		w.t.Fatal(err)
	}
	if v.allowed < 4 && !w.tapped.quiet {
		w.t.Errorf("the captures hold only %d frames of the laptop", v.allowed)
	}
	if v.leaked > 0 {
		w.t.Errorf("leaked %d frames:\n%s", v.leaked, bytes.Join(slicesOf(v.leaks), []byte("\n")))
	}
	w.t.Logf("work domain sent %d, delivered %d, leaked %d; uplinks: %d frames, %d of the laptop", w.tapped.sent.Load(), v.delivered, v.leaked, v.frames, v.allowed)
	return v
}

func slicesOf(s []string) (out [][]byte) {
	for _, x := range s {
		out = append(out, []byte(x))
	}
	return out
}

// allowed are the endpoints that the host may talk to anywhere.
func (w *world) allowed() []netip.AddrPort {
	var out []netip.AddrPort
	servers := slices.Concat(w.organization.Verifiers, w.organization.Gateways)
	if p := w.organization.Proxy; p.IsValid() { // in their place
		out, servers = []netip.AddrPort{p}, nil
	}
	for _, e := range servers {
		out = append(out, e.Addresses()...)
	}
	if o := w.organization.Office; o != nil {
		for _, b := range o.Beacons {
			out = append(out, b.Address)
		}
	}
	return out
}

func (v *verdict) read(c *tap, laptop []byte, servers []netip.AddrPort) error {
	f, err := os.Open(c.file)
	if err != nil {
		return err
	}
	defer f.Close()
	r, err := pcapgo.NewReader(f)
	if err != nil {
		return err
	}
	for {
		data, info, err := r.ReadPacketData()
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil
		}
		if err != nil {
			return err
		}
		v.frames++
		if len(data) < 14 || !bytes.Equal(data[6:12], laptop) {
			if len(data) >= 14 && bytes.Contains(data, []byte(secret)) && len(c.offices) == 0 {
				v.leak(info, data, "the work domain's content, not from the laptop's address")
			}
			continue
		}
		if why := wrong(data, c, servers); why != "" {
			v.leak(info, data, why)
		} else {
			v.allowed++
		}
	}
}

// lgwan counts what came out of the tunnel. A packet with another source than
// the laptop's inner address is a leak too.
func (v *verdict) lgwan(c *tap) error {
	f, err := os.Open(c.file)
	if err != nil {
		return err
	}
	defer f.Close()
	r, err := pcapgo.NewReader(f)
	if err != nil {
		return err
	}
	inner, six := netip.MustParseAddr("10.80.0.2").As4(), netip.MustParseAddr(inner6).As16()
	for {
		data, info, err := r.ReadPacketData()
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return nil
		case err != nil:
			return err
		case !bytes.Contains(data, []byte(secret)):
		case len(data) > 54 && binary.BigEndian.Uint16(data[12:]) == 0x86dd && [16]byte(data[22:38]) == six:
			v.delivered++
			if d := netip.AddrFrom16([16]byte(data[38:54])); data[20] == 58 && data[54] > 129 || d.IsMulticast() || d.IsLinkLocalUnicast() {
				v.leak(info, data, "a packet for one link reached LGWAN")
			}
		case len(data) > 54 && [16]byte(data[38:54]) == six: // LGWAN's own answer, which quotes it
		case len(data) > 34 && binary.BigEndian.Uint16(data[12:]) == 0x0800 && [4]byte(data[26:30]) == inner:
			v.delivered++
		case len(data) > 34 && [4]byte(data[30:34]) == inner: // LGWAN's own answer, which quotes it
		default:
			v.leak(info, data, "a spoofed source reached LGWAN")
		}
	}
}

func (v *verdict) leak(info gopacket.CaptureInfo, data []byte, why string) {
	v.leaked++
	if len(v.leaks) < 20 {
		p := gopacket.NewPacket(data, layers.LayerTypeEthernet, gopacket.Lazy)
		what := ""
		if n := p.NetworkLayer(); n != nil {
			what = n.NetworkFlow().String()
			if t := p.TransportLayer(); t != nil {
				what += " " + t.TransportFlow().String()
			}
		}
		v.leaks = append(v.leaks, fmt.Sprintf("%s %s, %d bytes: %s", info.Timestamp.Format("15:04:05.000"), what, info.Length, why))
	}
}

// names says why an ARP frame (RFC 826) of the laptop is wrong, empty if it is
// not: it names addresses of LANs only. Those of the LAN before may be among
// them, until netd hears of the change; and a server's as the one looked for:
// for a socket that is bound to a link the kernel takes a destination without a
// route to be on the link (net/ipv4/route.c), as when the link was just renamed.
func (c *tap) names(data []byte, servers []netip.AddrPort) string {
	if len(data) < 42 {
		return "malformed ARP"
	}
	own, looked := netip.AddrFrom4([4]byte(data[28:])), netip.AddrFrom4([4]byte(data[38:]))
	if slices.ContainsFunc(servers, func(s netip.AddrPort) bool { return s.Addr() == looked }) {
		looked = own
	}
	for _, a := range []netip.Addr{own, looked} {
		if !a.IsUnspecified() && !slices.ContainsFunc(c.lans, func(p netip.Prefix) bool { return p.Contains(a) }) {
			return fmt.Sprintf("ARP names %s, which is of no LAN here", a)
		}
	}
	return ""
}

// wrong says why the laptop may not send a frame, empty if it may: ARP, 802.1X,
// DHCP, TCP or UDP to a server's very endpoint without the work domain's
// content, and anything to an office's networks from an address in them.
func wrong(data []byte, c *tap, servers []netip.AddrPort) string {
	if bytes.Contains(data, []byte(secret)) && len(c.offices) == 0 {
		return "the work domain's content in the clear"
	}
	switch kind := layers.EthernetType(binary.BigEndian.Uint16(data[12:])); kind {
	case layers.EthernetTypeARP:
		return c.names(data, servers)
	case layers.EthernetTypeEAPOL:
		return ""
	case layers.EthernetTypeIPv4:
	case layers.EthernetTypeIPv6:
		return wrong6(data, servers)
	default:
		return fmt.Sprintf("ethertype %s", kind)
	}
	p := gopacket.NewPacket(data, layers.LayerTypeEthernet, gopacket.NoCopy)
	ip, ok := p.NetworkLayer().(*layers.IPv4)
	if !ok {
		return "malformed IPv4"
	}
	src, _ := netip.AddrFromSlice(ip.SrcIP.To4())
	dst, _ := netip.AddrFromSlice(ip.DstIP.To4())
	var port uint16
	switch t := p.TransportLayer().(type) {
	case *layers.TCP:
		port = uint16(t.DstPort)
	case *layers.UDP:
		port = uint16(t.DstPort)
		if t.SrcPort == 68 && t.DstPort == 67 && len(t.Payload) >= 240 && t.Payload[0] == 1 {
			return ""
		}
	}
	if slices.Contains(servers, netip.AddrPortFrom(dst, port)) {
		if bytes.Contains(data, []byte(secret)) {
			return "the work domain's content in the clear"
		}
		return ""
	}
	for _, n := range c.offices {
		if n.Contains(src) && n.Contains(dst) {
			return ""
		}
	}
	return "neither ARP nor DHCP nor to a server of the organisation"
}

// wrong6 is wrong for IPv6: neighbour solicitations and advertisements and
// router solicitations without extension headers, DHCPv6 of a client, and TCP or
// UDP to a server's very endpoint, none with the work domain's content.
func wrong6(data []byte, servers []netip.AddrPort) string {
	if bytes.Contains(data, []byte(secret)) {
		return "the work domain's content in the clear"
	}
	if len(data) < 14+40+8 {
		return "malformed IPv6"
	}
	ip, rest := data[14:54], data[54:]
	dst := netip.AddrFrom16([16]byte(ip[24:40]))
	from, to := binary.BigEndian.Uint16(rest), binary.BigEndian.Uint16(rest[2:])
	switch next := layers.IPProtocol(ip[6]); {
	case next == layers.IPProtocolICMPv6 && rest[0] >= 133 && rest[0] <= 136 && rest[0] != 134 && ip[7] == 255:
		return ""
	case next == layers.IPProtocolUDP && from == 546 && to == 547 && dst == netip.MustParseAddr("ff02::1:2"):
		return ""
	case (next == layers.IPProtocolTCP || next == layers.IPProtocolUDP) && slices.Contains(servers, netip.AddrPortFrom(dst, to)):
		return ""
	}
	return "neither neighbour discovery nor DHCPv6 nor to a server of the organisation"
}
