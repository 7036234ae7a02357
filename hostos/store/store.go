// Package store keeps what the host domain itself remembers over boots: small
// records on the partition sekisho-host, each in two alternating places, so
// that a power cut leaves the old record or the new one. Nothing in them is
// secret, and nothing in them is believed: what is sealed or signed decides.
package store

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
)

// Places of the records on the partition, which is Size bytes.
const (
	Size        = 1 << 20
	VolumePlace = 0         // of hostos/disk
	SlotsPlace  = 256 << 10 // of hostos/update
	TimePlace   = 512 << 10 // of hostos/boot: the last signed time
)

// A record is
//
//	magic (8) ‖ sequence (8, big endian) ‖ length (4) ‖ SHA-256 (32) ‖ data
//
// The digest covers all but itself.
const (
	copySize = 64 << 10
	headSize = 8 + 8 + 4 + sha256.Size
	// MaxData bounds a record's data in bytes.
	MaxData = copySize - headSize
	magic   = "SKHOST01"
)

// ErrNone is returned by Load where no valid record is.
var ErrNone = errors.New("no record")

// Record is one record of a partition or file. It is opened for each call.
type Record struct {
	Path  string
	Place int64 // bytes into Path
}

// Load returns the newest valid record's data.
func (r Record) Load() ([]byte, error) {
	f, err := os.Open(r.Path)
	if err != nil {
		return nil, fmt.Errorf("host record: %w", err)
	}
	defer f.Close()
	_, _, data, err := r.newest(f)
	return data, err
}

// Store writes data and returns when it is durable. Of what its place held
// before nothing is left.
func (r Record) Store(data []byte) error {
	if len(data) > MaxData {
		return fmt.Errorf("host record: %d bytes, at most %d", len(data), MaxData)
	}
	f, err := os.OpenFile(r.Path, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("host record: %w", err)
	}
	seq, at, _, err := r.newest(f)
	if err != nil && !errors.Is(err, ErrNone) {
		return errors.Join(err, f.Close())
	}
	place := make([]byte, copySize)
	copy(place, encode(seq+1, data))
	_, err = f.WriteAt(place, r.Place+int64(1-at)*copySize)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("host record: %w", err)
	}
	return nil
}

// newest finds the valid copy with the highest sequence number. Without one it
// says copy 1, so that the first write goes to copy 0.
func (r Record) newest(f io.ReaderAt) (seq uint64, at int, data []byte, err error) {
	at, err = 1, ErrNone
	for i := range 2 {
		buf := make([]byte, copySize)
		n, rerr := f.ReadAt(buf, r.Place+int64(i)*copySize)
		if rerr != nil && rerr != io.EOF {
			return 0, 0, nil, fmt.Errorf("host record: %w", rerr)
		}
		if q, d, ok := decode(buf[:n]); ok && (err != nil || q > seq) {
			seq, at, data, err = q, i, d, nil
		}
	}
	return seq, at, data, err
}

func encode(seq uint64, data []byte) []byte {
	head := binary.BigEndian.AppendUint64([]byte(magic), seq)
	head = binary.BigEndian.AppendUint32(head, uint32(len(data)))
	sum := sha256.Sum256(append(bytes.Clone(head), data...))
	return append(append(head, sum[:]...), data...)
}

func decode(b []byte) (seq uint64, data []byte, ok bool) {
	if len(b) < headSize || string(b[:8]) != magic {
		return 0, nil, false
	}
	seq = binary.BigEndian.Uint64(b[8:])
	size := binary.BigEndian.Uint32(b[16:])
	if uint64(size) > uint64(len(b)-headSize) {
		return 0, nil, false
	}
	data = b[headSize : headSize+int(size)]
	sum := sha256.Sum256(append(bytes.Clone(b[:20]), data...))
	return seq, data, bytes.Equal(sum[:], b[20:headSize])
}
