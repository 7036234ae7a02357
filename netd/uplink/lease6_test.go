package uplink

import (
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv6"
	"github.com/insomniacslk/dhcp/iana"

	"sekisho/netd/uplink/ndp"
)

// answer6 is a sound reply, with what change did to its association and address.
func answer6(change func(m *dhcpv6.Message, ia *dhcpv6.OptIANA, a *dhcpv6.OptIAAddress)) *dhcpv6.Message {
	m := &dhcpv6.Message{MessageType: dhcpv6.MessageTypeReply}
	a := &dhcpv6.OptIAAddress{IPv6Addr: net.ParseIP("2001:db8:50::100"), PreferredLifetime: time.Hour, ValidLifetime: 2 * time.Hour}
	ia := &dhcpv6.OptIANA{IaId: [4]byte(hardware[2:])}
	m.AddOption(dhcpv6.OptClientID(clientID(hardware)))
	m.AddOption(dhcpv6.OptServerID(&dhcpv6.DUIDLL{HWType: iana.HWTypeEthernet, LinkLayerAddr: net.HardwareAddr{2, 0, 0, 0, 0, 1}}))
	m.AddOption(ia)
	ia.Options.Add(a)
	if change != nil {
		change(m, ia, a)
	}
	return m
}

func TestAccept6(t *testing.T) {
	type change = func(m *dhcpv6.Message, ia *dhcpv6.OptIANA, a *dhcpv6.OptIAAddress)
	sound := Lease6{Address: netip.MustParseAddr("2001:db8:50::100"), Renew: time.Hour, Rebind: 96 * time.Minute, Expire: 2 * time.Hour}
	with := func(f func(*Lease6)) Lease6 { l := sound; f(&l); return l }
	status := &dhcpv6.OptStatusCode{StatusCode: iana.StatusNoAddrsAvail}
	address := func(s string) change {
		return func(_ *dhcpv6.Message, _ *dhcpv6.OptIANA, a *dhcpv6.OptIAAddress) { a.IPv6Addr = net.ParseIP(s) }
	}
	for name, c := range map[string]struct {
		change change
		want   Lease6 // zero: refused
	}{
		"sound": {nil, sound},
		"times": {func(_ *dhcpv6.Message, ia *dhcpv6.OptIANA, _ *dhcpv6.OptIAAddress) {
			ia.T1, ia.T2 = time.Minute, 2*time.Minute
		}, with(func(l *Lease6) { l.Renew, l.Rebind = time.Minute, 2*time.Minute })},
		"T1 after T2": {func(_ *dhcpv6.Message, ia *dhcpv6.OptIANA, _ *dhcpv6.OptIAAddress) {
			ia.T1, ia.T2 = time.Hour, time.Minute
		}, sound},
		"T1 of a second": {func(_ *dhcpv6.Message, ia *dhcpv6.OptIANA, _ *dhcpv6.OptIAAddress) {
			ia.T1, ia.T2 = time.Second, 2*time.Second
		}, sound},
		"for ever": {func(_ *dhcpv6.Message, _ *dhcpv6.OptIANA, a *dhcpv6.OptIAAddress) {
			a.ValidLifetime = (1<<32 - 1) * time.Second
		}, with(func(l *Lease6) {
			l.Renew, l.Rebind, l.Expire = 12*time.Hour, 24*time.Hour*4/5, 24*time.Hour
		})},
		"valid for no time": {func(_ *dhcpv6.Message, _ *dhcpv6.OptIANA, a *dhcpv6.OptIAAddress) {
			a.ValidLifetime, a.PreferredLifetime = 0, 0
		}, Lease6{}},
		"valid for 19 s": {func(_ *dhcpv6.Message, _ *dhcpv6.OptIANA, a *dhcpv6.OptIAAddress) {
			a.ValidLifetime, a.PreferredLifetime = 19*time.Second, 9*time.Second
		}, Lease6{}},
		"preferred after valid": {func(_ *dhcpv6.Message, _ *dhcpv6.OptIANA, a *dhcpv6.OptIAAddress) {
			a.PreferredLifetime = 3 * time.Hour
		}, Lease6{}},
		"multicast":           {address("ff02::1"), Lease6{}},
		"link-local":          {address("fe80::1"), Lease6{}},
		"loopback":            {address("::1"), Lease6{}},
		"nothing":             {address("::"), Lease6{}},
		"IPv4":                {address("192.168.50.1"), Lease6{}},
		"NAT64":               {address("64:ff9b::1"), Lease6{}},
		"no address":          {func(_ *dhcpv6.Message, ia *dhcpv6.OptIANA, _ *dhcpv6.OptIAAddress) { ia.Options.Options = nil }, Lease6{}},
		"no association":      {func(m *dhcpv6.Message, _ *dhcpv6.OptIANA, _ *dhcpv6.OptIAAddress) { m.Options.Del(dhcpv6.OptionIANA) }, Lease6{}},
		"another association": {func(_ *dhcpv6.Message, ia *dhcpv6.OptIANA, _ *dhcpv6.OptIAAddress) { ia.IaId[0]++ }, Lease6{}},
		"no client": {func(m *dhcpv6.Message, _ *dhcpv6.OptIANA, _ *dhcpv6.OptIAAddress) {
			m.Options.Del(dhcpv6.OptionClientID)
		}, Lease6{}},
		"another client": {func(m *dhcpv6.Message, _ *dhcpv6.OptIANA, _ *dhcpv6.OptIAAddress) {
			m.UpdateOption(dhcpv6.OptClientID(clientID(net.HardwareAddr{2, 0, 0, 0, 0, 9})))
		}, Lease6{}},
		"no server": {func(m *dhcpv6.Message, _ *dhcpv6.OptIANA, _ *dhcpv6.OptIAAddress) {
			m.Options.Del(dhcpv6.OptionServerID)
		}, Lease6{}},
		"status":                {func(m *dhcpv6.Message, _ *dhcpv6.OptIANA, _ *dhcpv6.OptIAAddress) { m.AddOption(status) }, Lease6{}},
		"status of association": {func(_ *dhcpv6.Message, ia *dhcpv6.OptIANA, _ *dhcpv6.OptIAAddress) { ia.Options.Add(status) }, Lease6{}},
	} {
		// Over the wire, as every answer comes.
		m, err := dhcpv6.MessageFromBytes(answer6(c.change).ToBytes())
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		l, err := Accept6(m, hardware)
		l.Server = nil
		switch {
		case !c.want.Address.IsValid() && !errors.Is(err, errAbsurd):
			t.Errorf("%s: taken as %+v, %v", name, l, err)
		case c.want.Address.IsValid() && (err != nil || l.Address != c.want.Address || l.Renew != c.want.Renew || l.Rebind != c.want.Rebind || l.Expire != c.want.Expire):
			t.Errorf("%s: %+v, %v, want %+v", name, l, err, c.want)
		}
	}
}

func FuzzAccept6(f *testing.F) {
	f.Add(answer6(nil).ToBytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := dhcpv6.MessageFromBytes(b)
		if err != nil {
			return
		}
		l, err := Accept6(m, hardware)
		if err != nil {
			return
		}
		if !reachable(l.Address) || l.Renew <= 0 || l.Renew > l.Rebind || l.Rebind > l.Expire || l.Expire < minLease || l.Expire > maxLease || len(l.Server) == 0 {
			t.Fatalf("%+v", l)
		}
		if _, err := ask(dhcpv6.MessageTypeRenew, hardware, l.Server, l.Address); err != nil {
			t.Fatalf("a server that cannot be named: %v", err)
		}
	})
}

func TestGranted(t *testing.T) {
	r := newSixRig(t)
	r.say(routerA, ndp.Advertisement{Managed: true})
	if !r.managed(r.now) {
		t.Fatal("a managed link is not one")
	}
	r.pass(time.Second)
	r.sent = nil
	r.hear(ndp.Message{Asked: r.local.address}, r.now)
	r.pass(0)
	if len(r.sent) != 1 || r.sent[0][40] != ndp.TypeNeighbourAdvertisement {
		t.Errorf("sent %x: a server cannot answer", r.sent)
	}
	r.granted(grant{lease: lease6{netip.MustParseAddr("2001:db8:a::100"), r.now.Add(time.Minute)}})
	r.pass(time.Second)
	if s := r.want(routerA, "2001:db8:a::100/128"); !s.Expires.Equal(r.now.Add(59 * time.Second)) {
		t.Errorf("%+v", s)
	}
	r.pass(time.Minute)
	r.want("", "")
	// It is somebody else's.
	r.granted(grant{lease: lease6{netip.MustParseAddr("2001:db8:a::101"), r.now.Add(time.Minute)}})
	r.pass(0)
	r.hear(ndp.Message{Claimed: netip.MustParseAddr("2001:db8:a::101")}, r.now)
	r.pass(5 * time.Second)
	r.want("", "")
	// A prefix goes before it.
	r.say(routerA, ndp.Advertisement{Managed: true}, prefix6(netA, time.Hour, time.Hour))
	if r.managed(r.now) {
		t.Error("DHCPv6 is asked where a prefix is")
	}
	r.pass(time.Second)
	r.want(routerA, netA)
}
