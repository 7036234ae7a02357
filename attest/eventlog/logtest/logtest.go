// Package logtest builds event logs, the PCR values that go with them, and
// reference values, for tests.
package logtest

import (
	"crypto/sha256"
	"encoding/binary"
	"strings"
	"unicode/utf16"

	"sekisho/attest"
	"sekisho/attest/eventlog"
)

// Extension is one extension of a PCR.
type Extension struct {
	PCR    int
	Digest attest.Digest
}

// Log is an event log in the making.
type Log struct {
	data       []byte
	Extensions []Extension
}

// New returns a log that has only its header (TCG_EfiSpecIDEvent, SHA-256).
func New() *Log {
	spec := []byte("Spec ID Event03\x00")
	spec = binary.LittleEndian.AppendUint32(spec, 0)      // platform class: client
	spec = append(spec, 0, 2, 0, 2)                       // version 2.0, UINTN of 64 bits
	spec = binary.LittleEndian.AppendUint32(spec, 1)      // one algorithm
	spec = binary.LittleEndian.AppendUint16(spec, 0x000b) // SHA-256
	spec = binary.LittleEndian.AppendUint16(spec, 32)
	spec = append(spec, 0) // no vendor data
	l := &Log{}
	l.data = binary.LittleEndian.AppendUint32(l.data, 0)
	l.data = binary.LittleEndian.AppendUint32(l.data, eventlog.TypeNoAction)
	l.data = append(l.data, make([]byte, 20)...)
	l.data = binary.LittleEndian.AppendUint32(l.data, uint32(len(spec)))
	l.data = append(l.data, spec...)
	return l
}

// Add appends an event.
func (l *Log) Add(pcr int, kind uint32, data []byte, digest attest.Digest) {
	l.data = binary.LittleEndian.AppendUint32(l.data, uint32(pcr))
	l.data = binary.LittleEndian.AppendUint32(l.data, kind)
	l.data = binary.LittleEndian.AppendUint32(l.data, 1)
	l.data = binary.LittleEndian.AppendUint16(l.data, 0x000b)
	l.data = append(l.data, digest[:]...)
	l.data = binary.LittleEndian.AppendUint32(l.data, uint32(len(data)))
	l.data = append(l.data, data...)
	l.Extensions = append(l.Extensions, Extension{pcr, digest})
}

// Hashed appends an event whose digest is of its data.
func (l *Log) Hashed(pcr int, kind uint32, data []byte) { l.Add(pcr, kind, data, sha256.Sum256(data)) }

// Separator appends the separator of a PCR.
func (l *Log) Separator(pcr int) {
	l.Add(pcr, eventlog.TypeSeparator, make([]byte, 4), sha256.Sum256(make([]byte, 4)))
}

// Bytes returns the log.
func (l *Log) Bytes() []byte { return append([]byte(nil), l.data...) }

// PCRs returns the values of the quoted PCRs.
func (l *Log) PCRs() map[int]attest.Digest {
	pcrs := make(map[int]attest.Digest)
	for _, i := range attest.QuotedPCRs {
		pcrs[i] = attest.Digest{}
	}
	for _, e := range l.Extensions {
		v := pcrs[e.PCR]
		pcrs[e.PCR] = sha256.Sum256(append(v[:], e.Digest[:]...))
	}
	return pcrs
}

// Image is the content of a UKI, by section.
type Image struct {
	Kernel, Initramfs, Cmdline string
}

// sections returns the image as systemd-stub measures it.
func (i Image) sections() [][3]string { // component, section, content
	return [][3]string{{"kernel", ".linux", i.Kernel}, {"cmdline", ".cmdline", i.Cmdline}, {"initramfs", ".initrd", i.Initramfs}}
}

func (i Image) uki() attest.Digest {
	return sha256.Sum256([]byte("uki " + i.Kernel + i.Initramfs + i.Cmdline))
}

// Boot returns the log of a machine that booted the image: firmware in PCR 0
// to 7, the image in PCR 4 and, section by section, in PCR 11.
func (i Image) Boot() *Log { return i.BootUnder(SecureBoot(1)...) }

// BootUnder is Boot with other events than those of Secure Boot in PCR 7 before
// the separators.
func (i Image) BootUnder(policy ...[]byte) *Log {
	l := New()
	l.Add(0, 8, []byte("firmware"), sha256.Sum256([]byte("firmware")))
	for _, v := range policy {
		l.Hashed(7, eventlog.TypeVariableConfig, v)
	}
	for pcr := range 8 {
		l.Separator(pcr)
	}
	l.Hashed(7, eventlog.TypeVariableAuth, Variable("db", make([]byte, 16)))
	l.Add(4, eventlog.TypeApplication, nil, i.uki())
	for _, s := range i.sections() {
		l.Add(11, eventlog.TypeIPL, utf16Text(s[1]), sha256.Sum256([]byte(s[1]+"\x00")))
		l.Add(11, eventlog.TypeIPL, utf16Text(s[1]), sha256.Sum256([]byte(s[2])))
	}
	return l
}

// Reference returns the image's reference values.
func (i Image) Reference(name, version string) attest.ReferenceValues {
	pcrs := i.Boot().PCRs()
	r := attest.ReferenceValues{Image: name, Version: version, PCRs: map[int]attest.Digest{4: pcrs[4], 7: pcrs[7], 11: pcrs[11]}}
	for _, s := range i.sections() {
		r.Components = append(r.Components, attest.Component{Name: s[0], PCR: 11, Event: s[1], Digest: sha256.Sum256([]byte(s[2]))})
	}
	r.Components = append(r.Components, attest.Component{Name: "uki", PCR: 4, Digest: i.uki()})
	return r
}

// SecureBoot is the policy that firmware measures: state is the value of
// SecureBoot, and each database holds one signature without content.
func SecureBoot(state byte) [][]byte {
	list := make([]byte, 16, 44)
	for _, n := range []uint32{44, 0, 16} { // sizes of list, header and signature
		list = binary.LittleEndian.AppendUint32(list, n)
	}
	policy := [][]byte{Variable("SecureBoot", []byte{state})}
	for _, name := range []string{"PK", "KEK", "db", "dbx"} {
		policy = append(policy, Variable(name, append(list, make([]byte, 16)...)))
	}
	return policy
}

// Variable is a UEFI variable as the firmware logs it (UEFI_VARIABLE_DATA): one
// of the image security databases by its name, else a global one.
func Variable(name string, data []byte) []byte {
	b := []byte{0x61, 0xdf, 0xe4, 0x8b, 0xca, 0x93, 0xd2, 0x11, 0xaa, 0x0d, 0x00, 0xe0, 0x98, 0x03, 0x2b, 0x8c}
	if strings.HasPrefix(name, "db") {
		b = []byte{0xcb, 0xb2, 0x19, 0xd7, 0x3a, 0x3d, 0x96, 0x45, 0xa3, 0xbc, 0xda, 0xd0, 0x0e, 0x67, 0x65, 0x6f}
	}
	b = binary.LittleEndian.AppendUint64(b, uint64(len(name)))
	b = binary.LittleEndian.AppendUint64(b, uint64(len(data)))
	text := utf16Text(name)
	return append(append(b, text[:len(text)-2]...), data...)
}

// utf16Text is text with its NUL as UEFI writes it.
func utf16Text(s string) []byte {
	var b []byte
	for _, u := range utf16.Encode([]rune(s + "\x00")) {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	return b
}
