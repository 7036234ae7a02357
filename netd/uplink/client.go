//go:build linux

package uplink

import (
	"context"
	crand "crypto/rand"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"

	"sekisho/netd"
)

const (
	firstWait = time.Second // for an answer; nclient4 doubles it for each of tries
	tries     = 4
	maxPause  = 30 * time.Second // between attempts to get a lease
	minRetry  = 5 * time.Second  // between attempts to renew one
)

// New returns a Manager. Run it once.
func New(c Config) *Manager {
	m := &Manager{Config: c, lease: client{}.keep, now: time.Now, events: make(chan func()), known: map[string]*record{}}
	if c.IPv6 {
		six := client6{}
		crand.Read(six.secret[:])
		m.lease6 = six.keep
	}
	return m
}

// client is the DHCPv4 client. Its packet socket is open only during an
// exchange: it sees a copy of every packet of the link.
type client struct{}

var errNak = errors.New("server withdrew the lease")

// keep gets a lease on l, renews it, and starts over when it is lost.
func (c client) keep(ctx context.Context, l Link, previous netip.Addr, report func(netd.Uplink)) {
	pause := time.Second
	report(netd.Uplink{Name: l.Name, Carrier: true, Reason: netd.ReasonNoLease, Detail: "asking for an address on " + l.Name})
	for ctx.Err() == nil {
		ack, lease, err := c.obtain(ctx, l, previous)
		switch {
		case ctx.Err() != nil:
			return
		case errors.Is(err, errAbsurd):
			report(netd.Uplink{Name: l.Name, Carrier: true, Reason: netd.ReasonBadLease, Detail: fmt.Sprintf("DHCP on %s: %v", l.Name, err)})
		case err != nil:
			report(netd.Uplink{Name: l.Name, Carrier: true, Reason: netd.ReasonNoLease, Detail: "no DHCP server answers on " + l.Name})
		default:
			pause = time.Second
			previous = lease.Address.Addr()
			c.hold(ctx, l, ack, lease, report)
			if ctx.Err() != nil {
				return
			}
			report(netd.Uplink{Name: l.Name, Carrier: true, Reason: netd.ReasonNoLease, Detail: "lease lost on " + l.Name})
			continue
		}
		wait(ctx, pause/2+rand.N(pause/2))
		pause = min(2*pause, maxPause)
	}
}

// hold reports the lease and keeps renewing it. It returns when the lease is lost.
func (c client) hold(ctx context.Context, l Link, ack *dhcpv4.DHCPv4, lease Lease, report func(netd.Uplink)) {
	for {
		start := time.Now()
		expires := start.Add(lease.Expire)
		report(netd.Uplink{Name: l.Name, Carrier: true, Address: lease.Address, Router: lease.Router, MTU: lease.MTU, SignIn: lease.SignIn, Expires: expires.Round(0)})
		next := lease.Renew
		for {
			wait(ctx, time.Until(start.Add(next)))
			left := time.Until(expires)
			// The wall clock sees a lease end while the machine was suspended.
			if ctx.Err() != nil || left <= 0 || time.Now().Round(0).After(expires.Round(0)) {
				return
			}
			renewing := time.Since(start) < lease.Rebind
			answer, renewed, err := c.renew(ctx, l, ack, lease, renewing)
			if errors.Is(err, errNak) {
				return
			}
			if err == nil && renewed.Address == lease.Address {
				ack, lease = answer, renewed
				break
			}
			next = time.Since(start) + max(minRetry, time.Until(expires)/2)
			if renewing {
				next = max(min(next, lease.Rebind), time.Since(start)+minRetry)
			}
			next = min(next, lease.Expire)
		}
	}
}

// open opens the packet socket of l.
func open(l Link) (*nclient4.Client, error) {
	return nclient4.New(l.Name, nclient4.WithHWAddr(l.Hardware), nclient4.WithTimeout(firstWait), nclient4.WithRetry(tries))
}

// obtain asks for a new lease. Offers that make no sense are passed over as
// long as others may come.
func (c client) obtain(ctx context.Context, l Link, previous netip.Addr) (*dhcpv4.DHCPv4, Lease, error) {
	conn, err := open(l)
	if err != nil {
		return nil, Lease{}, err
	}
	defer conn.Close()
	modifiers := []dhcpv4.Modifier{requested()}
	if previous.IsValid() {
		modifiers = append(modifiers, dhcpv4.WithOption(dhcpv4.OptRequestedIPAddress(previous.AsSlice())))
	}
	discover, err := dhcpv4.NewDiscovery(l.Hardware, modifiers...)
	if err != nil {
		return nil, Lease{}, err
	}
	var absurd error
	offer, err := conn.SendAndRead(ctx, nclient4.DefaultServers, discover, func(m *dhcpv4.DHCPv4) bool {
		if m.MessageType() != dhcpv4.MessageTypeOffer {
			return false
		}
		if _, err := Accept(m); err != nil {
			absurd = err
			return false
		}
		return true
	})
	if err != nil {
		return nil, Lease{}, errors.Join(absurd, err)
	}
	request, err := dhcpv4.NewRequestFromOffer(offer, requested())
	if err != nil {
		return nil, Lease{}, err
	}
	return exchange(ctx, conn, request, func(m *dhcpv4.DHCPv4) bool {
		return m.ServerIdentifier().Equal(offer.ServerIdentifier())
	})
}

// renew asks to prolong the lease: its server while renewing, any after that.
// The request is broadcast in both cases: a server's reply is the same, and
// the host needs no route to the server.
func (c client) renew(ctx context.Context, l Link, ack *dhcpv4.DHCPv4, lease Lease, renewing bool) (*dhcpv4.DHCPv4, Lease, error) {
	conn, err := open(l)
	if err != nil {
		return nil, Lease{}, err
	}
	defer conn.Close()
	request, err := dhcpv4.NewRenewFromAck(ack, requested())
	if err != nil {
		return nil, Lease{}, err
	}
	return exchange(ctx, conn, request, func(m *dhcpv4.DHCPv4) bool {
		return !renewing || m.ServerIdentifier().Equal(lease.Server.AsSlice())
	})
}

// exchange sends a request and returns the acknowledgement that from lets by.
func exchange(ctx context.Context, conn *nclient4.Client, request *dhcpv4.DHCPv4, from func(*dhcpv4.DHCPv4) bool) (*dhcpv4.DHCPv4, Lease, error) {
	answer, err := conn.SendAndRead(ctx, nclient4.DefaultServers, request, func(m *dhcpv4.DHCPv4) bool {
		return nclient4.IsMessageType(dhcpv4.MessageTypeAck, dhcpv4.MessageTypeNak)(m) && from(m)
	})
	if err != nil {
		return nil, Lease{}, err
	}
	if answer.MessageType() == dhcpv4.MessageTypeNak {
		return nil, Lease{}, errNak
	}
	lease, err := Accept(answer)
	return answer, lease, err
}

// wait returns after d, or when ctx is done.
func wait(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
