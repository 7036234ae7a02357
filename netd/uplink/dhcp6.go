//go:build linux

package uplink

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv6"
	"github.com/insomniacslk/dhcp/dhcpv6/nclient6"
	"github.com/mdlayher/packet"
	"golang.org/x/net/bpf"

	"sekisho/netd/uplink/ndp"
)

// The ports of client and server, and where servers and relays are (RFC 8415,
// section 7).
const clientPort, serverPort = 546, 547

var servers6 = netip.MustParseAddr("ff02::1:2")

// dhcp gets an address for l from a server, from the link-local address local,
// and prolongs it until ctx is done.
func (c client6) dhcp(ctx context.Context, l Link, local netip.Addr, report func(grant)) {
	for pause := time.Second; ctx.Err() == nil; pause = min(2*pause, maxPause) {
		lease, err := c.obtain(ctx, l, local)
		switch {
		case ctx.Err() != nil:
			return
		case errors.Is(err, errAbsurd):
			report(grant{why: fmt.Sprintf("DHCPv6 on %s: %v", l.Name, err)})
		case err != nil:
			report(grant{why: "no DHCPv6 server answers on " + l.Name})
		default:
			pause = time.Second
			c.hold(ctx, l, local, lease, report)
		}
		wait(ctx, pause/2+rand.N(pause/2))
	}
}

// hold reports the lease and prolongs it: by its server until T2, by any after
// that. It returns when the lease is lost.
func (c client6) hold(ctx context.Context, l Link, local netip.Addr, lease Lease6, report func(grant)) {
	for {
		start := time.Now()
		expires := start.Add(lease.Expire)
		report(grant{lease: lease6{lease.Address, expires}})
		next := lease.Renew
		for {
			wait(ctx, time.Until(start.Add(next)))
			if ctx.Err() != nil || past(expires, time.Now()) {
				return
			}
			kind, server := dhcpv6.MessageTypeRenew, lease.Server
			if time.Since(start) >= lease.Rebind {
				kind, server = dhcpv6.MessageTypeRebind, nil
			}
			renewed, err := c.exchange(ctx, l, local, kind, server, lease.Address, dhcpv6.MessageTypeReply)
			if err == nil && renewed.Address == lease.Address {
				lease = renewed
				break
			}
			next = min(time.Since(start)+max(minRetry, time.Until(expires)/4), lease.Expire)
		}
	}
}

// obtain asks for an address: offers that make no sense are passed over as long
// as others may come.
func (c client6) obtain(ctx context.Context, l Link, local netip.Addr) (Lease6, error) {
	offer, err := c.exchange(ctx, l, local, dhcpv6.MessageTypeSolicit, nil, netip.Addr{}, dhcpv6.MessageTypeAdvertise)
	if err != nil {
		return Lease6{}, err
	}
	return c.exchange(ctx, l, local, dhcpv6.MessageTypeRequest, offer.Server, offer.Address, dhcpv6.MessageTypeReply)
}

// exchange sends one message and returns the first sound answer. The packet
// socket is open only meanwhile.
func (c client6) exchange(ctx context.Context, l Link, local netip.Addr, kind dhcpv6.MessageType, server []byte, address netip.Addr, answer dhcpv6.MessageType) (Lease6, error) {
	raw, err := listen6(l, dhcpFilter)
	if err != nil {
		return Lease6{}, err
	}
	conn, err := nclient6.NewWithConn(&udp6{raw, local}, l.Hardware, nclient6.WithTimeout(firstWait), nclient6.WithRetry(tries))
	if err != nil {
		raw.Close()
		return Lease6{}, err
	}
	defer conn.Close()
	m, err := ask(kind, l.Hardware, server, address)
	if err != nil {
		return Lease6{}, err
	}
	var lease Lease6
	var absurd error
	_, err = conn.SendAndRead(ctx, nclient6.AllDHCPRelayAgentsAndServers, m, func(m *dhcpv6.Message) bool {
		if m.MessageType != answer {
			return false
		}
		taken, err := Accept6(m, l.Hardware)
		switch {
		case err != nil:
			absurd = err
		case server != nil && !slices.Equal(taken.Server, server):
		default:
			lease = taken
			return true
		}
		return false
	})
	if err != nil {
		return Lease6{}, errors.Join(absurd, err)
	}
	return lease, nil
}

// udp6 is a net.PacketConn for a DHCPv6 client on a link without an address in
// the kernel: datagrams of the client's port, from and to the link-local address
// self.
type udp6 struct {
	*packet.Conn
	self netip.Addr
}

// WriteTo sends to the servers of the link, whatever the address says.
func (u *udp6) WriteTo(b []byte, _ net.Addr) (int, error) {
	body := binary.BigEndian.AppendUint16(nil, clientPort)
	body = binary.BigEndian.AppendUint16(body, serverPort)
	body = binary.BigEndian.AppendUint16(body, uint16(8+len(b)))
	body = append(append(body, 0, 0), b...)
	_, err := u.Conn.WriteTo(ndp.Packet(u.self, servers6, 1, 17, body), &packet.Addr{HardwareAddr: ndp.Hardware(servers6)})
	return len(b), err
}

// ReadFrom returns the next datagram to the client: whole, from a link-local
// address. Its checksum is not looked at: between virtual machines nobody makes
// it (packet(7), TP_STATUS_CSUMNOTREADY).
func (u *udp6) ReadFrom(b []byte) (int, net.Addr, error) {
	buf := make([]byte, 2048)
	for {
		n, from, err := u.Conn.ReadFrom(buf)
		if err != nil {
			return 0, nil, err
		}
		if payload := datagram(buf[:n], u.self); payload != nil {
			return copy(b, payload), from, nil
		}
	}
}

// datagram returns the payload of a packet to the client at self, nil if it is
// none.
func datagram(p []byte, self netip.Addr) []byte {
	const header, udp = 40, 8
	if len(p) < header+udp || p[0]>>4 != 6 || p[6] != 17 {
		return nil
	}
	size := int(binary.BigEndian.Uint16(p[4:]))
	from, to := netip.AddrFrom16([16]byte(p[8:24])), netip.AddrFrom16([16]byte(p[24:40]))
	if size < udp || header+size > len(p) || to != self || !from.IsLinkLocalUnicast() {
		return nil
	}
	b := p[header : header+size]
	if binary.BigEndian.Uint16(b) != serverPort || binary.BigEndian.Uint16(b[2:]) != clientPort || int(binary.BigEndian.Uint16(b[4:])) != size {
		return nil
	}
	return b[udp:]
}

// dhcpFilter lets pass UDP to the client's port (offsets in the IPv6 header, RFC
// 8200, section 3, and behind it).
var dhcpFilter = []bpf.Instruction{
	bpf.LoadAbsolute{Off: 6, Size: 1}, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: 17, SkipTrue: 3},
	bpf.LoadAbsolute{Off: 42, Size: 2}, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: clientPort, SkipTrue: 1},
	bpf.RetConstant{Val: 2048},
	bpf.RetConstant{Val: 0},
}
