//go:build linux

package daemon

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"time"

	"sekisho/guestlink"
	"sekisho/netd"
	"sekisho/netd/tunnel"
	"sekisho/netd/tunnel/connectip"
)

const (
	firstPause = 500 * time.Millisecond // between attempts to open a tunnel; full jitter
	maxPause   = 30 * time.Second
	pushEvery  = 5 * time.Second // linkd is told again at least this often
)

// keepTunnel has a session open exactly while the loop wants one, opens a new
// one before it leaves the old when address or certificate change, and goes
// through the gateways in order until one admits us.
func (d *Daemon) keepTunnel(ctx context.Context) {
	defer d.Driver.Down()
	roots, err := d.Organization.Roots()
	if err != nil {
		d.Log.Error("no tunnel", "err", err)
		return
	}
	var have wanted // what the open session was made for
	var attempt int
	for ctx.Err() == nil {
		d.mu.Lock()
		want := d.want
		d.mu.Unlock()
		st := d.Driver.Status()
		switch {
		case !want.open:
			if st.Open {
				d.Driver.Down()
				signal(d.wake)
			}
			attempt = 0
			d.setTrouble(trouble{})
			d.idle(ctx, nil)
			continue
		case st.Open && have == want:
			d.idle(ctx, st.Ended)
			continue
		}
		if st.Err != nil && have == want { // the session that was open has just ended
			d.Log.Warn("tunnel closed", "gateway", st.Gateway, "err", st.Err)
			d.doubt(ctx, have.link, st.Err)
			have = wanted{}
			// A gateway's restart meets its laptops spread out.
			wait(ctx, rand.N(firstPause), nil)
			continue
		}
		gateway := d.Organization.Gateways[attempt%len(d.Organization.Gateways)]
		err := d.open(ctx, tunnel.Target{Gateway: gateway, Roots: roots, Until: want.until, Source: want.source, Link: want.link})
		if err == nil {
			have, attempt = want, 0
			d.setTrouble(trouble{})
			signal(d.wake)
			continue
		}
		if ctx.Err() != nil {
			return
		}
		d.Log.Warn("tunnel not opened", "gateway", gateway.Address, "attempt", attempt, "err", err)
		d.setTrouble(diagnose(gateway.Address, err))
		d.doubt(ctx, want.link, err)
		pause := min(firstPause<<min(attempt/len(d.Organization.Gateways), 10), maxPause)
		attempt++
		wait(ctx, rand.N(pause), nil)
	}
}

// open fetches the credential and opens a session with it.
func (d *Daemon) open(ctx context.Context, to tunnel.Target) error {
	cred, err := d.Attestation.Credential(ctx)
	if err != nil {
		return err
	}
	if cred.Leaf != nil && cred.Leaf.NotAfter.Before(to.Until) {
		to.Until = cred.Leaf.NotAfter
	}
	to.Credential = cred
	_, err = d.Driver.Up(ctx, to)
	return err
}

// doubt tells the uplinks' keeper when err says that nothing came back over
// the uplink for a time. A refusal or a reset is an answer.
func (d *Daemon) doubt(ctx context.Context, link string, err error) {
	if t, ok := errors.AsType[net.Error](err); link != "" && (ok && t.Timeout() || errors.Is(err, connectip.ErrDead) || errors.Is(err, context.DeadlineExceeded)) {
		d.uplinks.Doubt(ctx, link)
	}
}

// idle waits for a new wish or the end of the session.
func (d *Daemon) idle(ctx context.Context, ended <-chan struct{}) {
	select {
	case <-ctx.Done():
	case <-d.keeper:
	case <-ended:
		signal(d.wake)
	}
}

// setTrouble reports why the tunnel does not open, since the first such attempt.
func (d *Daemon) setTrouble(t trouble) {
	d.mu.Lock()
	changed := t.reason != d.in.trouble.reason || t.what != d.in.trouble.what
	if changed {
		d.in.trouble = t
	}
	d.mu.Unlock()
	if changed {
		signal(d.wake)
	}
}

// diagnose says in words that stay the same from attempt to attempt why a
// session was not opened.
func diagnose(gateway netip.AddrPort, err error) trouble {
	var (
		refused *connectip.RefusedError
		remote  *net.OpError
		cert    *tls.CertificateVerificationError
	)
	t := trouble{reason: netd.ReasonGateway, what: fmt.Sprintf("gateway %s unreachable", gateway), since: time.Now()}
	switch {
	case errors.As(err, &refused), errors.As(err, &cert),
		errors.As(err, &remote) && remote.Op == "remote error": // a TLS alert (crypto/tls)
		t.reason, t.what = netd.ReasonRefused, fmt.Sprintf("gateway %s: %v", gateway, errors.Unwrap(err))
	}
	return t
}

// pushConfig keeps linkd's configuration equal to what the gateway assigned.
// linkd may restart at any time, so it is told again and again. The inner
// address stays while the tunnel is away: it never changes while a device lives.
func (d *Daemon) pushConfig(ctx context.Context) {
	var failed error
	for pause := pushEvery; ctx.Err() == nil; wait(ctx, pause, d.pusher) {
		st := d.Driver.Status()
		a := st.Assignment
		if !a.Inner.IsValid() {
			continue
		}
		err := d.Configure(ctx, guestlink.Config{Address: netip.PrefixFrom(a.Inner, a.Inner.BitLen()), MTU: a.MTU, DNS: a.DNS})
		if (err != nil) != (failed != nil) && ctx.Err() == nil {
			d.Log.Info("linkd", "address", a.Inner, "mtu", a.MTU, "err", err)
		}
		failed, pause = err, pushEvery
		if err != nil {
			pause = time.Second
		}
	}
}
