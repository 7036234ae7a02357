package attest

import (
	"context"
	"errors"
	"net/netip"
	"time"
)

// Endpoint is a server that a laptop may talk to outside the tunnel.
type Endpoint struct {
	Address    netip.AddrPort `json:"address"`           // IP address and TCP port; never a host name
	Address6   netip.AddrPort `json:"address6,omitzero"` // the same server over IPv6, if Address is an IPv4 one
	ServerName string         `json:"server_name"`       // name in the server's certificate
}

// Addresses are the server's, IPv6 first (RFC 6724, section 2.1).
func (e Endpoint) Addresses() []netip.AddrPort {
	if e.Address6.IsValid() {
		return []netip.AddrPort{e.Address6, e.Address}
	}
	return []netip.AddrPort{e.Address}
}

// unicast reports whether e is at addresses that one host may have.
func (e Endpoint) unicast() bool {
	for _, at := range e.Addresses() {
		a := at.Addr()
		if !at.IsValid() || at.Port() == 0 || a.IsLoopback() || a.IsMulticast() || a.IsUnspecified() || a.IsLinkLocalUnicast() || a.Is4In6() || a.Zone() != "" {
			return false
		}
	}
	return !e.Address6.IsValid() || e.Address.Addr().Is4() && e.Address6.Addr().Is6()
}

// attemptDelay is what an address has before the next is tried beside it (RFC
// 8305, section 5, "Connection Attempt Delay").
const attemptDelay = 250 * time.Millisecond

// First opens one of a server's addresses: in order, each attemptDelay after the
// one before or as soon as that has failed. The first that succeeds counts; the
// others are cancelled, and discarded if they succeed all the same. It returns
// when all have ended, with every error if none succeeded.
func First[T any](ctx context.Context, addresses []netip.AddrPort, open func(context.Context, netip.AddrPort) (T, error), discard func(T)) (T, error) {
	if len(addresses) == 1 {
		return open(ctx, addresses[0])
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		t   T
		err error
	}
	results := make(chan result)
	next, running := 0, 0
	start := func() {
		if next < len(addresses) {
			a := addresses[next]
			next, running = next+1, running+1
			go func() { t, err := open(ctx, a); results <- result{t, err} }()
		}
	}
	start()
	late := time.NewTicker(attemptDelay)
	defer late.Stop()
	var won *T
	errs := []error{}
	for running > 0 {
		select {
		case <-late.C:
			if won == nil {
				start()
			}
		case r := <-results:
			running--
			switch {
			case r.err == nil && won == nil:
				won = &r.t
				cancel()
			case r.err == nil:
				discard(r.t)
			default:
				errs = append(errs, r.err)
				if won == nil && ctx.Err() == nil {
					start()
				}
			}
		}
	}
	if won != nil {
		return *won, nil
	}
	var none T
	if len(errs) == 0 {
		return none, errors.New("no address to connect to")
	}
	return none, errors.Join(errs...)
}
