package attester

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"sekisho/attest"
)

// The state partition (docs/host-domain.md) is two slots of equal size. Each
// holds at most one record:
//
//	magic (8) ‖ sequence (8, big endian) ‖ length (4) ‖ SHA-256 (32) ‖ JSON
//
// The digest covers all but itself. A write goes to the slot that does not
// hold the newest record, so a power cut leaves the old record or the new one.
const (
	PartitionSize = 1 << 20
	slotSize      = PartitionSize / 2
	maxRecord     = 16 << 10 // bytes of JSON
	headSize      = 8 + 8 + 4 + sha256.Size
	magic         = "SKSTATE1"
)

// ErrNoRecord is returned by Load for a partition without a valid record: new,
// or damaged in both slots.
var ErrNoRecord = errors.New("no record in the state partition")

// Record is what a device remembers over boots. The ticket is there until
// enrolment, the enrolment after it, never both.
type Record struct {
	Ticket    attest.Ticket
	Enrolment *attest.Enrolment
}

// recordJSON is Record on disk, where the ticket must be in the clear.
type recordJSON struct {
	Ticket    string            `json:"ticket,omitempty"`
	Enrolment *attest.Enrolment `json:"enrolment,omitempty"`
}

// Device is where the slots are: a block device or a file.
type Device interface {
	io.ReaderAt
	io.WriterAt
}

// State reads and writes the state partition. It is not safe for concurrent
// use.
type State struct {
	dev Device
}

// NewState returns the state on dev, which starts at the partition's first
// byte. If dev has a Sync method, Store calls it.
func NewState(dev Device) *State { return &State{dev} }

// Load returns the newest valid record.
func (s *State) Load() (Record, error) {
	_, _, r, err := s.newest()
	return r, err
}

// Store writes r and returns when it is durable.
func (s *State) Store(r Record) error {
	seq, slot, _, err := s.newest()
	if err != nil && !errors.Is(err, ErrNoRecord) {
		return err
	}
	data, err := encodeRecord(seq+1, r)
	if err != nil {
		return err
	}
	if _, err := s.dev.WriteAt(data, int64(1-slot)*slotSize); err != nil {
		return fmt.Errorf("state partition: write: %w", err)
	}
	if f, ok := s.dev.(interface{ Sync() error }); ok {
		if err := f.Sync(); err != nil {
			return fmt.Errorf("state partition: sync: %w", err)
		}
	}
	return nil
}

// Erase overwrites the slot that does not hold the newest record, so that a
// ticket that was used does not stay behind in it.
func (s *State) Erase() error {
	_, slot, _, err := s.newest()
	if err != nil {
		return err
	}
	if _, err := s.dev.WriteAt(make([]byte, headSize+maxRecord), int64(1-slot)*slotSize); err != nil {
		return fmt.Errorf("state partition: erase: %w", err)
	}
	if f, ok := s.dev.(interface{ Sync() error }); ok {
		if err := f.Sync(); err != nil {
			return fmt.Errorf("state partition: sync: %w", err)
		}
	}
	return nil
}

// newest finds the valid record with the highest sequence number. Without one
// it says slot 1, so that the first write goes to slot 0.
func (s *State) newest() (seq uint64, slot int, r Record, err error) {
	slot, err = 1, ErrNoRecord
	for i := range 2 {
		buf := make([]byte, headSize+maxRecord)
		n, rerr := s.dev.ReadAt(buf, int64(i)*slotSize)
		if rerr != nil && rerr != io.EOF {
			return 0, 0, Record{}, fmt.Errorf("state partition: read: %w", rerr)
		}
		if q, v, derr := decodeRecord(buf[:n]); derr == nil && (err != nil || q > seq) {
			seq, slot, r, err = q, i, v, nil
		}
	}
	return seq, slot, r, err
}

func encodeRecord(seq uint64, r Record) ([]byte, error) {
	body, err := json.Marshal(recordJSON{r.Ticket.Reveal(), r.Enrolment})
	if err != nil {
		return nil, fmt.Errorf("state record: %w", err)
	}
	return encodeSlot(magic, seq, body, maxRecord)
}

// encodeSlot is the content of a slot.
func encodeSlot(magic string, seq uint64, body []byte, most int) ([]byte, error) {
	if len(body) > most {
		return nil, fmt.Errorf("state record: %d bytes, at most %d", len(body), most)
	}
	head := binary.BigEndian.AppendUint64([]byte(magic), seq)
	head = binary.BigEndian.AppendUint32(head, uint32(len(body)))
	sum := sha256.Sum256(append(bytes.Clone(head), body...))
	return append(append(head, sum[:]...), body...), nil
}

func decodeRecord(data []byte) (uint64, Record, error) {
	seq, body, err := decodeSlot(magic, data, maxRecord)
	if err != nil {
		return 0, Record{}, err
	}
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	var j recordJSON
	if err := d.Decode(&j); err != nil {
		return 0, Record{}, fmt.Errorf("state record: %w", err)
	}
	return seq, Record{attest.NewTicket(j.Ticket), j.Enrolment}, nil
}

// decodeSlot reads what encodeSlot made.
func decodeSlot(magic string, data []byte, most int) (uint64, []byte, error) {
	if len(data) < headSize || string(data[:8]) != magic {
		return 0, nil, errors.New("state record: no magic")
	}
	seq, size := binary.BigEndian.Uint64(data[8:]), binary.BigEndian.Uint32(data[16:])
	if int64(size) > int64(most) || int(size) > len(data)-headSize {
		return 0, nil, fmt.Errorf("state record: length %d", size)
	}
	body := data[headSize : headSize+int(size)]
	sum := sha256.Sum256(append(bytes.Clone(data[:20]), body...))
	if !bytes.Equal(sum[:], data[20:headSize]) {
		return 0, nil, errors.New("state record: digest does not match")
	}
	return seq, body, nil
}

// StateFile is the state partition as a file or block device at Path, Offset
// bytes into it (0 for the partition itself). It is opened for each call, so
// it may appear late.
type StateFile struct {
	Path   string
	Offset int64
}

func (f StateFile) with(do func(*State) error) error {
	file, err := os.OpenFile(f.Path, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("state partition: %w", err)
	}
	return errors.Join(do(NewState(section{file, f.Offset})), file.Close())
}

// Load is State.Load.
func (f StateFile) Load() (r Record, err error) {
	err = f.with(func(s *State) error {
		r, err = s.Load()
		return err
	})
	return r, err
}

// Store is State.Store.
func (f StateFile) Store(r Record) error {
	return f.with(func(s *State) error { return s.Store(r) })
}

// Erase is State.Erase.
func (f StateFile) Erase() error { return f.with((*State).Erase) }

// WriteTicket makes ticket the only content of the state partition: what a
// laptop is handed out with. The file must exist.
func WriteTicket(f StateFile, ticket attest.Ticket) error {
	if ticket.IsZero() {
		return errors.New("state partition: the ticket is empty")
	}
	return errors.Join(f.Store(Record{Ticket: ticket}), f.Erase())
}

// section is a part of a file.
type section struct {
	*os.File
	offset int64
}

func (s section) ReadAt(p []byte, at int64) (int, error)  { return s.File.ReadAt(p, s.offset+at) }
func (s section) WriteAt(p []byte, at int64) (int, error) { return s.File.WriteAt(p, s.offset+at) }
