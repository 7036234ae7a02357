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
)

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
}

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
	if len(parts.Initrd) == 0 || len(stub.sections) == 0 {
		return nil, fmt.Errorf("uki: initramfs of %d bytes, boot stub with %d sections; want both", len(parts.Initrd), len(stub.sections))
	}
	add := []struct {
		name  string
		data  []byte
		flags uint32
	}{
		{sectionOSRel, []byte(parts.OSRelease), flagInitData},
		{sectionCmdline, []byte(parts.Cmdline), flagInitData},
		{sectionUname, []byte(parts.Uname), flagInitData},
		{sectionLinux, parts.Kernel, flagCode},
		{sectionInitrd, parts.Initrd, flagInitData},
	}
	fileAlign, memAlign := int(stub.u32(optFileAlignment)), int(stub.u32(optSectionAlignment))
	if fileAlign < 512 || fileAlign > 1<<16 || memAlign < fileAlign || memAlign > 1<<21 {
		return nil, fmt.Errorf("uki: boot stub with alignments %d and %d", fileAlign, memAlign)
	}
	total := align(len(parts.Stub), fileAlign)
	for _, a := range add {
		total += align(len(a.data), fileAlign)
	}
	if total > MaxImage {
		return nil, fmt.Errorf("uki: %d bytes, at most %d", total, MaxImage)
	}
	if stub.table+(len(stub.sections)+len(add))*sectionSize > stub.headers {
		return nil, fmt.Errorf("uki: no room for %d more section headers in %d bytes", len(add), stub.headers)
	}

	out := bytes.NewBuffer(make([]byte, 0, total))
	out.Write(parts.Stub)
	pad(out, fileAlign)
	last := stub.sections[len(stub.sections)-1]
	address := align(int(last.VirtualAddress+last.VirtualSize), memAlign)
	header, count, initData := stub.table+len(stub.sections)*sectionSize, len(stub.sections), stub.u32(optSizeOfInitData)
	le := binary.LittleEndian
	for _, a := range add {
		if _, ok := stub.Section(a.name); ok {
			return nil, fmt.Errorf("uki: boot stub already has a section %s", a.name)
		}
		if len(a.data) == 0 {
			continue
		}
		at := out.Len()
		out.Write(a.data)
		pad(out, fileAlign)
		h := out.Bytes()[header : header+sectionSize]
		clear(h)
		copy(h, a.name)
		le.PutUint32(h[8:], uint32(len(a.data)))
		le.PutUint32(h[12:], uint32(address))
		le.PutUint32(h[16:], uint32(out.Len()-at))
		le.PutUint32(h[20:], uint32(at))
		le.PutUint32(h[36:], a.flags|flagRead)
		header, count = header+sectionSize, count+1
		initData += uint32(len(a.data))
		address = align(address+len(a.data), memAlign)
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

// Split reads the parts back from a UKI, without the boot stub, which cannot be
// told apart from the rest of the file.
func Split(image []byte) (Parts, error) {
	p, err := ParsePE(image)
	if err != nil {
		return Parts{}, err
	}
	var parts Parts
	for name, set := range map[string]func([]byte){
		sectionLinux:   func(b []byte) { parts.Kernel = b },
		sectionInitrd:  func(b []byte) { parts.Initrd = b },
		sectionCmdline: func(b []byte) { parts.Cmdline = string(b) },
		sectionOSRel:   func(b []byte) { parts.OSRelease = string(b) },
		sectionUname:   func(b []byte) { parts.Uname = string(b) },
	} {
		b, ok := p.Section(name)
		if !ok {
			return Parts{}, fmt.Errorf("uki: no section %s; is this a unified kernel image?", name)
		}
		set(b)
	}
	return parts, nil
}

func align(n, to int) int { return (n + to - 1) / to * to }

func pad(b *bytes.Buffer, to int) { b.Write(make([]byte, align(b.Len(), to)-b.Len())) }
