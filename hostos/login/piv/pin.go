package piv

import (
	"bytes"
	"crypto/subtle"
	"errors"
	"fmt"
	"sync"

	"sekisho/attest"
)

// A PIN is six to eight digits, filled up with 0xFF (part 1, section 2.4.3).
const (
	pinSize = 8
	pinMin  = 6
	filler  = 0xff
)

// PINState is what a Store keeps of a PIN. The zero value is a PIN that was
// never set: nothing verifies against it.
type PINState struct {
	Salt []byte `json:"salt,omitempty"`
	Hash []byte `json:"hash,omitempty"` // attest.HashCardPIN of the eight bytes
	Left int    `json:"left"`           // tries left
	Max  int    `json:"max"`            // tries after each success
}

// Store keeps a PINState over power cuts: when Save has returned nil, Load
// answers it, whatever happens to the power.
type Store interface {
	LoadPIN() (PINState, error)
	SavePIN(PINState) error
}

// What Verify answers.
var (
	ErrPIN     = errors.New("wrong PIN")
	ErrBlocked = errors.New("PIN blocked after too many wrong tries")
	ErrForm    = errors.New("PIN is not six to eight digits")
)

// PIN is a card's PIN with its counter. Its methods are safe for concurrent
// use.
type PIN struct {
	store Store

	mu    sync.Mutex
	state PINState
}

// OpenPIN reads the PIN's state.
func OpenPIN(store Store) (*PIN, error) {
	s, err := store.LoadPIN()
	if err != nil {
		return nil, fmt.Errorf("piv: PIN: %w", err)
	}
	return &PIN{store: store, state: s}, nil
}

// Reload reads the state anew, after others changed the store.
func (p *PIN) Reload() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	s, err := p.store.LoadPIN()
	if err != nil {
		return fmt.Errorf("piv: PIN: %w", err)
	}
	p.state = s
	return nil
}

// Left returns how many tries are left; 0 is blocked, or never set.
func (p *PIN) Left() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return max(p.state.Left, 0)
}

// Verify compares a padded PIN with the one that was set. The try is counted
// and stored before it is compared, so that a power cut wins none. A value
// that cannot be a PIN is refused without being counted (section 3.2.1).
func (p *PIN) Verify(pin []byte) error {
	if !wellFormed(pin) {
		return ErrForm
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state.Left <= 0 || len(p.state.Hash) == 0 {
		return ErrBlocked
	}
	next := p.state
	next.Left--
	if err := p.save(next); err != nil {
		return err
	}
	hash, err := attest.HashCardPIN(pin, p.state.Salt)
	if err != nil {
		return err
	}
	if subtle.ConstantTimeCompare(hash, p.state.Hash) != 1 {
		if p.state.Left == 0 {
			return ErrBlocked
		}
		return ErrPIN
	}
	next.Left = next.Max
	return p.save(next)
}

// Set sets the PIN and gives back all tries. Whoever calls it has checked that
// this may be done.
func (p *PIN) Set(pin []byte) error {
	if !wellFormed(pin) {
		return ErrForm
	}
	hash, err := attest.NewCardPINHash(pin)
	if err != nil {
		return err
	}
	return p.SetHash(hash)
}

// SetHash is Set for a PIN of which only the hash is known.
func (p *PIN) SetHash(h attest.CardPINHash) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.save(PINState{Salt: h.Salt, Hash: h.Hash, Left: p.state.Max, Max: p.state.Max})
}

// Limit sets how many tries there are, and gives them all back.
func (p *PIN) Limit(tries int) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	next := p.state
	next.Left, next.Max = tries, tries
	return p.save(next)
}

// save stores a state and then takes it over. p.mu is held.
func (p *PIN) save(s PINState) error {
	if err := p.store.SavePIN(s); err != nil {
		return fmt.Errorf("piv: PIN: keep the counter: %w", err)
	}
	p.state = s
	return nil
}

// Pad gives a PIN of six to eight digits the form in which it goes to a card.
func Pad(pin string) ([]byte, error) {
	b := append([]byte(pin), bytes.Repeat([]byte{filler}, max(0, pinSize-len(pin)))...)
	if !wellFormed(b) {
		return nil, ErrForm
	}
	return b, nil
}

// wellFormed reports whether b is a padded PIN.
func wellFormed(b []byte) bool {
	if len(b) != pinSize {
		return false
	}
	digits := bytes.TrimRight(b, "\xff")
	for _, d := range digits {
		if d < '0' || d > '9' {
			return false
		}
	}
	return len(digits) >= pinMin
}

// NoPIN is the PIN of an organisation that wants none: a reader asks for one
// all the same, and any that has a PIN's form is taken. Only the gate is left
// before the keys.
type NoPIN struct{}

// Verify takes what has the form of a PIN.
func (NoPIN) Verify(pin []byte) error {
	if !wellFormed(pin) {
		return ErrForm
	}
	return nil
}

// Set changes nothing.
func (n NoPIN) Set(pin []byte) error { return n.Verify(pin) }

// Left is one: there is nothing to count.
func (NoPIN) Left() int { return 1 }
