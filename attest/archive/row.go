package archive

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/fxamacker/cbor/v2"
	"golang.org/x/sys/unix"

	"sekisho/attest"
)

// row is all segments of one kind: full ones, oldest first, and the one that
// is written.
type row struct {
	kind    string
	keySize int
	full    []*segment
	active  *segment
}

func segmentName(kind string, n uint64) string { return fmt.Sprintf("%s-%016x", kind, n) }

// openRow opens the segments of a kind, and makes one if there is none that is
// not full.
func openRow(dir *os.Root, kind string, keySize int, now time.Time) (r row, err error) {
	r.kind, r.keySize = kind, keySize
	d, err := dir.Open(".")
	if err != nil {
		return r, err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return r, err
	}
	var numbers []uint64
	for _, name := range names {
		var n uint64
		if _, err := fmt.Sscanf(name, kind+"-%x", &n); err == nil && name == segmentName(kind, n)+logSuffix {
			numbers = append(numbers, n)
		}
	}
	slices.Sort(numbers)
	for i, n := range numbers {
		s, err := openSegment(dir, segmentName(kind, n), n, keySize, i == len(numbers)-1)
		if err != nil {
			return r, err
		}
		if s.index == nil {
			r.active = s
		} else {
			r.full = append(r.full, s)
		}
	}
	if r.active == nil {
		err = r.begin(dir, now)
	}
	return r, err
}

// begin makes the segment after the newest one.
func (r *row) begin(dir *os.Root, now time.Time) (err error) {
	var n uint64
	if len(r.full) > 0 {
		n = r.full[len(r.full)-1].number + 1
	}
	r.active, err = newSegment(dir, segmentName(r.kind, n), n, r.keySize, now)
	return err
}

// turn ends the active segment and begins the next.
func (r *row) turn(dir *os.Root, now time.Time) error {
	if err := r.active.finish(dir); err != nil {
		return err
	}
	r.full = append(r.full, r.active)
	return r.begin(dir, now)
}

// drop removes the oldest full segment.
func (r *row) drop(dir *os.Root) error {
	s := r.full[0]
	r.full = slices.Delete(r.full, 0, 1)
	return s.remove(dir)
}

// all is all segments, oldest first.
func (r *row) all() []*segment {
	if r.active == nil {
		return slices.Clone(r.full)
	}
	return append(slices.Clone(r.full), r.active)
}

func (r *row) segment(n uint64) *segment {
	for _, s := range r.all() {
		if s.number == n {
			return s
		}
	}
	return nil
}

func (r *row) size() (n int64) {
	for _, s := range r.all() {
		n += s.size
	}
	return n
}

// writer gathers the entries of one write and the parts that are new.
type writer struct {
	a              *Archive
	entries, parts *tail
}

// tail gathers records for the end of a segment.
type tail struct {
	s      *segment
	buf    bytes.Buffer
	rows   map[string]int64
	until  time.Time
	refers uint64
}

func (s *segment) writer() *tail {
	return &tail{s: s, rows: make(map[string]int64), until: s.until, refers: s.refers}
}

// put adds a record and returns its offset.
func (t *tail) put(kind byte, key, body []byte) (int64, error) {
	if len(body) >= maxRecord {
		return 0, fmt.Errorf("record of %d bytes, at most %d", len(body), maxRecord)
	}
	offset := t.s.size + int64(t.buf.Len())
	var head [headSize + 1]byte
	head[headSize] = kind
	binary.BigEndian.PutUint32(head[:], uint32(len(body)+1))
	binary.BigEndian.PutUint32(head[4:], checksum(kind, body))
	t.buf.Write(head[:])
	t.buf.Write(body)
	t.rows[string(key)] = offset
	return offset, nil
}

// common returns where a part is; a new one is written.
func (w *writer) common(p Part, at time.Time) (place, error) {
	if known, ok := w.a.known[p.Digest]; ok {
		return known, nil
	}
	if offset, ok := w.parts.rows[string(p.Digest[:])]; ok {
		return place{w.parts.s.number, offset}, nil
	}
	w.parts.until = at
	offset, err := w.parts.put(kindPart, p.Digest[:], p.Data)
	return place{w.parts.s.number, offset}, err
}

// index is bytes.Index for a long part, which it finds by its head: for long
// ones, bytes.Index computes a sum over all of it.
func index(data, part []byte) int {
	for from := 0; ; {
		i := bytes.Index(data[from:], part[:32])
		switch {
		case i < 0:
			return -1
		case bytes.HasPrefix(data[from+i:], part):
			return from + i
		}
		from += i + 1
	}
}

// add adds an entry. The archive's own writer is the only one that changes
// what is known, so it may read that.
func (w *writer) add(e Entry, digest attest.Digest) error {
	x := entry{ID: e.ID[:], Device: e.Device[:], Time: e.Time.UnixMilli(), Digest: digest[:]}
	rest := e.Data
	for len(rest) > 0 { // the parts in their order
		at, which := -1, Part{}
		for _, c := range e.Common {
			if len(c.Data) < minPart {
				continue
			}
			if i := index(rest, c.Data); i >= 0 && (at < 0 || i < at) {
				at, which = i, c
			}
		}
		if at < 0 {
			x.Parts = append(x.Parts, part{Bytes: rest})
			break
		}
		if at > 0 {
			x.Parts = append(x.Parts, part{Bytes: rest[:at]})
		}
		p, err := w.common(which, e.Time)
		if err != nil {
			return err
		}
		x.Parts = append(x.Parts, part{Segment: p.segment, Offset: p.offset})
		w.entries.refers = min(w.entries.refers, p.segment)
		rest = rest[at+len(which.Data):]
	}
	body, err := cbor.Marshal(x)
	if err != nil {
		return err
	}
	w.entries.until = e.Time
	_, err = w.entries.put(kindEntry, e.ID[:], body)
	return err
}

// write writes and syncs. After an error the segment is what it was, or the
// error is errUnknown.
func (t *tail) write() error {
	if t.buf.Len() == 0 {
		return nil
	}
	if _, err := t.s.file.WriteAt(t.buf.Bytes(), t.s.size); err != nil {
		if e := t.s.file.Truncate(t.s.size); e != nil {
			return errors.Join(err, e, errUnknown)
		}
		return err
	}
	if err := unix.Fdatasync(int(t.s.file.Fd())); err != nil {
		return errors.Join(fmt.Errorf("sync: %w", err), errUnknown)
	}
	return nil
}

// learn takes in what was written.
func (t *tail) learn() {
	if t.s.size == 0 && t.buf.Len() > 0 {
		t.s.since = t.until
	}
	for key, offset := range t.rows {
		t.s.byKey[key] = offset
	}
	t.s.size += int64(t.buf.Len())
	t.s.until, t.s.refers = t.until, min(t.s.refers, t.refers)
}
