// Package archive keeps reports for good, or as long as an organisation wants:
// it only ever appends, and an entry is on disk before Append returns. Entries
// that come at the same time share one write and one sync. What many entries
// have in common, such as event logs and policies, is written once, by its
// digest.
//
// Entries and parts are two rows of segments, files of some 64 MiB that are
// removed as a whole, the oldest first. When a segment is full, an index of it
// is written beside it. An entry refers only to parts of the newest quarter of
// what is kept: an older part is written again, so the oldest segments of
// parts become free with the oldest ones of entries.
package archive

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"sekisho/attest"
)

// Limits of an archive.
const (
	segmentSize = 64 << 20       // bytes from which on a new segment begins
	segmentTime = 24 * time.Hour // and the time
	maxRecord   = 8 << 20        // bytes of one record
	maxBatch    = 256            // entries of one write
	minPart     = 512            // bytes from which on a part is written once

	idSize = 16
)

// ID names an entry.
type ID [idSize]byte

// Entry is what is appended.
type Entry struct {
	ID     ID
	Device attest.Digest
	Time   time.Time
	Data   []byte
	Common []Part // parts of Data that other entries may have too
}

// Part is what entries may have in common, by its SHA-256. That is the
// caller's word: an event log's is known to whoever has judged it.
type Part struct {
	Digest attest.Digest
	Data   []byte
}

// NewPart is a part whose digest is not known yet.
func NewPart(data []byte) Part { return Part{sha256.Sum256(data), data} }

// Retention bounds an archive; zero: no bound.
type Retention struct {
	Bytes int64
	Age   time.Duration
}

// ErrNotFound says that the archive has no such entry, or no longer.
var ErrNotFound = errors.New("no such entry in the archive")

// errClosed says that the archive was closed, or failed before.
var errClosed = errors.New("archive is closed")

// Archive is an open archive. It is safe for concurrent use.
type Archive struct {
	dir   *os.Root
	lock  *os.File
	keep  Retention
	now   func() time.Time
	room  func() error // fails when the disk is nearly full
	queue chan *request
	stop  chan struct{}
	wg    sync.WaitGroup

	mu      sync.RWMutex
	entries row
	parts   row
	known   map[attest.Digest]place // parts that new entries may refer to
	broken  error                   // why nothing can be appended any more
	unseen  uint64                  // segments of entries from this one on stay, see Keep
}

// place is where a part is.
type place struct {
	segment uint64
	offset  int64
}

type request struct {
	Entry
	digest attest.Digest // SHA-256 of Data
	done   chan error
}

// Open opens or creates the archive in a directory, which no other process may
// have open. room is asked before each write.
func Open(dir string, keep Retention, now func() time.Time, room func() error) (*Archive, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("archive: %w", err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("archive: %w", err)
	}
	a := &Archive{dir: root, keep: keep, now: now, room: room, queue: make(chan *request), stop: make(chan struct{}), unseen: nobody}
	if err := a.open(); err != nil {
		return nil, errors.Join(fmt.Errorf("archive %s: %w", dir, err), a.close())
	}
	a.wg.Go(a.write)
	return a, nil
}

func (a *Archive) open() (err error) {
	if a.lock, err = a.dir.OpenFile("lock", os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return err
	}
	if err := unix.Flock(int(a.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("in use by another process: %w", err)
	}
	a.known = make(map[attest.Digest]place)
	if a.parts, err = openRow(a.dir, "parts", sha256.Size, a.now()); err != nil {
		return err
	}
	if a.entries, err = openRow(a.dir, "entries", idSize, a.now()); err != nil {
		return err
	}
	for _, s := range a.parts.all() {
		if err := s.each(func(key []byte, offset int64) { a.known[attest.Digest(key)] = place{s.number, offset} }); err != nil {
			return err
		}
	}
	a.forget()
	return nil
}

// Close waits for the write under way and closes the archive.
func (a *Archive) Close() error {
	close(a.stop)
	a.wg.Wait()
	return a.close()
}

func (a *Archive) close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.broken = errClosed
	var errs []error
	for _, s := range append(a.entries.all(), a.parts.all()...) {
		errs = append(errs, s.Close())
	}
	a.entries, a.parts = row{}, row{}
	if a.lock != nil {
		errs = append(errs, a.lock.Close())
	}
	return errors.Join(append(errs, a.dir.Close())...)
}

// Append appends an entry. A nil error proves that it is on disk. After an
// error it is not in the archive, as far as one can know of a disk that fails.
func (a *Archive) Append(ctx context.Context, e Entry) error {
	if len(e.Data) > maxRecord/2 {
		return fmt.Errorf("archive: entry of %d bytes, at most %d", len(e.Data), maxRecord/2)
	}
	r := &request{e, sha256.Sum256(e.Data), make(chan error, 1)}
	select {
	case a.queue <- r:
		return <-r.done // one write, which nothing else holds up
	case <-a.stop:
		return errClosed
	case <-ctx.Done():
		return fmt.Errorf("archive: %w", context.Cause(ctx))
	}
}

// write writes what has gathered while the last write was under way.
func (a *Archive) write() {
	for {
		var batch []*request
		select {
		case r := <-a.queue:
			batch = append(batch, r)
		case <-a.stop:
			return
		}
	gather:
		for len(batch) < maxBatch {
			select {
			case r := <-a.queue:
				batch = append(batch, r)
			default:
				break gather
			}
		}
		err := a.writeAll(batch)
		for _, r := range batch {
			r.done <- err
		}
	}
}

func (a *Archive) writeAll(batch []*request) error {
	a.mu.RLock()
	w, err := &writer{a: a, entries: a.entries.active.writer(), parts: a.parts.active.writer()}, a.broken
	a.mu.RUnlock()
	if err != nil {
		return fmt.Errorf("archive: nothing is stored since an earlier failure: %w", err)
	}
	if err := a.room(); err != nil {
		return fmt.Errorf("archive: %w", err)
	}
	for _, r := range batch {
		if err := w.add(r.Entry, r.digest); err != nil {
			return fmt.Errorf("archive: %w", err)
		}
	}
	// Parts first: no entry refers to what is not there.
	if err = w.parts.write(); err == nil {
		err = w.entries.write()
	}
	if err != nil {
		// After a failed sync nobody knows what is on disk: only a start
		// looks again.
		if errors.Is(err, errUnknown) {
			a.mu.Lock()
			a.broken = err
			a.mu.Unlock()
		}
		return fmt.Errorf("archive: %w", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for key, offset := range w.parts.rows {
		a.known[attest.Digest([]byte(key))] = place{a.parts.active.number, offset}
	}
	w.parts.learn()
	w.entries.learn()
	if err := a.rotate(); err != nil {
		a.broken = err
		return fmt.Errorf("archive: %w", err)
	}
	return nil
}

// rotate ends segments that are full and removes what retention no longer
// covers. a.mu is held.
func (a *Archive) rotate() error {
	now, turned := a.now(), false
	for _, r := range []*row{&a.parts, &a.entries} {
		if s := r.active; s.size < segmentSize && now.Sub(s.since) < segmentTime || s.size == 0 {
			continue
		}
		if err := r.turn(a.dir, now); err != nil {
			return err
		}
		turned = true
	}
	if !turned {
		return nil
	}
	a.forget()
	return a.trim()
}

// forget forgets parts outside the newest quarter. a.mu is held, or nobody
// else is there yet.
func (a *Archive) forget() {
	oldest, size := a.parts.active.number, a.parts.active.size
	for _, s := range slices.Backward(a.parts.full) {
		size += s.size
		if a.keep.Bytes > 0 && size > a.keep.Bytes/4 || a.keep.Age > 0 && a.now().Sub(s.until) > a.keep.Age/4 {
			break
		}
		oldest = s.number
	}
	for d, p := range a.known {
		if p.segment < oldest {
			delete(a.known, d)
		}
	}
}

// trim removes the oldest segments that retention no longer covers. a.mu is
// held.
func (a *Archive) trim() error {
	for {
		if err := a.trimParts(); err != nil {
			return err
		}
		if len(a.entries.full) == 0 || a.entries.full[0].number >= a.unseen {
			return nil
		}
		old := a.keep.Age > 0 && a.now().Sub(a.entries.full[0].until) > a.keep.Age
		if large := a.keep.Bytes > 0 && a.entries.size()+a.parts.size() > a.keep.Bytes; !old && !large {
			return nil
		}
		if err := a.entries.drop(a.dir); err != nil {
			return err
		}
	}
}

// trimParts removes segments of parts that nothing refers to or may refer to.
func (a *Archive) trimParts() error {
	needed := a.parts.active.number
	for _, s := range a.entries.all() {
		needed = min(needed, s.refers)
	}
	for _, p := range a.known {
		needed = min(needed, p.segment)
	}
	for len(a.parts.full) > 0 && a.parts.full[0].number < needed {
		if err := a.parts.drop(a.dir); err != nil {
			return err
		}
	}
	return nil
}

// Get returns the data of an entry.
func (a *Archive) Get(id ID) ([]byte, error) {
	a.mu.RLock()
	defer a.mu.RUnlock()
	for _, s := range slices.Backward(a.entries.all()) {
		offset, ok, err := s.find(id[:])
		if err != nil {
			return nil, fmt.Errorf("archive: %w", err)
		}
		if ok {
			data, err := a.read(s, offset)
			if err != nil {
				return nil, fmt.Errorf("archive: %w", err)
			}
			return data, nil
		}
	}
	if a.broken == errClosed {
		return nil, errClosed
	}
	return nil, ErrNotFound
}

// read returns the data of the entry at offset of s.
func (a *Archive) read(s *segment, offset int64) ([]byte, error) {
	body, err := s.record(offset)
	if err != nil {
		return nil, err
	}
	e, err := decode(body)
	if err != nil {
		return nil, err
	}
	var data []byte
	for _, p := range e.Parts {
		if p.Bytes == nil {
			from := a.parts.segment(p.Segment)
			if from == nil {
				return nil, fmt.Errorf("%w: part of segment %d", errDamaged, p.Segment)
			}
			common, err := from.record(p.Offset)
			if err != nil {
				return nil, err
			}
			p.Bytes = common[1:]
		}
		if data = append(data, p.Bytes...); len(data) > maxRecord {
			return nil, fmt.Errorf("%w: over %d bytes", errDamaged, maxRecord)
		}
	}
	return data, nil
}

// Size is how many bytes of entries and parts the archive has on disk.
func (a *Archive) Size() int64 {
	a.mu.RLock()
	defer a.mu.RUnlock()
	return a.entries.size() + a.parts.size()
}

func syncDir(dir *os.Root) error {
	d, err := dir.Open(".")
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
