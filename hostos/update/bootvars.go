package update

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"unicode/utf16"
)

// Variables are the firmware's boot variables (UEFI specification 2.10, section
// 3.3), by their name in the global variables.
type Variables interface {
	// Get returns fs.ErrNotExist where there is none.
	Get(name string) ([]byte, error)
	// Set writes a variable that stays over boots; no data deletes it.
	Set(name string, data []byte) error
	// Entries lists the numbers of the Boot#### variables.
	Entries() ([]uint16, error)
}

// Place is where on a disk a slot is (UEFI specification 2.10, section
// 10.3.5.1).
type Place struct {
	Number      uint32   // of the partition, from 1
	Start, Size uint64   // blocks of the disk
	GUID        [16]byte // of the partition, as in the table
}

// bootFile is what firmware starts on a disk without boot entries (UEFI
// specification 2.10, section 3.5.1.1), and by our entries.
const bootFile = `\EFI\BOOT\BOOTX64.EFI`

// Parts of an EFI_LOAD_OPTION and its device path (UEFI specification 2.10,
// sections 3.1.3 and 10.3).
const (
	loadOptionActive = 1
	maxLoadOption    = 16 << 10 // bytes; ours have less than 200
	maxEntries       = 512
)

func utf16z(s string) (b []byte) {
	for _, u := range append(utf16.Encode([]rune(s)), 0) {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	return b
}

// devicePath is the short form of the way to the slot's boot file: partition,
// file, end.
func (p Place) devicePath() []byte {
	le := binary.LittleEndian
	node := func(b []byte, kind, subtype byte, data []byte) []byte {
		b = le.AppendUint16(append(b, kind, subtype), uint16(4+len(data)))
		return append(b, data...)
	}
	hd := le.AppendUint32(nil, p.Number)
	hd = le.AppendUint64(hd, p.Start)
	hd = le.AppendUint64(hd, p.Size)
	hd = append(hd, p.GUID[:]...)
	hd = append(hd, 2, 2) // GPT, signature is a GUID
	b := node(nil, 4, 1, hd)
	b = node(b, 4, 4, utf16z(bootFile))
	return node(b, 0x7f, 0xff, nil)
}

// loadOption is the content of a Boot#### variable that starts the slot at p.
func (p Place) loadOption(s Slot) []byte {
	path := p.devicePath()
	b := binary.LittleEndian.AppendUint32(nil, loadOptionActive)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(path)))
	b = append(b, utf16z("Sekisho "+string(s))...)
	return append(b, path...)
}

func entryName(n uint16) string { return fmt.Sprintf("Boot%04X", n) }

// entry returns the number of the Boot#### variable that starts the slot at p,
// and makes one if there is none. What others made is left alone.
func entry(v Variables, s Slot, p Place) (uint16, error) {
	numbers, err := v.Entries()
	if err != nil {
		return 0, fmt.Errorf("boot entries: %w", err)
	}
	want := p.loadOption(s)
	for _, n := range numbers[:min(len(numbers), maxEntries)] {
		if got, err := v.Get(entryName(n)); err == nil && bytes.Equal(got, want) {
			return n, nil
		}
	}
	for n := range uint16(maxEntries) {
		if slices.Contains(numbers, n) {
			continue
		}
		if err := v.Set(entryName(n), want); err != nil {
			return 0, fmt.Errorf("boot entry of slot %s: %w", s, err)
		}
		return n, nil
	}
	return 0, errors.New("boot entries: the firmware has no number left; delete some in its setup")
}

// setOrder has the firmware start slot first from now on, and the other slot
// when it cannot; what else it knows stays behind them.
func setOrder(v Variables, places map[Slot]Place, first Slot) error {
	var order []uint16
	for _, s := range []Slot{first, first.other()} {
		n, err := entry(v, s, places[s])
		if err != nil {
			return err
		}
		order = append(order, n)
	}
	old, err := v.Get("BootOrder")
	if err != nil {
		old = nil // none yet
	}
	for i := 0; i+1 < len(old) && i < 2*maxEntries; i += 2 {
		if n := binary.LittleEndian.Uint16(old[i:]); !slices.Contains(order, n) {
			order = append(order, n)
		}
	}
	var data []byte
	for _, n := range order {
		data = binary.LittleEndian.AppendUint16(data, n)
	}
	if bytes.Equal(data, old) {
		return nil // the firmware's flash wears
	}
	if err := v.Set("BootOrder", data); err != nil {
		return fmt.Errorf("boot order: %w", err)
	}
	return nil
}

// setNext has the firmware start slot at the next boot, once.
func setNext(v Variables, places map[Slot]Place, s Slot) error {
	n, err := entry(v, s, places[s])
	if err != nil {
		return err
	}
	if err := v.Set("BootNext", binary.LittleEndian.AppendUint16(nil, n)); err != nil {
		return fmt.Errorf("next boot: %w", err)
	}
	return nil
}

// clearNext takes back what setNext did.
func clearNext(v Variables) error {
	if _, err := v.Get("BootNext"); err != nil {
		return nil // there is none
	}
	if err := v.Set("BootNext", nil); err != nil {
		return fmt.Errorf("next boot: %w", err)
	}
	return nil
}
