package uplink

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

const (
	// MinMTU is the least link MTU that is believed, in bytes (RFC 2132, section
	// 5.1 allows 68; RFC 791 makes every host take 576).
	MinMTU = 576
	// maxMTU is that of Ethernet, and what is assumed when a server is silent.
	maxMTU = 1500
	// minLease is the shortest lease that is believed.
	minLease = 20 * time.Second
	// maxLease caps a lease; an infinite one is renewed too.
	maxLease = 24 * time.Hour
)

const (
	// captivePortal names a network's sign-in page, or says in these words that
	// there is none (RFC 8910, section 2). Only that there is one is looked at.
	captivePortal = dhcpv4.GenericOptionCode(114)
	unrestricted  = "urn:ietf:params:capport:unrestricted"
)

// errAbsurd is wrapped by Accept's errors.
var errAbsurd = errors.New("absurd lease")

// Lease is what was taken from a DHCP server's answer.
type Lease struct {
	Address netip.Prefix
	Router  netip.Addr // zero if the server named none
	Server  netip.Addr // server identifier
	MTU     int        // bytes, MinMTU to 1500
	SignIn  bool       // the server names a sign-in page: a word for people, not obeyed
	// Renew, Rebind and Expire count from the moment of the answer (T1, T2 and
	// the lease time; RFC 2131, section 4.4.5).
	Renew, Rebind, Expire time.Duration
}

// requested is what the client asks for (option 55, RFC 2132 section 9.8).
func requested() dhcpv4.Modifier {
	return func(m *dhcpv4.DHCPv4) {
		m.UpdateOption(dhcpv4.OptParameterRequestList(
			dhcpv4.OptionSubnetMask, dhcpv4.OptionRouter, dhcpv4.OptionInterfaceMTU, dhcpv4.OptionIPAddressLeaseTime,
			dhcpv4.OptionServerIdentifier, dhcpv4.OptionRenewTimeValue, dhcpv4.OptionRebindingTimeValue, captivePortal))
	}
}

// Accept takes a lease from an offer or acknowledgement. A nil error proves:
// the address is a unicast address that may be a host's in its prefix of /1 to
// /30; the router, if any, is another such address of the same prefix; the
// lease lasts a while; the MTU carries IPv4.
func Accept(m *dhcpv4.DHCPv4) (Lease, error) {
	var l Lease
	bad := func(format string, a ...any) (Lease, error) {
		return Lease{}, fmt.Errorf("%w: %s", errAbsurd, fmt.Sprintf(format, a...))
	}
	address, ok := netip.AddrFromSlice(m.YourIPAddr.To4())
	if !ok || !unicast(address) {
		return bad("address %s", m.YourIPAddr)
	}
	mask := net.IPMask(m.Options.Get(dhcpv4.OptionSubnetMask))
	bits, size := mask.Size()
	if len(mask) != 4 || size != 32 || bits < 1 || bits > 30 {
		return bad("mask %s", mask)
	}
	l.Address = netip.PrefixFrom(address, bits)
	if edge(l.Address) {
		return bad("address %s is its network's own or broadcast address", l.Address)
	}
	if r := m.Options.Get(dhcpv4.OptionRouter); len(r) != 0 {
		if len(r)%4 != 0 {
			return bad("router option of %d bytes", len(r))
		}
		l.Router = netip.AddrFrom4([4]byte(r[:4]))
		if !unicast(l.Router) || l.Router == address || !l.Address.Contains(l.Router) || edge(netip.PrefixFrom(l.Router, bits)) {
			return bad("router %s for address %s", l.Router, l.Address)
		}
	}
	if l.Server, ok = netip.AddrFromSlice(m.Options.Get(dhcpv4.OptionServerIdentifier)); !ok || !unicast(l.Server) {
		return bad("server identifier %s", l.Server)
	}
	lease, ok := seconds(m, dhcpv4.OptionIPAddressLeaseTime)
	if !ok || lease < minLease {
		return bad("lease of %v, want at least %v", lease, minLease)
	}
	l.Expire = min(lease, maxLease)
	l.Renew, l.Rebind = l.Expire/2, l.Expire*7/8
	t1, ok1 := seconds(m, dhcpv4.OptionRenewTimeValue)
	t2, ok2 := seconds(m, dhcpv4.OptionRebindingTimeValue)
	if ok1 && ok2 && minLease/2 <= t1 && t1 < t2 && t2 < l.Expire {
		l.Renew, l.Rebind = t1, t2 // else the defaults of RFC 2131
	}
	page := m.Options.Get(captivePortal)
	l.SignIn = len(page) > 0 && string(page) != unrestricted
	l.MTU = maxMTU
	if v := m.Options.Get(dhcpv4.OptionInterfaceMTU); len(v) != 0 {
		if len(v) != 2 || binary.BigEndian.Uint16(v) < MinMTU {
			return bad("mtu %x, want at least %d", v, MinMTU)
		}
		l.MTU = min(int(binary.BigEndian.Uint16(v)), maxMTU)
	}
	return l, nil
}

func seconds(m *dhcpv4.DHCPv4, code dhcpv4.OptionCode) (time.Duration, bool) {
	v := m.Options.Get(code)
	if len(v) != 4 {
		return 0, false
	}
	return time.Duration(binary.BigEndian.Uint32(v)) * time.Second, true
}

// unicast reports whether a may be a host's address: not 0/8, loopback,
// link-local, multicast, reserved or broadcast (RFC 6890).
func unicast(a netip.Addr) bool {
	if !a.Is4() || a.IsLoopback() || a.IsMulticast() || a.IsLinkLocalUnicast() {
		return false
	}
	first := a.As4()[0]
	return first != 0 && first < 240
}

// edge reports whether p's address is the first or last of its network.
func edge(p netip.Prefix) bool {
	next := p.Addr().Next()
	return p.Addr() == p.Masked().Addr() || !p.Contains(next)
}
