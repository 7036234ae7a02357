package uki

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
)

// Section names of a UKI (UAPI group specification UKI, "PE sections").
const (
	sectionLinux   = ".linux"
	sectionOSRel   = ".osrel"
	sectionCmdline = ".cmdline"
	sectionInitrd  = ".initrd"
	sectionUname   = ".uname"
	sectionSBAT    = ".sbat"
	sectionPCRSig  = ".pcrsig"
)

// sectionOrder is the order in which ukify 257 adds sections. Those of
// optional are last and may be absent.
var sectionOrder = [...]string{sectionOSRel, sectionCmdline, sectionUname, sectionLinux, sectionInitrd, sectionPCRSig}

// optional is how many sections at the end of sectionOrder may be absent.
const optional = 1

// maxAlignment bounds section alignments; a huge page.
const maxAlignment = 2 << 20

// Section flags by the PE format specification, "Section Flags".
const (
	flagCode     = 0x00000020
	flagInitData = 0x00000040
	flagRead     = 0x40000000
)

// Parts are what a UKI is made of.
type Parts struct {
	Stub      []byte // systemd's linuxx64.efi.stub, which starts the kernel; its .sbat section stays
	Kernel    []byte // bzImage with an EFI entry point
	Initrd    []byte
	Cmdline   string // kernel command line, one line
	OSRelease string // os-release(5)
	Uname     string // kernel version, as uname -r prints it
	// Policy is the release's signed policies (attest/seal), empty for none.
	// The stub hands it to the kernel as PolicyFile and does not measure it
	// into PCR 11, which it signs.
	Policy []byte
}

// PolicyFile is where the host domain finds Parts.Policy (systemd-stub(7),
// "Initrd resources").
const PolicyFile = "/" + extraDir + "/" + policyName

const (
	extraDir   = ".extra"
	policyName = "tpm2-pcr-signature.json"
)

// Build assembles the unsigned UKI. Equal parts give an equal file. The new
// sections follow those of the stub in the order that ukify 257 uses, each at
// the next multiple of the section alignment.
func Build(parts Parts) ([]byte, error) {
	if strings.ContainsAny(parts.Cmdline, "\x00\n") || parts.Cmdline == "" {
		return nil, fmt.Errorf("uki: command line %q: want one line that is not empty", parts.Cmdline)
	}
	stub, err := ParsePE(parts.Stub)
	if err != nil {
		return nil, fmt.Errorf("uki: boot stub: %w", err)
	}
	if stub.Signed() {
		return nil, errors.New("uki: boot stub is signed; want the unsigned one of systemd-boot-efi")
	}
	kernel, err := ParsePE(parts.Kernel)
	if err != nil {
		return nil, fmt.Errorf("uki: kernel: %w", err)
	}
	if len(stub.sections) == 0 {
		return nil, errors.New("uki: boot stub has no sections")
	}
	content := map[string][]byte{
		sectionOSRel:   []byte(parts.OSRelease),
		sectionCmdline: []byte(parts.Cmdline),
		sectionUname:   []byte(parts.Uname),
		sectionLinux:   parts.Kernel,
		sectionInitrd:  parts.Initrd,
		sectionPCRSig:  parts.Policy,
	}
	order := sectionOrder[:]
	if len(parts.Policy) == 0 {
		order = order[:len(order)-optional]
	}
	fileAlign, memAlign := int(stub.u32(optFileAlignment)), int(stub.u32(optSectionAlignment))
	if fileAlign < 512 || fileAlign > 1<<16 || memAlign < fileAlign || memAlign > maxAlignment {
		return nil, fmt.Errorf("uki: boot stub with alignments %d and %d", fileAlign, memAlign)
	}
	total := align(len(parts.Stub), fileAlign)
	for _, name := range order {
		if len(content[name]) == 0 {
			return nil, fmt.Errorf("uki: nothing for section %s", name)
		}
		if _, ok := stub.Section(name); ok {
			return nil, fmt.Errorf("uki: boot stub already has a section %s", name)
		}
		total += align(len(content[name]), fileAlign)
	}
	if total > MaxImage {
		return nil, fmt.Errorf("uki: %d bytes, at most %d", total, MaxImage)
	}
	if stub.table+(len(stub.sections)+len(order))*sectionSize > stub.headers {
		return nil, fmt.Errorf("uki: no room for %d more section headers in %d bytes", len(order), stub.headers)
	}

	out := bytes.NewBuffer(make([]byte, 0, total))
	out.Write(parts.Stub)
	pad(out, fileAlign)
	last := stub.sections[len(stub.sections)-1]
	address := align(int(last.VirtualAddress+last.VirtualSize), memAlign)
	header, count, initData := stub.table+len(stub.sections)*sectionSize, len(stub.sections), stub.u32(optSizeOfInitData)
	le := binary.LittleEndian
	for _, name := range order {
		data, at := content[name], out.Len()
		out.Write(data)
		pad(out, fileAlign)
		h := out.Bytes()[header : header+sectionSize]
		clear(h)
		copy(h, name)
		le.PutUint32(h[8:], uint32(len(data)))
		le.PutUint32(h[12:], uint32(address))
		le.PutUint32(h[16:], uint32(out.Len()-at))
		le.PutUint32(h[20:], uint32(at))
		flags := uint32(flagRead | flagInitData)
		if name == sectionLinux {
			flags = flagRead | flagCode
		}
		le.PutUint32(h[36:], flags)
		header, count = header+sectionSize, count+1
		initData += uint32(len(data))
		address = align(address+len(data), memAlign)
	}

	b := out.Bytes()
	le.PutUint16(b[stub.coff+coffSections:], uint16(count))
	le.PutUint32(b[stub.opt+optSizeOfInitData:], initData)
	le.PutUint32(b[stub.opt+optSizeOfImage:], uint32(address))
	// UEFI does not look at the checksum; zero says that there is none.
	le.PutUint32(b[stub.opt+optCheckSum:], 0)
	// A kernel that needs writable code must not run below a stub that
	// promises otherwise; firmware that enforces the flag would stop there.
	if le.Uint16(kernel.data[kernel.opt+optDLLFlags:])&flagNXCompat == 0 {
		flags := le.Uint16(b[stub.opt+optDLLFlags:])
		le.PutUint16(b[stub.opt+optDLLFlags:], flags&^flagNXCompat)
	}
	return b, nil
}

// Split reads the parts back from a UKI that Build made: Build of the result
// gives the unsigned image again, byte for byte. A signature is left behind.
func Split(image []byte) (Parts, error) {
	p, err := ParsePE(image)
	if err != nil {
		return Parts{}, fmt.Errorf("uki: %w", err)
	}
	own, err := p.stubSections()
	if err != nil {
		return Parts{}, err
	}
	section := func(name string) []byte { b, _ := p.Section(name); return b }
	parts := Parts{
		Kernel:    section(sectionLinux),
		Initrd:    section(sectionInitrd),
		Cmdline:   string(section(sectionCmdline)),
		OSRelease: string(section(sectionOSRel)),
		Uname:     string(section(sectionUname)),
		Policy:    section(sectionPCRSig),
	}

	// Undo what Build did to the headers.
	stub := bytes.Clone(p.data[:p.sections[own].FileOffset])
	clear(stub[p.table+own*sectionSize : p.table+len(p.sections)*sectionSize])
	initData := p.u32(optSizeOfInitData)
	for _, s := range p.sections[own:] {
		initData -= s.VirtualSize
	}
	last, le := p.sections[own-1], binary.LittleEndian
	le.PutUint16(stub[p.coff+coffSections:], uint16(own))
	le.PutUint32(stub[p.opt+optSizeOfInitData:], initData)
	le.PutUint32(stub[p.opt+optSizeOfImage:], uint32(align(int(last.VirtualAddress+last.VirtualSize), int(p.u32(optSectionAlignment)))))
	clear(stub[p.opt+optCertificateDir : p.opt+optCertificateDir+8])
	parts.Stub = stub
	return parts, nil
}

// stubSections returns how many sections come before those that Build added,
// and refuses an image whose other sections are not exactly these.
func (p *PE) stubSections() (int, error) {
	order := sectionOrder[:]
	if _, ok := p.Section(sectionPCRSig); !ok {
		order = order[:len(order)-optional]
	}
	own := len(p.sections) - len(order)
	for i, name := range order {
		if _, ok := p.Section(name); !ok || own < 1 || p.sections[own+i].Name != name {
			return 0, fmt.Errorf("uki: image does not end with the sections %v; was it made by mkimage?", order)
		}
	}
	if a := p.u32(optSectionAlignment); a == 0 || a > maxAlignment {
		return 0, fmt.Errorf("uki: section alignment %d", a)
	}
	first := p.sections[own].FileOffset
	for i, s := range p.sections {
		if (i < own) == (s.FileOffset >= first) {
			return 0, fmt.Errorf("uki: section %q is out of order", s.Name)
		}
	}
	return own, nil
}

func align(n, to int) int { return (n + to - 1) / to * to }

func pad(b *bytes.Buffer, to int) { b.Write(make([]byte, align(b.Len(), to)-b.Len())) }
