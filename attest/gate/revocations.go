package gate

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"sekisho/attest"
	"sekisho/attest/cryptrec"
)

// Feed says where a gateway hears of revocations.
type Feed struct {
	Verifiers    []attest.Endpoint // tried in turn
	TLS          *tls.Config       // roots, and our client certificate
	Signer       *ecdsa.PublicKey  // the verifiers' report key
	Organization string
	Log          *slog.Logger
}

// Revocations is a gateway's knowledge of devices that have ended. It is to be
// relied on while a verifier is heard. It is safe for concurrent use.
type Revocations struct {
	feed Feed

	mu       sync.Mutex
	revoked  attest.RevocationSet
	sequence uint64
	heard    time.Time // by the monotonic clock; zero: never
	err      error     // why not
	changed  chan struct{}
}

// NewRevocations returns a Revocations that has heard nothing. Run follows the
// feed.
func NewRevocations(f Feed) *Revocations {
	return &Revocations{feed: f, err: errors.New("no verifier was heard yet"), changed: make(chan struct{})}
}

// Heard returns why the feed is not to be relied on now: no verifier was heard
// for attest.RevocationSilence.
func (r *Revocations) Heard() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.heard.IsZero() && time.Since(r.heard) < attest.RevocationSilence {
		return nil
	}
	return fmt.Errorf("no word of revocations for %s: %w", attest.RevocationSilence, r.err)
}

// Revoked reports whether what h holds has ended.
func (r *Revocations) Revoked(h attest.Holder) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, ended := r.revoked.Covers(h)
	return ended
}

// Changed returns a channel that is closed with the next change.
func (r *Revocations) Changed() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.changed
}

// Run follows the feed, one verifier after the other, until ctx is done.
func (r *Revocations) Run(ctx context.Context) {
	for i := 0; ctx.Err() == nil; i++ {
		v := r.feed.Verifiers[i%len(r.feed.Verifiers)]
		err := r.follow(ctx, v)
		if ctx.Err() != nil {
			return
		}
		r.mu.Lock()
		r.err = fmt.Errorf("verifier %s: %w", v.Address, err)
		r.mu.Unlock()
		r.feed.Log.Warn("revocations: feed ended; trying again", "verifier", v.Address, "err", err)
		select {
		case <-ctx.Done():
		case <-time.After(attest.RevocationBeat / 2):
		}
	}
}

// follow follows one verifier until it is silent or says what it may not.
func (r *Revocations) follow(ctx context.Context, v attest.Endpoint) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// Whoever is silent is left, before the silence counts.
	silent := time.AfterFunc(attest.RevocationSilence/2, func() { cancel(errors.New("it is silent")) })
	defer silent.Stop()
	config := r.feed.TLS.Clone()
	config.ServerName = v.ServerName
	client := &http.Client{Transport: &http.Transport{
		DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			c, err := attest.First(ctx, v.Addresses(), func(ctx context.Context, a netip.AddrPort) (net.Conn, error) {
				return (&tls.Dialer{Config: config}).DialContext(ctx, "tcp", a.String())
			}, func(c net.Conn) { c.Close() })
			if err != nil {
				return nil, err
			}
			if err := cryptrec.Check(c.(*tls.Conn).ConnectionState()); err != nil {
				return nil, errors.Join(err, c.Close())
			}
			return c, nil
		},
		DisableKeepAlives: true, MaxResponseHeaderBytes: 16 << 10,
	}, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+v.Address.String()+attest.PathRevocations, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return errors.Join(context.Cause(ctx), errors.Unwrap(err))
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("http status %d", resp.StatusCode)
	}
	in := bufio.NewScanner(resp.Body)
	in.Buffer(nil, attest.MaxRevocations)
	for first := true; in.Scan(); first = false {
		m, err := attest.ParseRevocations(in.Bytes(), r.feed.Signer)
		if err != nil {
			return err
		}
		if err := r.take(m, first); err != nil {
			return err
		}
		silent.Reset(attest.RevocationSilence / 2)
	}
	return errors.Join(errors.New("the stream ended"), in.Err(), context.Cause(ctx))
}

// take takes in a message. A verifier that knows less than we do, such as one
// whose store was restored from a backup, is not relied on.
func (r *Revocations) take(m *attest.Revocations, first bool) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case m.Organization != r.feed.Organization:
		return fmt.Errorf("revocations of %.64q, we serve %q", m.Organization, r.feed.Organization)
	case m.Full != first:
		return errors.New("its first message must be the whole list, and no other")
	case m.Sequence < r.sequence:
		return fmt.Errorf("it is at change %d, and we have heard of %d: was its store restored? Restart the gateway when that is settled", m.Sequence, r.sequence)
	}
	r.sequence, r.heard, r.err = m.Sequence, time.Now(), errors.New("the verifier became silent")
	if len(m.Changes) == 0 && !first {
		return nil
	}
	if first {
		r.revoked = attest.RevocationSet{}
	}
	for _, c := range m.Changes {
		r.revoked.Apply(c)
	}
	close(r.changed)
	r.changed = make(chan struct{})
	return nil
}
