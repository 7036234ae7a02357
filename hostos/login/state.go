package login

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"sekisho/attest"
	"sekisho/attest/gate"
	"sekisho/hostos/login/piv"
)

// State is what logind remembers over boots. It is encrypted on the disk, under
// a key that the TPM gives only to images that the release signed.
type State struct {
	User     string            `json:"user"` // account at the organisation, such as taro@EXAMPLE.LG.JP
	Name     string            `json:"name"` // for people
	GUID     [16]byte          `json:"guid"` // of the card
	Key      *gate.LogonKey    `json:"key,omitempty"`
	Chain    [][]byte          `json:"chain,omitempty"` // certificate of Key in DER, and its issuers
	PIN      piv.PINState      `json:"pin"`
	Prints   map[string][]byte `json:"prints,omitempty"` // templates of fingers
	Failures int               `json:"failures,omitempty"`
	Locked   time.Time         `json:"locked,omitzero"`   // until when fingers are locked out
	PINOnly  time.Time         `json:"pin_only,omitzero"` // until when the PIN may stand alone
	Events   []Event           `json:"events,omitempty"`  // the newest last
	Stored   uint64            `json:"stored,omitempty"`  // number of the newest event that a verifier keeps
	Used     []UsedPermit      `json:"used,omitempty"`
}

// Event is one logon, or one that was refused, for the organisation's audit.
type Event struct {
	Number uint64    `json:"number"` // rises by one
	Time   time.Time `json:"time"`
	User   string    `json:"user"`
	Slot   string    `json:"slot"`   // of the key, or what a permit let happen
	Factor string    `json:"factor"` // "finger+pin", "finger", "pin"; empty when refused
	Reason Reason    `json:"reason"` // Open, or why it was refused
	Result string    `json:"result"` // device and end of the attestation result it was made under
	Permit string    `json:"permit,omitempty"`
}

// audit is the event as a verifier keeps it.
func (e Event) audit() attest.LogonEvent {
	return attest.LogonEvent{Number: e.Number, Time: e.Time, User: e.User, What: e.Slot, Factor: e.Factor, Reason: string(e.Reason), Result: e.Result, Permit: e.Permit}
}

// maxEvents bounds the events that are kept.
const maxEvents = 64

// maxState bounds State's JSON in bytes.
const maxState = gate.MaxLogonState

// Attestd is what the engine needs of attestd; *gate.Client has it.
type Attestd interface {
	Wait(ctx context.Context, after uint64) (gate.Status, error)
	CreateLogonKey(context.Context, gate.CreateLogonKey) (gate.LogonKey, error)
	UseLogonKey(context.Context, gate.UseLogonKey) ([]byte, error)
}

// Disk keeps the state; *gate.Client has it.
type Disk interface {
	LogonState(context.Context) ([]byte, error)
	SaveLogonState(context.Context, []byte) error
}

// store is the state in memory and on the disk.
type store struct {
	disk Disk

	mu    sync.Mutex
	state State
}

func (s *store) load(ctx context.Context) error {
	data, err := s.disk.LogonState(ctx)
	if err != nil {
		return err
	}
	var state State
	if data != nil {
		if len(data) > maxState {
			return fmt.Errorf("logon state of %d bytes, at most %d", len(data), maxState)
		}
		if err := json.Unmarshal(data, &state); err != nil {
			return fmt.Errorf("logon state: %w", err)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.state = state
	return nil
}

// get returns a copy, whose slices and maps nobody changes.
func (s *store) get() State {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state
}

// change changes the state on the disk and then in memory.
func (s *store) change(ctx context.Context, do func(*State)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	next := s.state
	do(&next)
	data, err := json.Marshal(next)
	if err != nil {
		return err
	}
	if len(data) > maxState {
		return fmt.Errorf("logon state of %d bytes, at most %d; delete a finger", len(data), maxState)
	}
	if err := s.disk.SaveLogonState(ctx, data); err != nil {
		return err
	}
	s.state = next
	return nil
}

// saveTimeout bounds keeping the PIN's counter: a card answers within it or
// says that its memory failed.
const saveTimeout = 20 * time.Second

// LoadPIN and SavePIN make the store a piv.Store.
func (s *store) LoadPIN() (piv.PINState, error) { return s.get().PIN, nil }

func (s *store) SavePIN(p piv.PINState) error {
	ctx, cancel := context.WithTimeout(context.Background(), saveTimeout)
	defer cancel()
	return s.change(ctx, func(st *State) { st.PIN = p })
}

// public is the public key of the state's key.
func (st State) public() (crypto.PublicKey, error) {
	if st.Key == nil {
		return nil, errors.New("no key")
	}
	return x509.ParsePKIXPublicKey(st.Key.Public)
}

// profile is the card of the state. A card without a certificate has no key for
// its reader.
func (st State) profile(agency string, now time.Time) (piv.Profile, error) {
	p := piv.Profile{GUID: st.GUID, Expires: now.AddDate(5, 0, 0), Name: st.Name, Agency: agency, Keys: map[piv.Slot]piv.Key{}}
	if len(st.Chain) == 0 {
		return p, nil
	}
	public, err := st.public()
	if err != nil {
		return p, err
	}
	leaf, err := x509.ParseCertificate(st.Chain[0])
	if err != nil {
		return p, err
	}
	p.Expires = leaf.NotAfter
	p.Keys[piv.Authentication] = piv.Key{Public: public, Certificate: st.Chain[0]}
	return p, nil
}
