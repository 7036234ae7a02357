package fleet

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"math/big"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/attest/cryptrec"
	"sekisho/attest/gate"
)

// feedOf serves b's service and returns a gateway's feed of it. stop ends the
// server; start begins it again at the same address.
func feedOf(t *testing.T, b *bench) (f gate.Feed, start func() (stop func())) {
	t.Helper()
	ca, caKey := authority(t, "gateways")
	c := b.service.Config
	c.Gateways = x509.NewCertPool()
	c.Gateways.AddCert(ca)
	b.use(c)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(5), NotBefore: ca.NotBefore, NotAfter: ca.NotAfter, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, ca, key.Public(), caKey)
	if err != nil {
		t.Fatal(err)
	}
	server, roots := testServer(t, ca)
	f = gate.Feed{TLS: cryptrec.Config(), Signer: &b.service.Reports.key.PublicKey, Organization: org, Log: slog.New(slog.NewTextHandler(t.Output(), nil))}
	f.TLS.RootCAs, f.TLS.Certificates = roots, []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	f.Verifiers = []attest.Endpoint{{Address: netip.MustParseAddrPort(address), ServerName: name}}
	return f, func() func() {
		if l == nil {
			if l, err = net.Listen("tcp", address); err != nil {
				t.Fatal(err)
			}
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		listener := l
		go func() { done <- Serve(ctx, listener, server, b.service, slog.New(slog.DiscardHandler)) }()
		l = nil
		return sync.OnceFunc(func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("serve: %v", err)
			}
		})
	}
}

func run(t *testing.T, f gate.Feed) *gate.Revocations {
	t.Helper()
	r := gate.NewRevocations(f)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { r.Run(ctx) })
	t.Cleanup(func() { cancel(); wg.Wait() })
	return r
}

// until waits for a state of the feed.
func until(t *testing.T, what string, f func() bool) {
	t.Helper()
	tick, limit := time.NewTicker(10*time.Millisecond), time.After(60*time.Second)
	defer tick.Stop()
	for !f() {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatalf("not %s", what)
		}
	}
}

// TestRevocationsReachGateways follows a device's end and return, over TLS,
// also from another verifier on the same store, and across a verifier that was
// away.
func TestRevocationsReachGateways(t *testing.T) {
	b := newBench(t)
	b.full(false)
	f, start := feedOf(t, b)
	k := b.approvers()
	d, id := b.enrolled()
	_, other := b.enrolled()
	if _, err := b.service.Retire(t.Context(), other, "before"); err != nil {
		t.Fatal(err)
	}
	r := gate.NewRevocations(f)
	if r.Heard() == nil {
		t.Error("relied on before it heard anything")
	}
	stop := start()
	defer func() { stop() }()
	r = run(t, f)
	until(t, "heard", func() bool { return r.Heard() == nil })
	if !r.Revoked(attest.Holder{Device: other}) || r.Revoked(attest.Holder{Device: id}) {
		t.Error("the first message is not the whole list")
	}
	changed := r.Changed()
	begin := time.Now()
	if _, err := b.second("second.test").Retire(t.Context(), id, "lost"); err != nil {
		t.Fatal(err)
	}
	<-changed
	if took := time.Since(begin); !r.Revoked(attest.Holder{Device: id}) || took > 5*time.Second {
		t.Errorf("revoked %v after %v", r.Revoked(attest.Holder{Device: id}), took)
	}
	if _, err := b.service.AddPermit(t.Context(), b.permit(PermitRequest{Device: id, Reason: "found"}, k...)); err != nil {
		t.Fatal(err)
	}
	changed = r.Changed()
	if _, err := b.enrol(d, b.ticket(1), nil); err != nil {
		t.Fatal(err)
	}
	<-changed
	if r.Revoked(attest.Holder{Device: id}) {
		t.Error("still revoked after it came back")
	}
	// A verifier that ends lets its gateways go, and they come again.
	changed = r.Changed()
	stop()
	stop = start()
	if _, err := b.service.Retire(t.Context(), id, "lost again"); err != nil {
		t.Fatal(err)
	}
	until(t, "revoked again", func() bool { return r.Revoked(attest.Holder{Device: id}) && r.Heard() == nil })
	<-changed
}

// TestAttackRevocations: who has no certificate of the gateways' CA hears
// nothing, and a gateway believes neither another signer nor another
// organisation nor a verifier that has forgotten something.
func TestAttackRevocations(t *testing.T) {
	b := newBench(t)
	b.full(false)
	f, start := feedOf(t, b)
	stop := start()
	defer stop()
	stranger, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	anonymous, signer, organization := f, f, f
	anonymous.TLS = f.TLS.Clone()
	anonymous.TLS.Certificates = nil
	signer.Signer = &stranger.PublicKey
	organization.Organization = "Other City"
	var all []*gate.Revocations
	for _, f := range []gate.Feed{anonymous, signer, organization} {
		all = append(all, run(t, f))
	}
	good := run(t, f)
	until(t, "heard", func() bool { return good.Heard() == nil })
	for i, r := range all {
		if r.Heard() == nil {
			t.Errorf("%d is relied on", i)
		}
	}
}

// TestAttackRevocationsBehind: a verifier that no longer hears of changes says
// nothing to gateways, not even to one that begins anew and would believe any
// list.
func TestAttackRevocationsBehind(t *testing.T) {
	b := newBench(t)
	b.full(false)
	f, start := feedOf(t, b)
	_, id := b.enrolled()
	if err := b.service.followsRevocations(t.Context()); err != nil {
		t.Errorf("before any: %v", err)
	}
	stop := start()
	defer stop()
	b.service.shared.Mirror.Close() // its watch is cut
	if _, err := b.second("second.test").Retire(t.Context(), id, "lost"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := b.service.followsRevocations(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("behind: %v", err)
	}
	r := run(t, f)
	until(t, "left", func() bool { err := r.Heard(); return err != nil && strings.Contains(err.Error(), "503") })
	if r.Revoked(attest.Holder{Device: id}) {
		t.Error("heard of it all the same") // then this test shows nothing
	}
}

// TestNothingToChange: a change that changes nothing does not wait for itself.
func TestNothingToChange(t *testing.T) {
	b := newBench(t)
	d, id := b.enrolled()
	b.attest(b.evidence(d, id, b.nonce(id))) // the store moves on
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if found, err := b.service.RemoveReference(ctx, "absent"); found || err != nil {
		t.Error(found, err)
	}
}

func FuzzParseRevocations(f *testing.F) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(`{"message":"e30=","signature":"AA=="}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		if _, err := attest.ParseRevocations(line, &key.PublicKey); err == nil {
			t.Error("a forged message was read")
		}
	})
}
