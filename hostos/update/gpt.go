package update

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

// Parts of a GUID partition table (UEFI specification 2.10, section 5.3).
const (
	gptHeader  = 92
	gptEntry   = 128
	gptEntries = 128 // most entries that are looked at
)

// ReadPlace reads from a disk with blocks of that many bytes where its
// partition of that number, from 1, is.
func ReadPlace(disk io.ReaderAt, block int64, number uint32) (Place, error) {
	fail := func(what string) (Place, error) {
		return Place{}, fmt.Errorf("partition table: %s: have the laptop installed again", what)
	}
	if block < 512 || block > 64<<10 {
		return fail(fmt.Sprintf("blocks of %d bytes", block))
	}
	head := make([]byte, gptHeader)
	if _, err := disk.ReadAt(head, block); err != nil {
		return Place{}, fmt.Errorf("partition table: %w", err)
	}
	le := binary.LittleEndian
	sum := le.Uint32(head[16:])
	le.PutUint32(head[16:], 0)
	if string(head[:8]) != "EFI PART" || le.Uint32(head[12:]) != gptHeader || crc32.ChecksumIEEE(head) != sum {
		return fail("no valid GPT header")
	}
	first, count := le.Uint64(head[72:]), le.Uint32(head[80:])
	if le.Uint32(head[84:]) != gptEntry || count > gptEntries || first > 1<<32 || number < 1 || number > count {
		return fail(fmt.Sprintf("entry %d of %d", number, count))
	}
	entries := make([]byte, count*gptEntry)
	if _, err := disk.ReadAt(entries, int64(first)*block); err != nil {
		return Place{}, fmt.Errorf("partition table: %w", err)
	}
	if crc32.ChecksumIEEE(entries) != le.Uint32(head[88:]) {
		return fail("entries do not fit their check sum")
	}
	e := entries[(number-1)*gptEntry:]
	start, end := le.Uint64(e[32:]), le.Uint64(e[40:])
	if start == 0 || end < start {
		return fail(fmt.Sprintf("entry %d is empty", number))
	}
	return Place{number, start, end - start + 1, [16]byte(e[16:32])}, nil
}

// UUID is the partition's GUID in text (RFC 9562, appendix A.3: the first three
// fields are little endian).
func (p Place) UUID() string {
	g := p.GUID
	return fmt.Sprintf("%08x-%04x-%04x-%x-%x", binary.LittleEndian.Uint32(g[0:]), binary.LittleEndian.Uint16(g[4:]), binary.LittleEndian.Uint16(g[6:]), g[8:10], g[10:16])
}

var errNoSection = errors.New("image: no section of this name")

// maxSections bounds a PE image's section table.
const maxSections = 96

// section returns a section of the PE image in r (Microsoft PE format, section
// table), at most limit bytes, and whether the image carries a signature. The
// image is not trusted: nothing is read or kept beyond the limits.
func section(r io.ReaderAt, name string, limit uint32) (data []byte, signed bool, err error) {
	le := binary.LittleEndian
	at := func(off int64, n int) []byte {
		b := make([]byte, n)
		if err == nil {
			_, err = r.ReadAt(b, off)
		}
		return b
	}
	pe := int64(le.Uint32(at(0x3c, 4)))
	head := at(pe, 24)
	count, optional := int(le.Uint16(head[6:])), int64(le.Uint16(head[20:]))
	if err != nil {
		return nil, false, fmt.Errorf("image: %w", err)
	}
	const certificates = 24 + 144 // data directory 4 of PE32+
	if string(head[:4]) != "PE\x00\x00" || count > maxSections || optional < 152 {
		return nil, false, errors.New("image: not a UEFI program")
	}
	signed = le.Uint32(at(pe+certificates+4, 4)) > 0
	table := at(pe+24+optional, 40*count)
	if err != nil {
		return nil, false, fmt.Errorf("image: %w", err)
	}
	for ; len(table) >= 40; table = table[40:] {
		if string(trimNUL(table[:8])) != name {
			continue
		}
		size, raw := le.Uint32(table[8:]), le.Uint32(table[16:])
		if size > limit || size > raw {
			return nil, signed, fmt.Errorf("image: section %s of %d bytes, at most %d", name, size, limit)
		}
		data = at(int64(le.Uint32(table[20:])), int(size))
		if err != nil {
			return nil, signed, fmt.Errorf("image: section %s: %w", name, err)
		}
		return data, signed, nil
	}
	return nil, signed, errNoSection
}

func trimNUL(b []byte) []byte {
	for len(b) > 0 && b[len(b)-1] == 0 {
		b = b[:len(b)-1]
	}
	return b
}
