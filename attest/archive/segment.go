package archive

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"math"
	"os"
	"slices"
	"sort"
	"time"

	"github.com/fxamacker/cbor/v2"

	"sekisho/attest"
)

// A segment is a file of records: length of the body (4 bytes, big endian) ‖
// CRC-32C of the body (4) ‖ body. The body is one byte for its kind and the
// rest: kindEntry: an entry in CBOR; kindPart: bytes that entries refer to. Its
// index is a head of the time of its first and newest record in ms and the
// oldest segment of parts that its entries refer to (8 bytes each, big
// endian), then, sorted, the key of each record (an id or the SHA-256 of a
// part) and its offset (8).
const (
	headSize  = 8
	kindEntry = 'E'
	kindPart  = 'P'

	logSuffix, indexSuffix = ".log", ".idx"

	indexHead  = 24
	offsetSize = 8
)

// entry is the body of an entry's record. Data is its parts, one after the
// other.
type entry struct {
	_      struct{} `cbor:",toarray"`
	ID     []byte
	Device []byte
	Time   int64  // ms since 1970
	Digest []byte // SHA-256 of the data, for who follows and needs no more
	Parts  []part
}

// part is either bytes or those of a record in a segment of parts.
type part struct {
	_       struct{} `cbor:",toarray"`
	Bytes   []byte
	Segment uint64
	Offset  int64
}

// errUnknown says that nobody knows what is on disk.
var errUnknown = errors.New("the disk failed; restart the verifier when it is repaired")

// errDamaged says that a record is not whole.
var errDamaged = errors.New("record is damaged")

func checksum(kind byte, body []byte) uint32 {
	table := crc32.MakeTable(crc32.Castagnoli)
	return crc32.Update(crc32.Checksum([]byte{kind}, table), table, body)
}

type segment struct {
	name    string // of its files, without suffix
	number  uint64
	keySize int
	file    *os.File
	size    int64     // of whole records
	since   time.Time // of the first record
	until   time.Time // of the newest one
	refers  uint64    // oldest segment of parts that is referred to

	index *os.File // of a full one
	rows  int64    // in index

	byKey map[string]int64 // offsets, of the active one
}

func newSegment(dir *os.Root, name string, n uint64, keySize int, now time.Time) (*segment, error) {
	f, err := dir.OpenFile(name+logSuffix, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	s := &segment{name: name, number: n, keySize: keySize, file: f, since: now, until: now, refers: math.MaxUint64, byKey: make(map[string]int64)}
	return s, syncDir(dir)
}

// openSegment opens a segment. The newest one may have lost its end in a power
// cut, before anyone was told that it was written: it is cut there. One before
// it may lack its index.
func openSegment(dir *os.Root, name string, n uint64, keySize int, newest bool) (*segment, error) {
	f, err := dir.OpenFile(name+logSuffix, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	s := &segment{name: name, number: n, keySize: keySize, file: f, refers: math.MaxUint64}
	if err := s.open(dir, newest); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", name, err), s.Close())
	}
	return s, nil
}

func (s *segment) open(dir *os.Root, newest bool) error {
	info, err := s.file.Stat()
	if err != nil {
		return err
	}
	s.size, s.since, s.until = info.Size(), info.ModTime(), info.ModTime()
	f, err := dir.Open(s.name + indexSuffix)
	if err == nil {
		s.index = f
		return s.openIndex()
	}
	if !errors.Is(err, os.ErrNotExist) {
		return err
	}
	whole, err := s.scan()
	if err != nil {
		return err
	}
	if whole < s.size {
		if err := s.cut(dir, whole); err != nil {
			return err
		}
		s.size = whole
	}
	if newest {
		return nil
	}
	return s.finish(dir)
}

func (s *segment) openIndex() error {
	info, err := s.index.Stat()
	if err != nil {
		return err
	}
	var head [indexHead]byte
	if _, err := s.index.ReadAt(head[:], 0); err != nil {
		return fmt.Errorf("index: %w", err)
	}
	s.since = time.UnixMilli(int64(binary.BigEndian.Uint64(head[:])))
	s.until = time.UnixMilli(int64(binary.BigEndian.Uint64(head[8:])))
	s.refers = binary.BigEndian.Uint64(head[16:])
	s.rows = (info.Size() - indexHead) / int64(s.keySize+offsetSize)
	return nil
}

// cut removes what stands behind the whole records, and keeps it beside the
// segment: should it not be a torn write, someone may want to look.
func (s *segment) cut(dir *os.Root, whole int64) error {
	f, err := dir.OpenFile(s.name+".cut", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, io.NewSectionReader(s.file, whole, s.size-whole))
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return errors.Join(s.file.Truncate(whole), s.file.Sync())
}

// scan reads all records of a segment and returns where the whole ones end.
func (s *segment) scan() (offset int64, err error) {
	s.byKey = make(map[string]int64)
	for {
		body, err := s.record(offset)
		if err != nil {
			return offset, nil
		}
		switch body[0] {
		case kindPart:
			d := sha256.Sum256(body[1:])
			s.byKey[string(d[:])] = offset
		case kindEntry:
			e, err := decode(body)
			if err != nil {
				return offset, err
			}
			s.byKey[string(e.ID)] = offset
			s.until = time.UnixMilli(e.Time)
			if offset == 0 {
				s.since = s.until
			}
			for _, p := range e.Parts {
				if p.Bytes == nil {
					s.refers = min(s.refers, p.Segment)
				}
			}
		default:
			return offset, fmt.Errorf("record of kind %q at %d: written by a newer release?", body[0], offset)
		}
		offset += headSize + int64(len(body))
	}
}

// record returns the body of the record at offset.
func (s *segment) record(offset int64) ([]byte, error) {
	fail := func(err error) ([]byte, error) { return nil, fmt.Errorf("%s at %d: %w", s.name, offset, err) }
	var head [headSize]byte
	if _, err := s.file.ReadAt(head[:], offset); err != nil {
		return fail(err)
	}
	n := int64(binary.BigEndian.Uint32(head[:]))
	if n == 0 || n > maxRecord || offset+headSize+n > s.size {
		return fail(fmt.Errorf("%w: %d bytes", errDamaged, n))
	}
	body := make([]byte, n)
	if _, err := s.file.ReadAt(body, offset+headSize); err != nil {
		return fail(err)
	}
	if checksum(body[0], body[1:]) != binary.BigEndian.Uint32(head[4:]) {
		return fail(fmt.Errorf("%w: checksum", errDamaged))
	}
	return body, nil
}

func decode(body []byte) (e entry, err error) {
	if len(body) == 0 || body[0] != kindEntry {
		return e, errDamaged
	}
	if err := cbor.Unmarshal(body[1:], &e); err != nil {
		return e, fmt.Errorf("%w: %w", errDamaged, err)
	}
	if len(e.ID) != idSize || len(e.Device) != len(attest.Digest{}) || len(e.Digest) != len(attest.Digest{}) {
		return e, fmt.Errorf("%w: id of %d bytes, device of %d, digest of %d", errDamaged, len(e.ID), len(e.Device), len(e.Digest))
	}
	return e, nil
}

// find returns the offset of the record with that key.
func (s *segment) find(key []byte) (int64, bool, error) {
	if s.index == nil {
		offset, ok := s.byKey[string(key)]
		return offset, ok, nil
	}
	row := make([]byte, s.keySize+offsetSize)
	var failed error
	load := func(i int) []byte {
		if _, err := s.index.ReadAt(row, indexHead+int64(i)*int64(len(row))); err != nil {
			failed = err
		}
		return row[:s.keySize]
	}
	i := sort.Search(int(s.rows), func(i int) bool { return bytes.Compare(load(i), key) >= 0 })
	if failed != nil || i == int(s.rows) {
		return 0, false, failed
	}
	same := bytes.Equal(load(i), key)
	return int64(binary.BigEndian.Uint64(row[s.keySize:])), same, failed
}

// each calls f with all keys.
func (s *segment) each(f func(key []byte, offset int64)) error {
	if s.index == nil {
		for key, offset := range s.byKey {
			f([]byte(key), offset)
		}
		return nil
	}
	r := bufio.NewReader(io.NewSectionReader(s.index, indexHead, math.MaxInt64-indexHead))
	row := make([]byte, s.keySize+offsetSize)
	for range s.rows {
		if _, err := io.ReadFull(r, row); err != nil {
			return fmt.Errorf("%s: index: %w", s.name, err)
		}
		f(row[:s.keySize], int64(binary.BigEndian.Uint64(row[s.keySize:])))
	}
	return nil
}

// finish writes the index of a segment: from then on it is full.
func (s *segment) finish(dir *os.Root) error {
	data := binary.BigEndian.AppendUint64(nil, uint64(s.since.UnixMilli()))
	data = binary.BigEndian.AppendUint64(data, uint64(s.until.UnixMilli()))
	data = binary.BigEndian.AppendUint64(data, s.refers)
	for _, key := range slices.Sorted(maps.Keys(s.byKey)) {
		data = append(data, key...)
		data = binary.BigEndian.AppendUint64(data, uint64(s.byKey[key]))
	}
	name := s.name + indexSuffix
	f, err := dir.OpenFile(name+".new", os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Sync()); err == nil {
		err = dir.Rename(name+".new", name)
	}
	if err != nil {
		return errors.Join(err, f.Close())
	}
	s.index, s.rows, s.byKey = f, int64(len(s.byKey)), nil
	return syncDir(dir)
}

// remove removes the files of a segment. The index goes last: a segment
// without one would be read again.
func (s *segment) remove(dir *os.Root) error {
	return errors.Join(s.Close(), dir.Remove(s.name+logSuffix), dir.Remove(s.name+indexSuffix))
}

// Close closes the files of a segment.
func (s *segment) Close() error {
	var err error
	if s.index != nil {
		err = s.index.Close()
	}
	return errors.Join(s.file.Close(), err)
}

// ParseID reads an id in hexadecimal.
func ParseID(text string) (id ID, err error) {
	b, err := hex.DecodeString(text)
	if err != nil || len(b) != idSize {
		return id, fmt.Errorf("id %.64q: want %d hexadecimal digits", text, 2*idSize)
	}
	return ID(b), nil
}
