package uplink

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv6"
	"github.com/insomniacslk/dhcp/iana"
)

// Lease6 is what was taken from a DHCPv6 server's answer: an address, and
// nothing of what else it says.
type Lease6 struct {
	Address netip.Addr
	Server  []byte // its identifier, as it stands in the option
	// Renew, Rebind and Expire count from the moment of the answer (T1, T2 and the
	// valid lifetime; RFC 8415, section 21.4).
	Renew, Rebind, Expire time.Duration
}

// Accept6 takes a lease from an advertisement or a reply to the client with that
// hardware address. A nil error proves: it is for this client, from a server that
// names itself, without an error's status; the address is a unicast address
// beyond the link; the lease lasts a while.
func Accept6(m *dhcpv6.Message, hardware net.HardwareAddr) (Lease6, error) {
	bad := func(format string, a ...any) (Lease6, error) {
		return Lease6{}, fmt.Errorf("%w: %s", errAbsurd, fmt.Sprintf(format, a...))
	}
	client, server := m.Options.ClientID(), m.Options.ServerID()
	if client == nil || !client.Equal(clientID(hardware)) {
		return bad("for somebody else")
	}
	if server == nil {
		return bad("from a server without a name")
	}
	if s := m.Options.Status(); s != nil && s.StatusCode != iana.StatusSuccess {
		return bad("status %s", s.StatusCode)
	}
	ia := m.Options.OneIANA()
	if ia == nil || !bytes.Equal(ia.IaId[:], identity(hardware)) {
		return bad("no address")
	}
	if s := ia.Options.Status(); s != nil && s.StatusCode != iana.StatusSuccess {
		return bad("status %s", s.StatusCode)
	}
	given := ia.Options.OneAddress()
	if given == nil {
		return bad("no address")
	}
	if s := given.Options.Status(); s != nil && s.StatusCode != iana.StatusSuccess {
		return bad("status %s", s.StatusCode)
	}
	a, ok := netip.AddrFromSlice(given.IPv6Addr.To16())
	if !ok || !reachable(a) {
		return bad("address %s", given.IPv6Addr)
	}
	if given.ValidLifetime < minLease || given.PreferredLifetime > given.ValidLifetime || given.PreferredLifetime <= 0 {
		return bad("address valid for %v and preferred for %v, want at least %v", given.ValidLifetime, given.PreferredLifetime, minLease)
	}
	l := Lease6{Address: a, Server: server.ToBytes(), Expire: min(given.ValidLifetime, maxLease)}
	l.Renew, l.Rebind = l.Expire/2, l.Expire*4/5
	if minLease/2 <= ia.T1 && ia.T1 < ia.T2 && ia.T2 < l.Expire {
		l.Renew, l.Rebind = ia.T1, ia.T2 // else RFC 8415's, of what is valid
	}
	return l, nil
}

// reachable reports whether a is a unicast address that goes beyond one link:
// a global one, or a local one of an organisation (RFC 4291, section 2.4, and
// RFC 4193).
func reachable(a netip.Addr) bool {
	return netip.MustParsePrefix("2000::/3").Contains(a) || netip.MustParsePrefix("fc00::/7").Contains(a)
}

// clientID names the client by its hardware address, which the link knows
// anyway, and by nothing that lasts longer (RFC 7844, section 4.3).
func clientID(hardware net.HardwareAddr) dhcpv6.DUID {
	return &dhcpv6.DUIDLL{HWType: iana.HWTypeEthernet, LinkLayerAddr: hardware}
}

// identity is that of the client's one association (RFC 8415, section 4.2).
func identity(hardware net.HardwareAddr) []byte { return hardware[len(hardware)-4:] }

// ask makes a message to servers: to the one that a lease came from, if server
// is set, about the address that it has, if that is valid. It asks for nothing
// but an address.
func ask(kind dhcpv6.MessageType, hardware net.HardwareAddr, server []byte, address netip.Addr) (*dhcpv6.Message, error) {
	m, err := dhcpv6.NewMessage()
	if err != nil {
		return nil, err
	}
	m.MessageType = kind
	m.AddOption(dhcpv6.OptClientID(clientID(hardware)))
	if server != nil {
		duid, err := dhcpv6.DUIDFromBytes(server)
		if err != nil {
			return nil, fmt.Errorf("server identifier: %w", err)
		}
		m.AddOption(dhcpv6.OptServerID(duid))
	}
	m.AddOption(dhcpv6.OptElapsedTime(0))
	m.AddOption(dhcpv6.OptRequestedOption(dhcpv6.OptionSolMaxRT)) // has to be asked for (RFC 8415, section 21.24); not used
	ia := &dhcpv6.OptIANA{IaId: [4]byte(identity(hardware))}
	if address.IsValid() {
		ia.Options.Add(&dhcpv6.OptIAAddress{IPv6Addr: address.AsSlice()})
	}
	m.AddOption(ia)
	return m, nil
}
