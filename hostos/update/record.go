package update

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"sekisho/hostos/store"
)

// Slot is a place on the disk for an image of the host domain.
type Slot string

const (
	None  Slot = ""
	SlotA Slot = "a"
	SlotB Slot = "b"
)

// Both lists the slots in the order of the disk.
func Both() []Slot { return []Slot{SlotA, SlotB} }

// Label is the name of the slot's partition.
func (s Slot) Label() string { return "esp-" + string(s) }

func (s Slot) other() Slot {
	switch s {
	case SlotA:
		return SlotB
	case SlotB:
		return SlotA
	}
	return None
}

// Stage is how far an update has come.
type Stage string

const (
	Writing Stage = "writing" // the slot is being written
	Staged  Stage = "staged"  // the slot is whole and checked
	Armed   Stage = "armed"   // the firmware was told to start it once
	Trying  Stage = "trying"  // its init has started
)

// Trial is an update that has not proved good yet.
type Trial struct {
	Slot    Slot   `json:"slot"`
	Stage   Stage  `json:"stage"`
	Version string `json:"version,omitempty"`
	Epoch   uint64 `json:"epoch,omitempty"`
	SHA256  string `json:"sha256,omitempty"` // of the image
}

// Failure is the last update that did not prove good.
type Failure struct {
	Version string    `json:"version"`
	SHA256  string    `json:"sha256,omitempty"` // of the image
	Reason  string    `json:"reason"`           // one of the Failed codes
	At      time.Time `json:"at"`
	Tries   int       `json:"tries,omitempty"` // of this image that failed
}

// Reasons of a Failure.
const (
	FailedToStart = "not-started" // the firmware or the kernel did not get to init, or the power went before
	FailedRestart = "restarted"   // the machine restarted before the image proved good
	FailedRefused = "refused"     // attestation refused it, or the disk's key
	FailedTime    = "timeout"     // an uplink was there and no tunnel came
	FailedSlot    = "slot-broken" // the firmware does not start what was the good slot
)

// Record is what init remembers of the slots over boots. Nothing in it is
// believed: the firmware checks an image's signature, the TPM its release.
type Record struct {
	Good Slot `json:"good"` // that the firmware starts; None before the first boot
	// Returned is set while init has restarted once to get back to Good.
	Returned bool     `json:"returned,omitempty"`
	Trial    *Trial   `json:"trial,omitempty"`
	Failed   *Failure `json:"failed,omitempty"`
}

// Keeper keeps a record over power cuts: it holds the old one or the new one.
// store.Record is one.
type Keeper interface {
	Load() ([]byte, error)
	Store([]byte) error
}

// load reads the record. One that is absent or that cannot be read is the
// empty one: what runs now is then taken for good.
func load(k Keeper) (r Record, err error) {
	data, err := k.Load()
	if errors.Is(err, store.ErrNone) {
		return r, nil
	}
	if err != nil {
		return r, err
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(&r); err != nil || !r.valid() {
		return Record{}, nil
	}
	return r, nil
}

func (r Record) valid() bool {
	slot := func(s Slot) bool { return s == SlotA || s == SlotB }
	return slot(r.Good) && (r.Trial == nil || slot(r.Trial.Slot) && r.Trial.Slot != r.Good)
}

func save(k Keeper, r Record) error {
	data, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("slots: %w", err)
	}
	return k.Store(data)
}

// Action is what follows from the slot that runs.
type Action int

const (
	Nothing Action = iota // the good slot runs
	Watch                 // a slot runs that has to prove good
	Restart               // the next boot will be right: another slot, or its first attempt
)

// failure is that of a trial that failed now.
func (r Record) failure(t Trial, reason string, now time.Time) *Failure {
	f := &Failure{Version: t.Version, SHA256: t.SHA256, Reason: reason, At: now, Tries: 1}
	if r.Failed != nil && r.Failed.SHA256 == f.SHA256 {
		f.Tries += r.Failed.Tries
	}
	return f
}

// begin decides what a boot of running means, and the record after it.
// attempts is how often the firmware tried to start something in this boot:
// with more than once PCR 4 is not what was predicted, and only another start
// helps. No restart follows from the record that a restart has left.
func (r Record) begin(running Slot, attempts int, now time.Time) (Record, Action) {
	switch {
	case running == None:
		return r, Nothing
	case r.Good == None:
		return Record{Good: running}, Nothing
	case running == r.Good:
		r.Returned = false
		t := r.Trial
		if t == nil || t.Stage == Staged { // the power went before the firmware was told
			return r, Nothing
		}
		r.Trial = nil
		switch t.Stage {
		case Armed:
			r.Failed = r.failure(*t, FailedToStart, now)
			if attempts > 1 {
				return r, Restart
			}
		case Trying:
			r.Failed = r.failure(*t, FailedRestart, now)
		}
		return r, Nothing
	case r.Trial != nil && r.Trial.Stage != Writing: // in running, the only other slot
		t := *r.Trial
		t.Stage = Trying
		r.Trial = &t
		return r, Watch
	case !r.Returned: // the firmware lost its variables, or somebody chose
		r.Returned, r.Trial = true, nil
		return r, Restart
	}
	// The firmware starts nothing else.
	r = Record{Good: running, Failed: &Failure{Reason: FailedSlot, At: now}}
	if attempts > 1 {
		return r, Restart
	}
	return r, Nothing
}
