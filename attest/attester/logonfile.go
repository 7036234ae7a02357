package attester

import (
	"errors"
	"fmt"
	"io"
	"os"
)

// What attestd keeps for logind is in the state partition too, at the second
// half of each slot and in the slots' form.
const (
	logonOffset = slotSize / 2
	maxLogon    = 200 << 10 // bytes
	logonMagic  = "SKLOGON1"
)

// LogonFile is logind's part of the state partition at Path, Offset bytes into
// it. Writes alternate between the two slots: a power cut leaves the old bytes
// or the new ones.
type LogonFile struct {
	Path   string
	Offset int64
}

// Load returns what Store stored last; ErrNoRecord when there is nothing.
func (f LogonFile) Load() (body []byte, err error) {
	err = f.with(func(d section) error {
		_, _, body, err = newestLogon(d)
		return err
	})
	return body, err
}

// Store keeps body: it is durable when Store has returned nil.
func (f LogonFile) Store(body []byte) error {
	return f.with(func(d section) error {
		seq, slot, _, err := newestLogon(d)
		if err != nil && !errors.Is(err, ErrNoRecord) {
			return err
		}
		data, err := encodeSlot(logonMagic, seq+1, body, maxLogon)
		if err != nil {
			return err
		}
		if _, err := d.WriteAt(data, int64(1-slot)*slotSize+logonOffset); err != nil {
			return fmt.Errorf("state partition: write: %w", err)
		}
		if err := d.Sync(); err != nil {
			return fmt.Errorf("state partition: sync: %w", err)
		}
		return nil
	})
}

func (f LogonFile) with(do func(section) error) error {
	file, err := os.OpenFile(f.Path, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("state partition: %w", err)
	}
	return errors.Join(do(section{file, f.Offset}), file.Close())
}

// newestLogon finds the valid slot with the highest sequence number. Without
// one it says slot 1, so that the first write goes to slot 0.
func newestLogon(d Device) (seq uint64, slot int, body []byte, err error) {
	slot, err = 1, ErrNoRecord
	for i := range 2 {
		buf := make([]byte, headSize+maxLogon)
		n, rerr := d.ReadAt(buf, int64(i)*slotSize+logonOffset)
		if rerr != nil && rerr != io.EOF {
			return 0, 0, nil, fmt.Errorf("state partition: read: %w", rerr)
		}
		if q, b, derr := decodeSlot(logonMagic, buf[:n], maxLogon); derr == nil && (err != nil || q > seq) {
			seq, slot, body, err = q, i, b, nil
		}
	}
	return seq, slot, body, err
}
