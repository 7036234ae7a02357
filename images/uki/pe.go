package uki

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"slices"
	"strings"

	"sekisho/attest"
)

const (
	// MaxImage bounds a PE file in bytes. The target for a host domain's UKI is
	// 90 MiB; a file beyond the limit is a fault, not an image.
	MaxImage = 512 << 20

	// maxSections bounds the section table; the Windows loader's limit.
	maxSections = 96
)

// Offsets by the PE format specification (Microsoft, "PE Format"), sections
// "MS-DOS Stub", "COFF File Header", "Optional Header" and "Section Table".
const (
	dosPEOffset = 0x3c // file offset of the PE signature

	coffSize     = 20
	coffSections = 2  // NumberOfSections, uint16
	coffOptSize  = 16 // SizeOfOptionalHeader, uint16

	optMagic            = 0
	optSizeOfInitData   = 8
	optSectionAlignment = 32
	optFileAlignment    = 36
	optSizeOfImage      = 56
	optSizeOfHeaders    = 60
	optCheckSum         = 64
	optDLLFlags         = 70
	optNumDirectories   = 108
	optCertificateDir   = 112 + 4*8 // data directory 4, file offset and size

	magicPE32Plus = 0x20b
	flagNXCompat  = 0x0100

	sectionSize = 40
)

// Section is an entry of a PE section table.
type Section struct {
	Name           string
	VirtualSize    uint32 // bytes in memory
	VirtualAddress uint32
	FileSize       uint32 // bytes in the file, padded to the file alignment
	FileOffset     uint32
}

// PE is a parsed PE32+ executable. It refers to the bytes it was made from.
type PE struct {
	data     []byte
	coff     int // offset of the COFF header
	opt      int // offset of the optional header
	table    int // offset of the section table
	headers  int // SizeOfHeaders
	certs    int // file offset of the attribute certificates, or len(data)
	sections []Section
}

// ParsePE reads the headers of a 64-bit PE executable. It refuses a file whose
// sections or certificates lie outside it, so that no later access can.
func ParsePE(data []byte) (*PE, error) {
	if len(data) > MaxImage {
		return nil, fmt.Errorf("pe: %d bytes, at most %d", len(data), MaxImage)
	}
	if len(data) < dosPEOffset+4 || string(data[:2]) != "MZ" {
		return nil, errors.New("pe: no MZ header")
	}
	le := binary.LittleEndian
	sig := uint64(le.Uint32(data[dosPEOffset:]))
	if sig+4+coffSize > uint64(len(data)) || string(data[sig:sig+4]) != "PE\x00\x00" {
		return nil, fmt.Errorf("pe: no PE signature at offset %#x", sig)
	}
	p := &PE{data: data, coff: int(sig) + 4, opt: int(sig) + 4 + coffSize}
	optSize := int(le.Uint16(data[p.coff+coffOptSize:]))
	p.table = p.opt + optSize
	if optSize < optCertificateDir+8 || p.table > len(data) {
		return nil, fmt.Errorf("pe: optional header of %d bytes, want at least %d", optSize, optCertificateDir+8)
	}
	if m := le.Uint16(data[p.opt+optMagic:]); m != magicPE32Plus {
		return nil, fmt.Errorf("pe: magic %#x, want PE32+ (%#x)", m, magicPE32Plus)
	}
	if n := p.u32(optNumDirectories); n < 5 {
		return nil, fmt.Errorf("pe: %d data directories, want at least 5", n)
	}
	n := int(le.Uint16(data[p.coff+coffSections:]))
	headers := uint64(p.u32(optSizeOfHeaders))
	if n > maxSections || headers > uint64(len(data)) || uint64(p.table+n*sectionSize) > headers {
		return nil, fmt.Errorf("pe: %d sections do not fit headers of %d bytes", n, headers)
	}
	p.headers = int(headers)
	for i := range n {
		h := data[p.table+i*sectionSize:]
		s := Section{
			Name:           strings.TrimRight(string(h[:8]), "\x00"),
			VirtualSize:    le.Uint32(h[8:]),
			VirtualAddress: le.Uint32(h[12:]),
			FileSize:       le.Uint32(h[16:]),
			FileOffset:     le.Uint32(h[20:]),
		}
		if s.FileSize > 0 && (uint64(s.FileOffset)+uint64(s.FileSize) > uint64(len(data)) || uint64(s.FileOffset) < headers) {
			return nil, fmt.Errorf("pe: section %q lies outside the file", s.Name)
		}
		p.sections = append(p.sections, s)
	}
	p.certs = len(data)
	if off, size := uint64(p.u32(optCertificateDir)), uint64(p.u32(optCertificateDir+4)); size > 0 {
		// Firmware and signers place the certificates last; anything else
		// would be hashed differently by different programs.
		if off < headers || off+size != uint64(len(data)) {
			return nil, fmt.Errorf("pe: certificates at %#x+%#x are not the end of the file", off, size)
		}
		p.certs = int(off)
	}
	for _, s := range p.sections {
		if s.FileSize > 0 && int(s.FileOffset+s.FileSize) > p.certs {
			return nil, fmt.Errorf("pe: section %q overlaps the certificates", s.Name)
		}
	}
	return p, nil
}

func (p *PE) u32(field int) uint32 { return binary.LittleEndian.Uint32(p.data[p.opt+field:]) }

// Sections returns the section table in file order.
func (p *PE) Sections() []Section { return slices.Clone(p.sections) }

// Signed reports whether the file carries attribute certificates. It does not
// verify them.
func (p *PE) Signed() bool { return p.certs < len(p.data) }

// Section returns the data of the first section of that name. ok is false when
// there is none, or when it has memory beyond its bytes in the file and is
// therefore a program's and not data.
func (p *PE) Section(name string) (data []byte, ok bool) {
	i := slices.IndexFunc(p.sections, func(s Section) bool { return s.Name == name })
	if i < 0 || p.sections[i].VirtualSize > p.sections[i].FileSize || p.sections[i].FileSize == 0 {
		return nil, false
	}
	s := p.sections[i]
	return p.data[s.FileOffset:][:s.VirtualSize:s.VirtualSize], true
}

// Authenticode returns the SHA-256 image digest that signatures cover and that
// firmware extends into PCR 4 ("Windows Authenticode Portable Executable
// Signature Format", "Calculating the PE Image Hash"; edk2
// DxeTpm2MeasureBootLib does the same): everything but the checksum, the
// certificate directory entry and the certificates.
func (p *PE) Authenticode() attest.Digest {
	h := sha256.New()
	p.hashInto(h)
	return attest.Digest(h.Sum(nil))
}

func (p *PE) hashInto(h hash.Hash) {
	sum, dir := p.opt+optCheckSum, p.opt+optCertificateDir
	h.Write(p.data[:sum])
	h.Write(p.data[sum+4 : dir])
	h.Write(p.data[dir+8 : p.headers])
	hashed := p.headers
	inFile := slices.DeleteFunc(slices.Clone(p.sections), func(s Section) bool { return s.FileSize == 0 })
	slices.SortStableFunc(inFile, func(a, b Section) int { return int(a.FileOffset) - int(b.FileOffset) })
	for _, s := range inFile {
		h.Write(p.data[s.FileOffset:][:s.FileSize])
		hashed += int(s.FileSize)
	}
	if hashed < p.certs {
		h.Write(p.data[hashed:p.certs])
	}
}
