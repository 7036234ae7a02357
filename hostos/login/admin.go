package login

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"strings"
	"time"

	"sekisho/attest/gate"
	"sekisho/hostos/login/fprint"
	"sekisho/hostos/login/piv"
)

// Setup makes the card's key in the TPM for a user. What the card was before
// is gone: key, certificate, PIN and fingers.
func (e *Engine) Setup(ctx context.Context, user, name string) (gate.LogonKey, error) {
	if user == "" || len(user) > 128 || len(name) > 128 || strings.ContainsAny(user, "/\x00") || user[0] == '.' {
		return gate.LogonKey{}, errors.New("user: want 1 to 128 bytes without slashes, and a name of at most 128")
	}
	k, err := e.Attestd.CreateLogonKey(ctx, gate.CreateLogonKey{Kind: e.Policy.Key})
	if err != nil {
		return gate.LogonKey{}, err
	}
	var guid [16]byte
	rand.Read(guid[:])
	guid[6], guid[8] = guid[6]&0xf|0x40, guid[8]&0x3f|0x80 // RFC 9562, version 4
	e.Slot.Remove()
	if err := e.store.change(ctx, func(st *State) {
		*st = State{User: user, Name: name, GUID: guid, Key: &k, Events: st.Events, Stored: st.Stored, Used: st.Used}
	}); err != nil {
		return gate.LogonKey{}, err
	}
	return k, e.reload()
}

// reload has the card show the state, and puts it into the reader anew.
func (e *Engine) reload() error {
	e.Slot.Remove()
	if err := e.count.Reload(); err != nil {
		return err
	}
	p, err := e.store.get().profile(e.Agency, e.Now())
	if err != nil {
		return err
	}
	if err := e.card.Load(p); err != nil {
		return err
	}
	e.place()
	return nil
}

// Import takes the certificate of the card's key, as the organisation's CA or
// its Active Directory issued it: PEM, the key's own first, then its issuers.
func (e *Engine) Import(ctx context.Context, chain []byte) error {
	var ders [][]byte
	for len(ders) < 5 {
		var b *pem.Block
		if b, chain = pem.Decode(chain); b == nil {
			break
		}
		ders = append(ders, b.Bytes)
	}
	if len(ders) == 0 || len(ders) > 4 {
		return fmt.Errorf("%d certificates, want 1 to 4", len(ders))
	}
	leaf, err := x509.ParseCertificate(ders[0])
	if err != nil {
		return err
	}
	if err := checkLogon(leaf, e.Now()); err != nil {
		return err
	}
	public, err := e.store.get().public()
	if err != nil {
		return err
	}
	if !equal(public, leaf.PublicKey) {
		return errors.New("the certificate is for another key than the card's; make a request with `logind request`")
	}
	if err := e.store.change(ctx, func(st *State) { st.Chain = ders }); err != nil {
		return err
	}
	return e.reload()
}

// equal compares two public keys by their encoding.
func equal(a, b any) bool {
	x, err := x509.MarshalPKIXPublicKey(a)
	y, yerr := x509.MarshalPKIXPublicKey(b)
	return err == nil && yerr == nil && string(x) == string(y)
}

// checkLogon reports whether a certificate is one to sign in with: in time,
// for signatures, and for client or smart card logon ([MS-WCCE] and RFC 4556,
// section 3.2.4).
func checkLogon(c *x509.Certificate, now time.Time) error {
	if now.Before(c.NotBefore) || now.After(c.NotAfter) {
		return fmt.Errorf("the certificate is for %s to %s", c.NotBefore.Format(time.DateOnly), c.NotAfter.Format(time.DateOnly))
	}
	if c.KeyUsage != 0 && c.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		return errors.New("the certificate is not for digital signatures")
	}
	for _, u := range c.ExtKeyUsage {
		if u == x509.ExtKeyUsageClientAuth || u == x509.ExtKeyUsageAny {
			return nil
		}
	}
	for _, u := range c.UnknownExtKeyUsage {
		if u.Equal(oidSmartCardLogon) || u.Equal(oidPKINITClient) {
			return nil
		}
	}
	return errors.New("the certificate is neither for client authentication nor for smart card logon (1.3.6.1.4.1.311.20.2.2)")
}

// Extended key usages: Microsoft's smart card logon, and id-pkinit-KPClientAuth
// of RFC 4556, section 3.2.2.
var (
	oidSmartCardLogon = []int{1, 3, 6, 1, 4, 1, 311, 20, 2, 2}
	oidPKINITClient   = []int{1, 3, 6, 1, 5, 2, 3, 4}
)

// SetPIN sets the PIN and gives back all tries: at issue, or to unblock.
func (e *Engine) SetPIN(pin string) error {
	padded, err := piv.Pad(pin)
	if err != nil {
		return err
	}
	return errors.Join(e.count.Limit(e.Policy.PINTries), e.count.Set(padded))
}

// AllowPINOnly lets the PIN stand alone until a time, for a reader that broke.
func (e *Engine) AllowPINOnly(ctx context.Context, until time.Time) error {
	if until.Sub(e.Now()) > 24*time.Hour {
		return errors.New("the PIN may stand alone for 24 hours at most")
	}
	e.Log.Warn("the PIN stands alone", "until", until)
	return e.store.change(ctx, func(st *State) { st.PINOnly = until })
}

// Enroller takes and deletes fingers; *fprint.Reader has it.
type Enroller interface {
	Enrol(ctx context.Context, user, finger string, tell func(fprint.Feedback)) error
	Delete(ctx context.Context, user, finger string) error
	Prints() (map[string][]byte, error)
}

func (e *Engine) enroller() (Enroller, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	r, ok := e.reader.(Enroller)
	if !ok {
		return nil, fprint.ErrNoReader
	}
	return r, nil
}

// Enrol takes a new finger of the card's user.
func (e *Engine) Enrol(ctx context.Context, finger string) error {
	return e.changeFingers(ctx, func(r Enroller, user string) error { return r.Enrol(ctx, user, finger, e.tell) })
}

// DeleteFinger deletes a finger of the card's user.
func (e *Engine) DeleteFinger(ctx context.Context, finger string) error {
	return e.changeFingers(ctx, func(r Enroller, user string) error { return r.Delete(ctx, user, finger) })
}

// changeFingers changes the templates and keeps what they are then.
func (e *Engine) changeFingers(ctx context.Context, do func(Enroller, string) error) error {
	user := e.store.get().User
	if user == "" {
		return errors.New("the card is not set up yet")
	}
	r, err := e.enroller()
	if err != nil {
		return err
	}
	if err := do(r, user); err != nil {
		return err
	}
	prints, err := r.Prints()
	if err != nil {
		return err
	}
	return e.store.change(ctx, func(st *State) { st.Prints, st.Failures, st.Locked = maps.Clone(prints), 0, time.Time{} })
}

// Prints returns the templates that the state holds.
func (e *Engine) Prints() map[string][]byte { return e.store.get().Prints }
