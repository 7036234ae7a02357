package uki

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"sekisho/attest"
)

// register is a PCR of the SHA-256 bank.
type register attest.Digest

func (r *register) extend(d attest.Digest) {
	*r = sha256.Sum256(append(r[:len(r):len(r)], d[:]...))
}

func digest(b []byte) attest.Digest { return sha256.Sum256(b) }

// measuredSections is the order in which systemd-stub 257 measures sections
// into PCR 11 (src/fundamental/uki.h, UnifiedSection). Those left out here are
// refused by Predict.
var measuredSections = [...]string{sectionLinux, sectionOSRel, sectionCmdline, sectionInitrd, sectionUname, sectionSBAT}

// otherSections are the sections to which systemd-stub 257 gives a meaning that
// Build does not use.
var otherSections = [...]string{".ucode", ".splash", ".dtb", ".pcrpkey", ".profile", ".dtbauto", ".hwids"}

// Predict computes what the TPM holds when the host domain's init starts, from
// the image and the certificates alone. The rules, each read in the source
// named and tested against a real boot (docs/images.md):
//
// PCR 4 (edk2 Tcg2Dxe.c OnReadyToBoot, DxeTpm2MeasureBootLib): the action, the
// separator, the image. The kernel inside is not measured again: with Secure
// Boot on, the stub answers for it in the firmware's stead
// (secure-boot.c security2_hook), and with it goes the measurement.
//
// PCR 7 (Tcg2Dxe.c MeasureAllSecureVariables, DxeImageVerificationLib
// Measurement.c): SecureBoot, PK, KEK, db, dbx, the separator, then the
// certificate in db that the image was verified by.
//
// PCR 9 (Linux 6.12 efi-stub-helper.c): the load options, then the initrd as
// the stub hands it over.
//
// PCR 11 (stub.c measure_sections): for each section its name with NUL, then
// its data; the signed policies in .pcrsig are left out, since they sign it.
//
// PCR 12, 14 and 15 stay zero: no command line from outside, no credentials, no
// shim, and init has not extended them yet.
//
// The firmware must boot the image as its first attempt: every attempt before
// would add events to PCR 4.
func Predict(image []byte, trust SecureBoot, name, version string) (*attest.ReferenceValues, error) {
	p, err := ParsePE(image)
	if err != nil {
		return nil, fmt.Errorf("predict: %w", err)
	}
	if trust.PK == nil || trust.KEK == nil || trust.DB == nil {
		return nil, errors.New("predict: want the certificates of PK, KEK and db")
	}
	parts, err := Split(image)
	if err != nil {
		return nil, fmt.Errorf("predict: %w", err)
	}
	for _, s := range p.sections {
		// A measured section that is not plain data would be zero-filled in
		// memory; none of ours is.
		_, plain := p.Section(s.Name)
		if slices.Contains(otherSections[:], s.Name) || slices.Contains(measuredSections[:], s.Name) && !plain {
			return nil, fmt.Errorf("predict: section %s has no rule here", s.Name)
		}
	}

	r := &attest.ReferenceValues{Image: name, Version: version, PCRs: map[int]attest.Digest{12: {}, 14: {}, 15: {}}}
	pcr := map[int]*register{4: {}, 7: {}, 9: {}, 11: {}}
	measure := func(index int, component, event string, d attest.Digest) {
		pcr[index].extend(d)
		if component != "" {
			r.Components = append(r.Components, attest.Component{Name: component, PCR: index, Digest: d, Event: event})
		}
	}
	separator := digest(make([]byte, 4))
	// Components are the parts of the image. The keys in PCR 7 are the
	// machine's: a difference there is another fault, which the PCR names.

	measure(4, "", "", digest([]byte("Calling EFI Application from Boot Option")))
	measure(4, "", "", separator)
	measure(4, "uki", "", p.Authenticode())

	for _, v := range []struct {
		vendor guid
		name   string
		data   []byte
	}{
		{guidGlobal(), "SecureBoot", []byte{1}},
		{guidGlobal(), rolePK, signatureList(trust.PK)},
		{guidGlobal(), roleKEK, signatureList(trust.KEK)},
		{guidSecurityDatabase(), roleDB, signatureList(trust.DB)},
		{guidSecurityDatabase(), "dbx", nil},
	} {
		measure(7, "", "", digest(variableEvent(v.vendor, v.name, v.data)))
	}
	measure(7, "", "", separator)
	measure(7, "", "", digest(variableEvent(guidSecurityDatabase(), roleDB, signatureData(trust.DB))))

	measure(9, "cmdline", "LOADED_IMAGE::LoadOptions", digest(append(utf16Bytes(loadOptions(parts.Cmdline)), 0, 0)))
	measure(9, "initramfs", "Linux initrd", combinedInitrd(parts))

	components := map[string]string{
		sectionLinux: "kernel", sectionOSRel: "os-release", sectionCmdline: "cmdline",
		sectionInitrd: "initramfs", sectionUname: "uname", sectionSBAT: "stub",
	}
	for _, s := range measuredSections {
		data, ok := p.Section(s)
		if !ok {
			continue
		}
		measure(11, "", "", digest(append([]byte(s), 0)))
		measure(11, components[s], s, digest(data))
	}
	for i, v := range pcr {
		r.PCRs[i] = attest.Digest(*v)
	}
	return r, nil
}

// variableEvent is UEFI_VARIABLE_DATA (TCG PC Client Platform Firmware Profile
// 1.05, section 10.2.6).
func variableEvent(vendor guid, name string, data []byte) []byte {
	b := append([]byte(nil), vendor[:]...)
	n := utf16Bytes(name)
	b = binary.LittleEndian.AppendUint64(b, uint64(len(n)/2))
	b = binary.LittleEndian.AppendUint64(b, uint64(len(data)))
	return append(append(b, n...), data...)
}

// loadOptions is the command line as systemd-stub hands it to the kernel:
// control characters are spaces, none at either end (src/boot/util.c,
// mangle_stub_cmdline).
func loadOptions(cmdline string) string {
	s := []byte(cmdline)
	for i, c := range s {
		if c <= 0x20 || c == 0x7f {
			s[i] = ' '
		}
	}
	return string(bytes.Trim(s, " "))
}

// combinedInitrd is the digest of the initrd that the kernel gets: the
// initramfs and, from the stub, archives with the signed policies, if there are
// any, and with .extra/os-release; each padded with zeros to a multiple of 4
// (src/boot/stub.c combine_initrds and generate_embedded_initrds).
func combinedInitrd(parts Parts) attest.Digest {
	h := sha256.New()
	archives := [][]byte{parts.Initrd}
	if len(parts.Policy) > 0 {
		archives = append(archives, Archive(extraDir, policyName, parts.Policy))
	}
	for _, b := range append(archives, Archive(extraDir, "os-release", []byte(parts.OSRelease))) {
		h.Write(b)
		h.Write(make([]byte, align(len(b), 4)-len(b)))
	}
	return attest.Digest(h.Sum(nil))
}

// Archive is a cpio archive (newc) with one file in one directory, as
// systemd-stub makes it (src/boot/cpio.c, pack_cpio_literal).
func Archive(dir, name string, data []byte) []byte {
	var b bytes.Buffer
	cpioEntry(&b, 1, 0o040555, dir, nil)
	cpioEntry(&b, 2, 0o100444, dir+"/"+name, data)
	cpioEntry(&b, 0, 0, trailer, nil)
	return b.Bytes()
}

// trailer is the name of the entry that ends an archive.
const trailer = "TRAILER!!!"

// cpioEntry writes one newc entry as the stub does: one link, owner root, no
// time, no device. The fields are c_magic, ino, mode, uid, gid, nlink, mtime,
// filesize, devmajor, devminor, rdevmajor, rdevminor, namesize and check
// (kernel documentation, driver-api/early-userspace/buffer-format). The stub
// spells the trailer's name size in capitals and all others in small letters.
func cpioEntry(b *bytes.Buffer, inode, mode int, name string, data []byte) {
	nameSize := fmt.Sprintf("%08x", len(name)+1)
	if name == trailer {
		nameSize = strings.ToUpper(nameSize)
	}
	fmt.Fprintf(b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s%08x",
		inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, nameSize, 0)
	b.WriteString(name + "\x00")
	pad(b, 4)
	b.Write(data)
	pad(b, 4)
}
