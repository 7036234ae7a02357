package uplink

import (
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

// answer is a sound acknowledgement, changed by modify.
func answer(modify ...dhcpv4.Modifier) *dhcpv4.DHCPv4 {
	m, err := dhcpv4.New(append([]dhcpv4.Modifier{
		dhcpv4.WithMessageType(dhcpv4.MessageTypeAck),
		dhcpv4.WithYourIP(net.IPv4(192, 168, 50, 23)),
		dhcpv4.WithNetmask(net.CIDRMask(24, 32)),
		dhcpv4.WithOption(dhcpv4.OptRouter(net.IPv4(192, 168, 50, 1))),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.IPv4(192, 168, 50, 1))),
		dhcpv4.WithLeaseTime(3600),
	}, modify...)...)
	if err != nil {
		panic(err)
	}
	return m
}

func TestAccept(t *testing.T) {
	option := dhcpv4.WithGeneric
	sound := Lease{
		Address: netip.MustParsePrefix("192.168.50.23/24"), Router: netip.MustParseAddr("192.168.50.1"), Server: netip.MustParseAddr("192.168.50.1"),
		MTU: 1500, Renew: 30 * time.Minute, Rebind: 3150 * time.Second, Expire: time.Hour,
	}
	with := func(f func(*Lease)) Lease { l := sound; f(&l); return l }
	for name, c := range map[string]struct {
		m    *dhcpv4.DHCPv4
		want Lease // zero: refused
	}{
		"sound":           {answer(), sound},
		"no router":       {answer(dhcpv4.WithoutOption(dhcpv4.OptionRouter)), with(func(l *Lease) { l.Router = netip.Addr{} })},
		"mtu 576":         {answer(option(dhcpv4.OptionInterfaceMTU, []byte{2, 64})), with(func(l *Lease) { l.MTU = 576 })},
		"mtu 9000":        {answer(option(dhcpv4.OptionInterfaceMTU, []byte{0x23, 0x28})), sound},
		"own times":       {answer(option(dhcpv4.OptionRenewTimeValue, []byte{0, 0, 0, 60}), option(dhcpv4.OptionRebindingTimeValue, []byte{0, 0, 0, 120})), with(func(l *Lease) { l.Renew, l.Rebind = time.Minute, 2*time.Minute })},
		"T1 after T2":     {answer(option(dhcpv4.OptionRenewTimeValue, []byte{0, 0, 1, 60}), option(dhcpv4.OptionRebindingTimeValue, []byte{0, 0, 0, 120})), sound},
		"infinite":        {answer(dhcpv4.WithLeaseTime(0xffffffff)), with(func(l *Lease) { l.Expire, l.Renew, l.Rebind = 24*time.Hour, 12*time.Hour, 21*time.Hour })},
		"option 121":      {answer(option(dhcpv4.OptionClasslessStaticRoute, []byte{1, 0, 192, 168, 50, 1})), sound},
		"sign-in page":    {answer(option(captivePortal, []byte("https://portal/"))), with(func(l *Lease) { l.SignIn = true })},
		"no sign-in page": {answer(option(captivePortal, []byte(unrestricted))), sound},
		"zero lease":      {m: answer(dhcpv4.WithLeaseTime(0))},
		"no lease":        {m: answer(dhcpv4.WithoutOption(dhcpv4.OptionIPAddressLeaseTime))},
		"short lease":     {m: answer(dhcpv4.WithLeaseTime(5))},
		"router outside":  {m: answer(dhcpv4.WithOption(dhcpv4.OptRouter(net.IPv4(10, 0, 0, 1))))},
		"router is us":    {m: answer(dhcpv4.WithOption(dhcpv4.OptRouter(net.IPv4(192, 168, 50, 23))))},
		"router is bcast": {m: answer(dhcpv4.WithOption(dhcpv4.OptRouter(net.IPv4(192, 168, 50, 255))))},
		"router 7 bytes":  {m: answer(option(dhcpv4.OptionRouter, []byte{192, 168, 50, 1, 192, 168, 50}))},
		"mask /0":         {m: answer(dhcpv4.WithNetmask(net.CIDRMask(0, 32)))},
		"mask /31":        {m: answer(dhcpv4.WithNetmask(net.CIDRMask(31, 32)))},
		"mask /32":        {m: answer(dhcpv4.WithNetmask(net.CIDRMask(32, 32)))},
		"mask with holes": {m: answer(dhcpv4.WithNetmask(net.IPv4Mask(255, 0, 255, 0)))},
		"no mask":         {m: answer(dhcpv4.WithoutOption(dhcpv4.OptionSubnetMask))},
		"mtu 68":          {m: answer(option(dhcpv4.OptionInterfaceMTU, []byte{0, 68}))},
		"mtu 1 byte":      {m: answer(option(dhcpv4.OptionInterfaceMTU, []byte{5}))},
		"network address": {m: answer(dhcpv4.WithYourIP(net.IPv4(192, 168, 50, 0)))},
		"broadcast":       {m: answer(dhcpv4.WithYourIP(net.IPv4(192, 168, 50, 255)))},
		"loopback":        {m: answer(dhcpv4.WithYourIP(net.IPv4(127, 0, 0, 5)))},
		"multicast":       {m: answer(dhcpv4.WithYourIP(net.IPv4(224, 0, 0, 5)))},
		"zero address":    {m: answer(dhcpv4.WithYourIP(net.IPv4zero))},
		"all ones":        {m: answer(dhcpv4.WithYourIP(net.IPv4bcast))},
		"link-local":      {m: answer(dhcpv4.WithYourIP(net.IPv4(169, 254, 1, 1)))},
		"no server":       {m: answer(dhcpv4.WithoutOption(dhcpv4.OptionServerIdentifier))},
	} {
		got, err := Accept(c.m)
		if got != c.want {
			t.Errorf("%s: %+v, want %+v (%v)", name, got, c.want, err)
		}
		if (err != nil) != (c.want == Lease{}) || err != nil && !errors.Is(err, errAbsurd) {
			t.Errorf("%s: error %v", name, err)
		}
	}
}

func FuzzAccept(f *testing.F) {
	f.Add(answer().ToBytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 1500 {
			return
		}
		m, err := dhcpv4.FromBytes(b)
		if err != nil {
			return
		}
		l, err := Accept(m)
		if err != nil {
			return
		}
		a := l.Address
		if a.Bits() < 1 || a.Bits() > 30 || edge(a) || !unicast(a.Addr()) || l.MTU < MinMTU || l.MTU > maxMTU || l.Renew >= l.Rebind || l.Rebind >= l.Expire {
			t.Errorf("accepted %+v", l)
		}
		if l.Router.IsValid() && (!a.Contains(l.Router) || l.Router == a.Addr()) {
			t.Errorf("accepted router %s for %s", l.Router, a)
		}
	})
}
