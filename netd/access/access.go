//go:build linux

// Package access keeps what lets the laptop into networks: the saved Wi-Fi
// networks, and its identity for 802.1X. Both are needed before the verifier
// can be reached, so neither attestation nor the work disk stands before them:
// attestd keeps them under a key that the TPM gives to every boot that the
// organisation's release signed, whether a network is there or not. In a boot
// that gets no key a person can still join networks, until power-off.
package access

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	rand2 "math/rand/v2"
	"sync"
	"time"

	"sekisho/attest"
	"sekisho/attest/gate"
	"sekisho/netd"
	"sekisho/netd/uplink/wpa"
)

// Pauses before the next attempt after one that failed, and before an identity
// is looked at again. A verifier that refuses is asked less and less often, with
// full jitter, for a whole fleet may ask it.
const (
	retryVault    = 2 * time.Second
	retryIdentity = 15 * time.Second
	maxDoublings  = 8
	lookAgain     = time.Hour
)

// Vault keeps bytes over power cuts and has keys certified: gate.Client.
type Vault interface {
	NetworkState(context.Context) ([]byte, error) // nil: nothing was saved
	SaveNetworkState(context.Context, []byte) error
	NetworkCertificate(ctx context.Context, request []byte) ([]byte, error)
}

// Config is what a Keeper works with. All fields are needed but Access.
type Config struct {
	Vault Vault
	// File is in memory and for netd alone: what outlives a restart of netd.
	File   string
	Access *attest.NetworkAccess // nil: no network of the organisation's asks for 802.1X
	// Loaded is told the networks that were kept, once they are known.
	Loaded func([]wpa.Network)
	// Identify is told the network identity; nil when there is none.
	Identify func(*wpa.Identity)
	Now      func() time.Time
	Log      *slog.Logger
}

// Keeper is a wpa.Store over a Vault, and renews the identity in it. Make one
// with New, and Run it.
type Keeper struct {
	Config
	root     []byte // of Access, DER
	wake     chan struct{}
	refusals int // of identities in a row; of Run's goroutine alone

	mu     sync.Mutex
	kept   kept
	saved  []byte // what the vault holds, encoded
	read   bool   // the vault was read, in this run or in one before
	shut   bool   // this boot gets nothing from the vault
	why    string // why nothing is kept for the moment
	change chan struct{}
}

// New returns a Keeper with what another netd left in File. An error says that
// this was lost; the Keeper is usable.
func New(c Config) (*Keeper, error) {
	k := &Keeper{Config: c, wake: make(chan struct{}, 1), change: make(chan struct{}), why: "attestd has not answered yet"}
	if c.Access != nil {
		if b, _ := pem.Decode([]byte(c.Access.CA)); b != nil {
			k.root = b.Bytes
		}
	}
	f, err := readFile(c.File)
	if err != nil || f == nil {
		return k, err
	}
	k.kept, k.read = f.kept, f.Read
	return k, nil
}

// Load implements wpa.Store.
func (k *Keeper) Load() ([]byte, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.kept.Networks, nil
}

// Save implements wpa.Store. The networks are durable once Settled says so.
func (k *Keeper) Save(networks []byte) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	next := k.kept
	next.Networks = bytes.Clone(networks)
	return k.replace(next)
}

// replace notes what is to be kept, and has Run keep it. k.mu is held.
func (k *Keeper) replace(next kept) error {
	if err := writeFile(k.File, file{next, k.read}); err != nil {
		return err
	}
	k.kept = next
	select {
	case k.wake <- struct{}{}:
	default:
	}
	return nil
}

// Settled waits until all is kept, or until it is known that it is not, and
// says which.
func (k *Keeper) Settled(ctx context.Context) netd.Access {
	for {
		k.mu.Lock()
		s, change := k.status(), k.change
		k.mu.Unlock()
		if s.State != netd.AccessPending {
			return s
		}
		select {
		case <-ctx.Done():
			return s
		case <-change:
		}
	}
}

// Status says at once how things stand.
func (k *Keeper) Status() netd.Access {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.status()
}

// status is Status. k.mu is held.
func (k *Keeper) status() netd.Access {
	s := netd.Access{State: netd.AccessPending, Detail: k.why}
	switch {
	case k.shut:
		s.State = netd.AccessVolatile
	case k.read && k.why == "" && bytes.Equal(k.saved, k.kept.encode()):
		s.State = netd.AccessKept
	}
	if cert, err := k.kept.certificate(); err == nil {
		s.Identity, s.IdentityUntil = cert.Subject.CommonName, cert.NotAfter
	}
	return s
}

// Run keeps what Save is given, and renews the identity, until ctx is done.
func (k *Keeper) Run(ctx context.Context) {
	k.tell()
	timer := time.NewTimer(0)
	defer timer.Stop()
	failures := 0 // of the vault, in a row
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-k.wake:
		}
		pause := lookAgain
		if err := k.keep(ctx); err != nil {
			pause = retryVault << min(failures, 5)
			failures++
		} else {
			failures = 0
		}
		if next := k.identify(ctx); next < pause {
			pause = next
		}
		timer.Reset(pause)
	}
}

// keep brings the vault and the memory into agreement. An error is worth
// another attempt.
func (k *Keeper) keep(ctx context.Context) error {
	k.mu.Lock()
	read, shut, next := k.read && k.saved != nil, k.shut, k.kept
	k.mu.Unlock()
	if shut {
		return nil
	}
	if !read {
		data, err := k.Vault.NetworkState(ctx)
		if err != nil {
			return k.failed(err)
		}
		if next, err = k.merge(data); err != nil {
			return k.failed(err)
		}
	}
	data := next.encode()
	k.mu.Lock()
	same := bytes.Equal(data, k.saved)
	k.mu.Unlock()
	if !same {
		if err := k.Vault.SaveNetworkState(ctx, data); err != nil {
			return k.failed(err)
		}
	}
	k.mu.Lock()
	k.saved, k.why = data, ""
	k.changed()
	k.mu.Unlock()
	return nil
}

// failed notes why nothing is kept for the moment, or in all of this boot.
func (k *Keeper) failed(err error) error {
	var refused *gate.KeyRefused
	k.mu.Lock()
	defer k.mu.Unlock()
	if errors.As(err, &refused) && len(refused.Codes) > 0 {
		k.shut, err = true, nil
		k.Log.Warn("networks are not kept over power-off", "codes", refused.Codes, "err", refused.Detail)
		k.why = refused.Detail
	} else {
		k.why = err.Error()
	}
	k.changed()
	return err
}

// changed wakes who waits in Settled. k.mu is held.
func (k *Keeper) changed() {
	close(k.change)
	k.change = make(chan struct{})
}

// merge takes over what the vault holds. A netd that has read it before, in
// this boot, has the newer of both.
func (k *Keeper) merge(data []byte) (kept, error) {
	held, err := decode(data)
	if err != nil { // of another release, say: it cannot be used, and is replaced
		k.Log.Warn("what was kept of networks is lost", "err", err)
		held = kept{}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.saved = append([]byte{}, data...)
	if k.read {
		return k.kept, nil
	}
	next := k.kept
	if len(next.Key) == 0 && k.Access != nil { // else nobody asks for it any more
		next.Key, next.Certificate = held.Key, held.Certificate
	}
	networks, err := union(held.Networks, next.Networks)
	if err != nil {
		return kept{}, err
	}
	if next.Networks, err = wpa.Encode(networks); err != nil {
		return kept{}, err
	}
	k.read = true
	if err := k.replace(next); err != nil {
		k.read = false
		return kept{}, err
	}
	k.mu.Unlock() // the listeners may ask back
	k.Loaded(networks)
	k.tell()
	k.mu.Lock()
	return k.kept, nil
}

// tell hands the identity to Identify.
func (k *Keeper) tell() {
	k.mu.Lock()
	cert, err := k.kept.certificate()
	key := k.kept.Key
	k.mu.Unlock()
	if k.Access == nil || err != nil {
		k.Identify(nil)
		return
	}
	k.Identify(&wpa.Identity{Name: cert.Subject.CommonName, Certificate: cert.Raw, Key: key, CA: k.root})
}

// identify gets a new identity when there is none, or when half the time of the
// present one is over, and returns when to look again.
func (k *Keeper) identify(ctx context.Context) time.Duration {
	if k.Access == nil {
		return lookAgain
	}
	k.mu.Lock()
	cert, err := k.kept.certificate()
	known := k.read || k.shut
	k.mu.Unlock()
	if !known {
		return lookAgain // after the vault was read
	}
	if err == nil {
		half := cert.NotBefore.Add(cert.NotAfter.Sub(cert.NotBefore) / 2)
		if left := half.Sub(k.Now()); left > 0 {
			return min(left, lookAgain)
		}
	}
	switch err := k.renew(ctx); {
	case err == nil:
		k.refusals = 0
		return lookAgain
	case errors.Is(err, gate.ErrNoCredential):
		return retryIdentity
	default:
		k.Log.Warn("no new network identity", "err", err)
		most := retryIdentity << k.refusals
		k.refusals = min(k.refusals+1, maxDoublings)
		return retryIdentity + rand2.N(most)
	}
}

// renew has a verifier certify a new key. It needs a credential in force.
func (k *Keeper) renew(ctx context.Context) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	request, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return err
	}
	der, err := k.Vault.NetworkCertificate(ctx, request)
	if err != nil {
		return err
	}
	next := kept{Certificate: der}
	if next.Key, err = x509.MarshalECPrivateKey(key); err != nil {
		return err
	}
	cert, err := next.certificate()
	if err != nil {
		return err
	}
	if !key.PublicKey.Equal(cert.PublicKey) {
		return fmt.Errorf("certificate of %q is for another key", cert.Subject)
	}
	k.mu.Lock()
	next.Networks = k.kept.Networks
	err = k.replace(next)
	k.mu.Unlock()
	if err != nil {
		return err
	}
	k.Log.Info("network identity", "name", cert.Subject.CommonName, "until", cert.NotAfter)
	k.tell()
	return nil
}
