//go:build linux

package daemon

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"sekisho/attest"
	"sekisho/attest/proxy"
	"sekisho/guestlink"
	"sekisho/netd"
	"sekisho/netd/tunnel"
	"sekisho/netd/tunnel/connectip"
)

const (
	firstPause    = 500 * time.Millisecond // between attempts to open a tunnel; full jitter
	maxPause      = 30 * time.Second
	anotherUplink = 200 * time.Millisecond // for the uplinks' keeper to say that there is one
	pushEvery     = 5 * time.Second        // linkd is told again at least this often
)

// keepTunnel has a session open exactly while the loop wants one, opens a new
// one before it leaves the old when the uplink or the certificate changes or
// the path has become suspect, and goes through the gateways in order until one
// admits us.
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
		want, device := d.want, d.in.gate.DeviceID
		d.mu.Unlock()
		st := d.Driver.Status()
		if !want.open {
			if st.Open {
				d.Driver.Down()
				signal(d.wake)
			}
			have, attempt = wanted{}, 0
			d.setTrouble(trouble{})
			d.idle(ctx, nil)
			continue
		}
		if st.Open && have != want && have.serves(want, st.Gateway.Addr()) {
			have = want // the uplink's address of the other family came or went
		}
		if st.Open && have == want && !st.Suspect {
			attempt = 0
			d.idle(ctx, st.Changed)
			continue
		}
		if !st.Open && st.Err != nil && have != (wanted{}) { // the session that was open has just ended
			d.Log.Warn("tunnel closed", "gateway", st.Gateway, "err", st.Err)
			d.doubt(ctx, have.path.Link, st.Err)
			signal(d.wake)
			if have == want && attempt == 0 {
				// A gateway's restart meets its laptops spread out.
				wait(ctx, rand.N(firstPause), nil)
			}
			have = wanted{}
			continue
		}
		if st.Open && st.Suspect && have == want {
			d.Log.Warn("tunnel suspect: no sign of life", "gateway", st.Gateway, "uplink", have.path.Link)
			d.uplinks.Doubt(ctx, have.path.Link)
			if !d.suspend(ctx, want, st.Changed) {
				continue // there is another uplink, or life again
			}
		}
		order := gatewayOrder(d.Organization.Gateways, device)
		gateway := order[attempt%len(order)]
		var err error
		if other := want; st.Open && !st.Suspect && func() bool { other.path = have.path; return other == have }() {
			gateway.Address = st.Gateway
			err = d.unlessChanged(ctx, want, func(ctx context.Context) error { return d.Driver.Rebind(ctx, want.path) })
		} else {
			err = d.unlessChanged(ctx, want, func(ctx context.Context) error {
				return d.open(ctx, tunnel.Target{Gateway: gateway, Roots: roots, Until: want.until, Path: want.path, Proxy: d.Organization.Proxy, Agreement: d.Organization.KeyAgreement})
			})
		}
		if err == nil {
			have, attempt = want, 0
			d.setTrouble(trouble{})
			signal(d.wake)
			continue
		}
		if ctx.Err() != nil {
			return
		}
		if errors.Is(err, errWish) {
			continue
		}
		d.Log.Warn("tunnel not opened", "gateway", gateway.Address, "attempt", attempt, "err", err)
		d.setTrouble(diagnose(gateway.Address, err))
		d.doubt(ctx, want.path.Link, err)
		pause := min(firstPause<<min(attempt/len(order), 10), maxPause)
		attempt++
		// A new uplink is reason enough to try at once.
		wait(ctx, rand.N(pause), d.keeper)
	}
}

// serves reports whether a session with a that was made for have is as good for want.
func (have wanted) serves(want wanted, a netip.Addr) bool {
	have.path, want.path = have.path.Without(a), want.path.Without(a)
	return have == want
}

// errWish ends an attempt that is no longer wanted.
var errWish = errors.New("something else is wanted")

// unlessChanged calls f, whose context ends when something else than want is
// wanted: an attempt over an uplink that is dead shall not hold up the next.
func (d *Daemon) unlessChanged(ctx context.Context, want wanted, f func(context.Context) error) error {
	inner, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- f(inner) }()
	for {
		select {
		case err := <-done:
			return err
		case <-d.keeper:
			if d.wants(want) {
				continue
			}
			cancel()
			if err := <-done; err == nil || ctx.Err() != nil {
				return err
			}
			return errWish
		}
	}
}

func (d *Daemon) wants(want wanted) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.want == want
}

// suspend gives the uplinks' keeper a moment to find another uplink. It reports
// whether there is nothing better than to try the same again.
func (d *Daemon) suspend(ctx context.Context, want wanted, changed <-chan struct{}) bool {
	moment := time.NewTimer(anotherUplink)
	defer moment.Stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-changed:
			return false
		case <-d.keeper:
			if !d.wants(want) {
				return false
			}
		case <-moment.C:
			return true
		}
	}
}

// gatewayOrder is in which order a device goes to the gateways: each in another
// one, so that a gateway's laptops spread over all others when it fails
// (rendezvous hashing), and the same one every time.
func gatewayOrder(list []attest.Endpoint, device string) []attest.Endpoint {
	weight := func(e attest.Endpoint) [sha256.Size]byte {
		return sha256.Sum256([]byte(device + " " + e.Address.String()))
	}
	return slices.SortedFunc(slices.Values(list), func(a, b attest.Endpoint) int {
		x, y := weight(a), weight(b)
		return bytes.Compare(x[:], y[:])
	})
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

// idle waits for a new wish or a change of the session.
func (d *Daemon) idle(ctx context.Context, changed <-chan struct{}) {
	select {
	case <-ctx.Done():
	case <-d.keeper:
	case <-changed:
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
		stopped *proxy.Error
		remote  *net.OpError
		cert    *tls.CertificateVerificationError
	)
	t := trouble{reason: netd.ReasonGateway, what: fmt.Sprintf("gateway %s unreachable", gateway), since: time.Now()}
	switch {
	case errors.As(err, &stopped) && stopped.Status != 0:
		t.reason, t.what = netd.ReasonProxy, stopped.Error()
	case errors.As(err, &refused), errors.As(err, &cert),
		errors.As(err, &remote) && remote.Op == "remote error": // a TLS alert (crypto/tls)
		t.reason, t.what = netd.ReasonRefused, strings.ReplaceAll(err.Error(), "\n", "; ")
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
		c := guestlink.Config{Address: netip.PrefixFrom(a.Inner, a.Inner.BitLen()), MTU: a.MTU, DNS: a.DNS}
		if a.Inner6.IsValid() {
			c.Address6 = netip.PrefixFrom(a.Inner6, a.Inner6.BitLen())
		}
		err := d.Configure(ctx, c)
		if (err != nil) != (failed != nil) && ctx.Err() == nil {
			d.Log.Info("linkd", "address", a.Inner, "mtu", a.MTU, "err", err)
		}
		failed, pause = err, pushEvery
		if err != nil {
			pause = time.Second
		}
	}
}
