package attester

import (
	"context"
	"crypto"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"time"

	"sekisho/attest"
	"sekisho/attest/gate"
)

// errShut is returned while no credential is in force.
var errShut = errors.New("no credential in force")

// publish derives the state from the facts and, if anything differs from what
// was published last, makes it the status. a.mu is held.
func (a *Attester) publish(reason attest.Reason, detail string) {
	now := a.Now().UTC()
	next := gate.Status{
		State: Next(a.facts, now), Since: now, Reason: reason.String(), Detail: detail,
		Version: a.status.Version + 1, NotAfter: a.facts.NotAfter.UTC(),
	}
	if a.facts.NotAfter.IsZero() {
		next.NotAfter = time.Time{}
	}
	if a.facts.TPM {
		next.DeviceID = a.device.String()
	}
	if next.State == a.status.State {
		next.Since = a.status.Since
	}
	same := a.status
	same.Version = next.Version
	if same == next {
		return
	}
	a.status = next
	close(a.change)
	a.change = make(chan struct{})
	a.Log.Info("state", "state", next.State, "reason", next.Reason, "detail", next.Detail)
}

// Status returns the present status. A credential that has lapsed by the clock
// is never reported as in force, whatever timers did.
func (a *Attester) Status() gate.Status {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.current()
}

func (a *Attester) current() gate.Status {
	s := a.status
	if s.State == gate.StateAffirming && !a.Now().Before(s.NotAfter) {
		s.State, s.NotAfter = gate.StateAttesting, time.Time{}
	}
	return s
}

// Wait returns the status once its version is above after, or as it is when
// ctx ends.
func (a *Attester) Wait(ctx context.Context, after uint64) gate.Status {
	for {
		a.mu.Lock()
		s, change := a.current(), a.change
		a.mu.Unlock()
		if s.Version > after {
			return s
		}
		select {
		case <-ctx.Done():
			return s
		case <-change:
		}
	}
}

// inForce returns the TPM while a credential is in force. a.mu is held.
func (a *Attester) inForce() (Hardware, bool) {
	_, open := gate.Open(a.current(), gate.Credential, a.Now())
	return a.hw, open && a.chain != nil && a.hw != nil
}

// Credential returns the certificate in force with its chain in PEM.
func (a *Attester) Credential() ([]byte, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, ok := a.inForce(); !ok {
		return nil, errShut
	}
	var out []byte
	for _, c := range a.chain {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out, nil
}

// Sign signs a SHA-256 digest with the credential key while a credential is in
// force.
func (a *Attester) Sign(digest []byte) ([]byte, error) {
	a.mu.Lock()
	hw, ok := a.inForce()
	a.mu.Unlock()
	if !ok {
		return nil, errShut
	}
	return hw.Sign(rand.Reader, digest, crypto.SHA256)
}

// Line is a status in one line for the console; its first word is the state.
func Line(s gate.Status) string {
	switch s.State {
	case gate.StateAffirming:
		line := s.State + " until " + s.NotAfter.UTC().Format(time.RFC3339)
		if s.Detail != "" {
			line += "; not renewed yet: " + s.Detail
		}
		return line
	case gate.StateRefused:
		return s.State + " " + s.Reason + ": " + s.Detail
	case gate.StateUnreachable:
		return s.State + " since " + s.Since.UTC().Format(time.RFC3339) + ": " + s.Detail
	}
	if s.Detail == "" {
		return s.State
	}
	return s.State + ": " + s.Detail
}
