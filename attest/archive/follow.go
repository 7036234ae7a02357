package archive

import (
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"time"

	"sekisho/attest"
)

// Position is where an entry is. Entries stand in the order in which they were
// appended; the zero value is before all of them.
type Position struct {
	Segment uint64
	Offset  int64 // bytes within it
}

// Before reports whether p comes before q.
func (p Position) Before(q Position) bool {
	return p.Segment < q.Segment || p.Segment == q.Segment && p.Offset < q.Offset
}

// Stored is an entry as it was appended.
type Stored struct {
	ID     ID
	Device attest.Digest
	Time   time.Time     // to the millisecond
	Digest attest.Digest // SHA-256 of its data, which Get returns
	At     Position
	Next   Position // of the entry after it
}

// Next returns the first entry at or after a position, for those who follow the
// archive in its order. It fails with io.EOF when there is none yet. What it
// returns is on disk.
func (a *Archive) Next(at Position) (Stored, error) {
	a.mu.RLock()
	defer a.mu.RUnlock()
	if a.broken == errClosed {
		return Stored{}, errClosed
	}
	for _, s := range a.entries.all() {
		if s.number < at.Segment {
			continue
		}
		if s.number > at.Segment {
			at = Position{Segment: s.number}
		}
		if at.Offset < s.size {
			return a.stored(s, at)
		}
	}
	return Stored{}, io.EOF
}

// Find returns where an entry is.
func (a *Archive) Find(id ID) (Position, error) {
	a.mu.RLock()
	defer a.mu.RUnlock()
	for _, s := range a.entries.all() {
		offset, ok, err := s.find(id[:])
		if err != nil {
			return Position{}, fmt.Errorf("archive: %w", err)
		}
		if ok {
			return Position{s.number, offset}, nil
		}
	}
	return Position{}, ErrNotFound
}

// At returns the entry that begins at exactly a position, or ErrNotFound.
func (a *Archive) At(at Position) (Stored, error) {
	a.mu.RLock()
	defer a.mu.RUnlock()
	s := a.entries.segment(at.Segment)
	if s == nil || at.Offset < 0 || at.Offset >= s.size {
		return Stored{}, ErrNotFound
	}
	e, err := a.stored(s, at)
	if errors.Is(err, errDamaged) || errors.Is(err, io.EOF) { // no record begins here
		return Stored{}, ErrNotFound
	}
	return e, err
}

// stored reads an entry. a.mu is held.
func (a *Archive) stored(s *segment, at Position) (Stored, error) {
	body, err := s.record(at.Offset)
	if err != nil {
		return Stored{}, fmt.Errorf("archive: %w", err)
	}
	e, err := decode(body)
	if err != nil {
		return Stored{}, fmt.Errorf("archive: %w", err)
	}
	next := Position{at.Segment, at.Offset + headSize + int64(len(body))}
	return Stored{ID(e.ID), attest.Digest(e.Device), time.UnixMilli(e.Time), attest.Digest(e.Digest), at, next}, nil
}

// Keep keeps entries from a position on, whatever the retention says, until it
// is called again: who follows the archive has not seen them yet.
func (a *Archive) Keep(from Position) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.unseen = from.Segment
}

// nobody is unseen when nobody follows.
const nobody = math.MaxUint64

// Last returns the data of the newest entries, at most n of them, oldest first.
func (a *Archive) Last(n int) ([][]byte, error) {
	a.mu.RLock()
	defer a.mu.RUnlock()
	var list [][]byte
	for _, s := range slices.Backward(a.entries.all()) {
		var offsets []int64
		if err := s.each(func(_ []byte, offset int64) { offsets = append(offsets, offset) }); err != nil {
			return nil, fmt.Errorf("archive: %w", err)
		}
		slices.Sort(offsets)
		for _, offset := range slices.Backward(offsets) {
			if len(list) == n {
				break
			}
			data, err := a.read(s, offset)
			if err != nil {
				return nil, fmt.Errorf("archive: %w", err)
			}
			list = append(list, data)
		}
		if len(list) == n {
			break
		}
	}
	slices.Reverse(list)
	return list, nil
}
