package uplink

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"syscall"
	"time"

	"sekisho/attest"
	"sekisho/netd"
)

const (
	probeTimeout = 2 * time.Second
	probeEvery   = 5 * time.Minute // an uplink that is good; a gateway has many laptops
	firstPause   = time.Second     // after a failed probe; doubled up to maxPause
	deadAfter    = 3               // probes in a row
	// localPause follows a probe that never left the laptop: the rules for a
	// new lease are not in force yet. After maxLocal of them it is a failure
	// like any other: the lease leads nowhere, as one without a router.
	localPause, maxLocal = 100 * time.Millisecond, 30
)

// watch probes again and again, at once when in doubt, until ctx is done.
func watch(ctx context.Context, probe func(context.Context) (int, error), doubt <-chan struct{}, set func(health string, pathMTU int)) {
	for failed, unsent, pause := 0, 0, firstPause; ; {
		mtu, err := func() (int, error) {
			ctx, cancel := context.WithTimeout(ctx, probeTimeout)
			defer cancel()
			return probe(ctx)
		}()
		next := pause
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			set(netd.HealthGood, mtu)
			failed, unsent, pause, next = 0, 0, firstPause, probeEvery/2+rand.N(probeEvery)
		case local(err) && unsent < maxLocal:
			unsent++
			next = localPause
		default:
			if failed++; failed >= deadAfter {
				set(netd.HealthDead, 0)
			}
			pause = min(2*pause, maxPause)
		}
		timer := time.NewTimer(next)
		select {
		case <-ctx.Done():
		case <-doubt:
			failed, pause = deadAfter, firstPause // one more failure confirms it
		case <-timer.C:
		}
		timer.Stop()
	}
}

// local reports whether err says that no packet was sent.
func local(err error) bool {
	return errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.ENETUNREACH) || errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, syscall.ENODEV)
}

// dialer connects over one uplink alone, by the HTTP proxy if that is valid.
// mtu, unless 0, is that of the packets that it sends and takes.
type dialer = func(ctx context.Context, u netd.Uplink, mtu int, to, proxy netip.AddrPort) (net.Conn, error)

const (
	// stalled is how long a handshake may take before shorter packets are tried
	// beside it. Both ends' first flights are longer than any Ethernet packet,
	// for the sake of ML-KEM, so one that goes through has shown the path's width.
	stalled = 500 * time.Millisecond
	// grace is how long longer packets have when shorter ones came through.
	grace = 250 * time.Millisecond
)

// widths are the MTUs tried on a path that swallows Ethernet's 1500: of tunnels
// and mobile networks, of IPv6 (RFC 8200, section 5), and the least that the
// tunnel is of any use on. 0 is the uplink's own.
func widths() []int { return []int{0, 1400, 1280, 1000} }

// width calls reach with each of widths, the shorter ones only when the first
// is stalled, and returns the widest that succeeds.
func width(ctx context.Context, reach func(ctx context.Context, mtu int) error) (int, error) {
	ctx, cancel := context.WithCancel(ctx)
	list := widths()
	errs := make([]error, len(list))
	type result struct {
		i   int
		err error
	}
	results := make(chan result)
	running, best := 0, -1
	try := func(i int) {
		running++
		go func() { results <- result{i, reach(ctx, list[i])} }()
	}
	try(0)
	later, enough := time.NewTimer(stalled), time.NewTimer(time.Hour)
	defer later.Stop()
	defer enough.Stop()
	for running > 0 {
		select {
		case <-later.C:
			for i := range list[1:] {
				try(i + 1)
			}
		case <-enough.C:
			cancel()
		case r := <-results:
			running--
			errs[r.i] = r.err
			switch {
			case r.err != nil:
			case r.i == 0:
				best = 0
				cancel()
			case best < 0 || r.i < best:
				best = r.i
				enough.Reset(grace)
			}
			if r.i == 0 {
				later.Stop()
			}
		}
	}
	cancel()
	if best < 0 {
		return 0, errs[0]
	}
	return list[best], nil
}

// Prober returns a Probe that reaches one of the organisation's servers: a TLS
// handshake, over the uplink alone, with a server whose certificate the
// organisation's CA signed. No captive portal and no local network can answer
// it. A laptop whose attestation is in force (admitted) asks the gateways, any
// other the verifiers: it has no business with a gateway. Both are asked by the
// organisation's proxy if it has one. The number is the MTU that packets must keep to, if the
// path swallows longer ones without a word.
func Prober(org *attest.Organization, dial dialer, admitted func() bool) (func(context.Context, netd.Uplink) (int, error), error) {
	roots, err := org.Roots()
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context, u netd.Uplink) (int, error) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		type result struct {
			mtu int
			err error
		}
		results, n := make(chan result), 0
		servers, proxy := org.Verifiers, org.Proxy
		if admitted() {
			servers = org.Gateways
		}
		for _, g := range servers {
			addresses := g.Addresses()
			if proxy.IsValid() { // it is the first hop, whatever the gateway's family is
				addresses = []netip.AddrPort{g.Address}
			}
			for _, to := range addresses {
				first := to
				if proxy.IsValid() {
					first = proxy
				}
				if first.Addr().Is4() && !u.Address.IsValid() || first.Addr().Is6() && !u.Address6.IsValid() {
					continue
				}
				n++
				go func() {
					mtu, err := width(ctx, func(ctx context.Context, mtu int) error {
						conn, err := dial(ctx, u, mtu, to, proxy)
						if err != nil {
							return err
						}
						defer conn.Close()
						config := org.KeyAgreement.Config()
						config.ServerName, config.RootCAs = g.ServerName, roots
						return tls.Client(conn, config).HandshakeContext(ctx)
					})
					results <- result{mtu, err}
				}()
			}
		}
		err := fmt.Errorf("no server has an address of the family of %s", u.Addresses())
		reached, mtu := false, 0
		for i := range n { // the goroutines end with this function
			r := <-results
			if r.err == nil && !reached {
				reached, mtu = true, r.mtu
				cancel()
			}
			if i == 0 || local(err) {
				err = r.err
			}
		}
		if reached {
			return mtu, nil
		}
		return 0, err
	}, nil
}
