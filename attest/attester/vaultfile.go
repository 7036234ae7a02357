package attester

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
)

// What attestd keeps for other daemons is in the state partition too: in each
// slot, behind the device's own record, and in the slots' form.
const (
	netOffset   = slotSize / 4
	maxNet      = 64 << 10 // bytes
	netMagic    = "SKNETWK1"
	logonOffset = slotSize / 2
	maxLogon    = 200 << 10 // bytes
	logonMagic  = "SKLOGON1"
)

// VaultFile is the part of a state partition that holds one daemon's bytes.
// Writes alternate between the two slots: a power cut leaves the old bytes or
// the new ones. Make one with LogonFile or NetFile.
type VaultFile struct {
	path   string
	offset int64 // into each slot
	most   int   // bytes
	magic  string
	// both: each write is done in both slots, one after the other, so that
	// nothing is left of what was there before.
	both bool
}

// LogonFile is logind's part of the state partition at path.
func LogonFile(path string) VaultFile {
	return VaultFile{path: path, offset: logonOffset, most: maxLogon, magic: logonMagic}
}

// NetFile is netd's part of the state partition at path. A network that was
// forgotten is gone from it.
func NetFile(path string) VaultFile {
	return VaultFile{path: path, offset: netOffset, most: maxNet, magic: netMagic, both: true}
}

// Load returns what Store stored last; ErrNoRecord when there is nothing.
func (f VaultFile) Load() (body []byte, err error) {
	err = f.with(func(d section) error {
		seq, slot, b, err := f.newest(d)
		body = b
		if err != nil || !f.both {
			return err
		}
		other, err := f.read(d, 1-slot)
		if err != nil {
			return err
		}
		if q, b, err := decodeSlot(f.magic, other, f.most); err == nil && q == seq && bytes.Equal(b, body) {
			return nil
		}
		return f.write(d, 1-slot, seq, body) // the power went between two writes
	})
	return body, err
}

// Store keeps body: it is durable when Store has returned nil.
func (f VaultFile) Store(body []byte) error {
	return f.with(func(d section) error {
		seq, slot, _, err := f.newest(d)
		if err != nil && !errors.Is(err, ErrNoRecord) {
			return err
		}
		if err := f.write(d, 1-slot, seq+1, body); err != nil || !f.both {
			return err
		}
		return f.write(d, slot, seq+1, body)
	})
}

// write puts a record into a slot, and zeros behind it.
func (f VaultFile) write(d section, slot int, seq uint64, body []byte) error {
	data, err := encodeSlot(f.magic, seq, body, f.most)
	if err != nil {
		return err
	}
	place := make([]byte, headSize+f.most)
	copy(place, data)
	if _, err := d.WriteAt(place, int64(slot)*slotSize+f.offset); err != nil {
		return fmt.Errorf("state partition: write: %w", err)
	}
	if err := d.Sync(); err != nil {
		return fmt.Errorf("state partition: sync: %w", err)
	}
	return nil
}

func (f VaultFile) with(do func(section) error) error {
	file, err := os.OpenFile(f.path, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("state partition: %w", err)
	}
	return errors.Join(do(section{file, 0}), file.Close())
}

func (f VaultFile) read(d Device, slot int) ([]byte, error) {
	buf := make([]byte, headSize+f.most)
	n, err := d.ReadAt(buf, int64(slot)*slotSize+f.offset)
	if err != nil && err != io.EOF {
		return nil, fmt.Errorf("state partition: read: %w", err)
	}
	return buf[:n], nil
}

// newest finds the valid slot with the highest sequence number. Without one it
// says slot 1, so that the first write goes to slot 0.
func (f VaultFile) newest(d Device) (seq uint64, slot int, body []byte, err error) {
	slot, err = 1, ErrNoRecord
	for i := range 2 {
		buf, rerr := f.read(d, i)
		if rerr != nil {
			return 0, 0, nil, rerr
		}
		if q, b, derr := decodeSlot(f.magic, buf, f.most); derr == nil && (err != nil || q > seq) {
			seq, slot, body, err = q, i, b, nil
		}
	}
	return seq, slot, body, err
}
