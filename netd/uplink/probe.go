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
func watch(ctx context.Context, probe func(context.Context) error, doubt <-chan struct{}, set func(health string)) {
	for failed, unsent, pause := 0, 0, firstPause; ; {
		err := func() error {
			ctx, cancel := context.WithTimeout(ctx, probeTimeout)
			defer cancel()
			return probe(ctx)
		}()
		next := pause
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			set(netd.HealthGood)
			failed, unsent, pause, next = 0, 0, firstPause, probeEvery/2+rand.N(probeEvery)
		case local(err) && unsent < maxLocal:
			unsent++
			next = localPause
		default:
			if failed++; failed >= deadAfter {
				set(netd.HealthDead)
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
type dialer = func(ctx context.Context, u netd.Uplink, to, proxy netip.AddrPort) (net.Conn, error)

// Prober returns a Probe that reaches one of the organisation's servers: a TLS
// handshake, over the uplink alone, with a server whose certificate the
// organisation's CA signed. No captive portal and no local network can answer
// it. A laptop whose attestation is in force (admitted) asks the gateways, by the
// organisation's proxy if it has one, any other the verifiers: it has no
// business with a gateway.
func Prober(org *attest.Organization, dial dialer, admitted func() bool) (func(context.Context, netd.Uplink) error, error) {
	roots, err := org.Roots()
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context, u netd.Uplink) error {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		results, n := make(chan error), 0
		servers, proxy := org.Verifiers, netip.AddrPort{}
		if admitted() {
			servers, proxy = org.Gateways, org.Proxy
		}
		for _, g := range servers {
			first := g.Address
			if proxy.IsValid() {
				first = proxy
			}
			if u.Address.Addr().Is4() != first.Addr().Is4() {
				continue
			}
			n++
			go func() {
				conn, err := dial(ctx, u, g.Address, proxy)
				if err == nil {
					config := org.KeyAgreement.Config()
					config.ServerName, config.RootCAs = g.ServerName, roots
					err = tls.Client(conn, config).HandshakeContext(ctx)
					conn.Close()
				}
				results <- err
			}()
		}
		err := fmt.Errorf("no server has an address of the family of %s", u.Address)
		reached := false
		for i := range n { // the goroutines end with this function
			e := <-results
			if reached = reached || e == nil; reached {
				cancel()
			}
			if i == 0 || local(err) {
				err = e
			}
		}
		if reached {
			return nil
		}
		return err
	}, nil
}
