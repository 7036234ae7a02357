package update

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"sekisho/attest"
)

// Device is a slot's partition.
type Device interface {
	io.ReaderAt
	io.WriterAt
	Sync() error
	Close() error
}

// Config is what Slots are made of. All fields are needed.
type Config struct {
	Running Slot // that this boot was started from
	// Attempts is how often the firmware tried to start something in this boot.
	Attempts int
	Places   map[Slot]Place
	Block    int64 // bytes of a block of the disk
	Open     func(Slot) (Device, error)
	Vars     Variables
	Keep     Keeper
	Now      func() time.Time
}

// Slots are the two places for the host domain's image, and the firmware's
// entries for them. The good slot is the first of BootOrder; an update goes to
// the other one, which BootNext has the firmware start once. So whatever
// happens, power cuts included, the firmware starts one of the two.
//
//	write   record: writing → slot without file system → data → check → file system → record: staged
//	arm     record: armed → BootNext
//	trial   record: trying → proves good?  yes: BootOrder → record: good → rollback counter
//	                                        no: record: failed → restart, to the good slot
//
// Each arrow is durable before the next begins.
type Slots struct {
	c  Config
	mu sync.Mutex // of all below

	record  Record
	written int64 // of an update under way, in bytes
	size    int64
}

// Status is how the slots stand.
type Status struct {
	Running Slot     `json:"running"` // empty where there are no two slots
	Good    Slot     `json:"good"`
	Trial   *Trial   `json:"trial,omitempty"`
	Written int64    `json:"written,omitempty"` // of an image that is being written, in bytes
	Size    int64    `json:"size,omitempty"`
	Failed  *Failure `json:"failed,omitempty"`
	Detail  string   `json:"detail,omitempty"` // why there are no two slots
}

// Begin takes note of the slot that runs and says what follows; after an error
// to keep the record, nothing.
func Begin(c Config) (*Slots, Action, error) {
	s := &Slots{c: c}
	old, err := load(c.Keep)
	if err != nil {
		return s, Nothing, err
	}
	next, action := old.begin(c.Running, c.Attempts, c.Now())
	s.record = old
	if err := s.change(next); err != nil {
		return s, Nothing, err
	}
	if err := setOrder(c.Vars, c.Places, next.Good); err != nil {
		return s, action, err
	}
	if next.Trial == nil {
		return s, action, clearNext(c.Vars)
	}
	if next.Trial.Stage == Staged {
		return s, action, s.arm()
	}
	return s, action, nil
}

// Status returns how the slots stand.
func (s *Slots) Status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := Status{Running: s.c.Running, Good: s.record.Good, Written: s.written, Size: s.size}
	if s.record.Trial != nil {
		t := *s.record.Trial
		st.Trial = &t
	}
	if s.record.Failed != nil {
		f := *s.record.Failed
		st.Failed = &f
	}
	return st
}

// Errors of Stage.
var (
	ErrTrying = errors.New("this boot has not proved good yet; an update would take the only slot that has")
	ErrBusy   = errors.New("another update is being written")
)

// change writes the record and then takes it for true.
func (s *Slots) change(r Record) error {
	if err := save(s.c.Keep, r); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.record = r
	return nil
}

// Stage writes an image of size bytes to the slot that does not run, and has
// the firmware start it once at the next boot. check judges the signed policies
// in the image and its SHA-256; before it allows them nothing there can be
// started.
func (s *Slots) Stage(ctx context.Context, image io.Reader, size int64, check func(release []byte, sum attest.Digest) (*Release, error)) (err error) {
	s.mu.Lock()
	record := s.record
	busy := s.size != 0
	if !busy {
		s.written, s.size = 0, size
	}
	s.mu.Unlock()
	if busy {
		return ErrBusy
	}
	defer func() {
		s.mu.Lock()
		s.written, s.size = 0, 0
		s.mu.Unlock()
	}()
	if record.Good == None || record.Good != s.c.Running {
		return ErrTrying
	}
	slot := s.c.Running.other()
	place, ok := s.c.Places[slot]
	if !ok || size <= 0 || size > int64(place.Size)*s.c.Block {
		return fmt.Errorf("update: %d bytes, slot %s has %d", size, slot, int64(place.Size)*s.c.Block)
	}
	if err := clearNext(s.c.Vars); err != nil {
		return err
	}
	record.Trial = &Trial{Slot: slot, Stage: Writing}
	if err := s.change(record); err != nil {
		return err
	}
	d, err := s.c.Open(slot)
	if err != nil {
		return fmt.Errorf("update: slot %s: %w", slot, err)
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	sum := sha256.New()
	var release *Release
	err = WriteESP(d, int64(place.Start)*s.c.Block, int64(place.Size)*s.c.Block, Cluster, &counted{ctx, io.TeeReader(image, sum), s}, size, func(boot io.ReaderAt) error {
		// What the disk gives back counts, not what was sent to it.
		back := sha256.New()
		if _, err := io.Copy(back, io.NewSectionReader(boot, 0, size)); err != nil {
			return fmt.Errorf("read back: %w", err)
		}
		if [32]byte(back.Sum(nil)) != [32]byte(sum.Sum(nil)) {
			return errors.New("the disk gives back something else than was written")
		}
		policy, signed, err := section(boot, ".pcrsig", maxRelease)
		if errors.Is(err, errNoSection) || err == nil && !signed {
			return errors.New("this image is not a signed release")
		}
		if err != nil {
			return err
		}
		release, err = check(policy, attest.Digest(sum.Sum(nil)))
		return err
	})
	if err != nil {
		record.Trial = nil
		return errors.Join(fmt.Errorf("update: %w", err), s.change(record))
	}
	record.Trial = &Trial{slot, Staged, release.Version, release.Epoch, hex.EncodeToString(sum.Sum(nil))}
	if err := s.change(record); err != nil {
		return err
	}
	return s.arm()
}

// counted is the reader of an update that its context ends.
type counted struct {
	ctx context.Context
	r   io.Reader
	s   *Slots
}

func (c *counted) Read(b []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := c.r.Read(b)
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	c.s.written += int64(n)
	return n, err
}

// arm has the firmware start the staged slot at the next boot.
func (s *Slots) arm() error {
	r := s.record
	t := *r.Trial
	t.Stage = Armed
	r.Trial = &t
	if err := s.change(r); err != nil {
		return err
	}
	return setNext(s.c.Vars, s.c.Places, t.Slot)
}

// MarkGood makes the running slot the one that the firmware starts. It may be
// called again after an error.
func (s *Slots) MarkGood() error {
	if err := setOrder(s.c.Vars, s.c.Places, s.c.Running); err != nil {
		return err
	}
	return s.change(Record{Good: s.c.Running})
}

// GiveUp notes that the running trial did not prove good; after it the machine
// is to be restarted, and the firmware starts the good slot.
func (s *Slots) GiveUp(reason string) error {
	s.mu.Lock()
	r := s.record
	s.mu.Unlock()
	if t := r.Trial; t != nil {
		r.Failed = r.failure(*t, reason, s.c.Now())
	}
	r.Trial, r.Returned = nil, true
	return errors.Join(s.change(r), setOrder(s.c.Vars, s.c.Places, r.Good))
}
