package eventlog

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"strings"
	"unicode"
)

const (
	maxForbidden = 8192 // entries of a dbx
	maxText      = 128  // bytes of a text that is shown
)

// guidSHA256 is EFI_CERT_SHA256_GUID as UEFI lays it out (UEFI 2.10, section
// 32.4.1), in hexadecimal.
const guidSHA256 = "2616c4c14c509240aca941f936934328"

// SecureBoot is what the SHA-256 bank's PCR 7 says. Check must have passed.
func (l *Log) SecureBoot() SecureBoot { return l.secureBoot(SHA256) }

// Forbidden returns the SHA-256 digests in dbx, in hexadecimal, as the one
// event of PCR 7 before the separator has it. ok is false if there is none or
// more than one, if its digest does not cover it, or if it is malformed. Check
// must have passed.
func (l *Log) Forbidden() (list []string, ok bool) {
	policy, ok := l.policySeven(SHA256)
	dbx := policy["dbx"]
	if !ok || dbx == nil || dbx.event.Digest != sha256.Sum256(dbx.event.Data) {
		return nil, false
	}
	return forbidden(dbx.data)
}

// forbidden reads the SHA-256 lists of a signature database; lists of other
// types are passed over.
func forbidden(b []byte) (list []string, ok bool) {
	const head, entry = 16 + 4 + 4 + 4, 16 + sha256.Size // owner and digest
	if checkSignatureLists(b) != nil {
		return nil, false
	}
	for len(b) > 0 {
		size, header, sig := binary.LittleEndian.Uint32(b[16:]), binary.LittleEndian.Uint32(b[20:]), binary.LittleEndian.Uint32(b[24:])
		if hex.EncodeToString(b[:16]) == guidSHA256 {
			body := b[head+header : size]
			if sig != entry || len(list)+len(body)/entry > maxForbidden {
				return nil, false
			}
			for ; len(body) > 0; body = body[entry:] {
				list = append(list, hex.EncodeToString(body[16:entry]))
			}
		}
		b = b[size:]
	}
	return list, true
}

// FirmwareVersion is how the firmware calls itself, a hint; empty if it does
// not say.
func (l *Log) FirmwareVersion() string {
	for _, e := range l.Events {
		if e.PCR == 0 && e.Type == TypeCRTMVersion {
			return shown(e)
		}
	}
	return ""
}

// shown is what an event says it is about, if people can read it: the name of
// its variable, the file of its application, or its label.
func shown(e Event) string {
	s := ""
	switch e.Type {
	case TypeVariableConfig, TypeVariableBoot, TypeVariableBoot2, TypeVariableAuth:
		if v, err := parseVariable(e.Data, maxShimRest); err == nil {
			s = v.name
		}
	case TypeApplication, TypeBootDriver, TypeRuntimeDriver:
		s = loadedFile(e.Data)
	default:
		s = e.label()
	}
	if len(s) > maxText || strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return ""
	}
	return s
}

// loadedFile finds the file in the device path of a UEFI_IMAGE_LOAD_EVENT
// (section 10.2.3; UEFI 2.10, section 10.3.5.4), empty if it names none.
func loadedFile(b []byte) string {
	const head, node = 4 * 8, 4 // a node: type, subtype, length (2)
	if len(b) < head {
		return ""
	}
	for b = b[head:]; len(b) >= node; {
		size := int(binary.LittleEndian.Uint16(b[2:]))
		if size < node || size > len(b) {
			return ""
		}
		if b[0] == 4 && b[1] == 4 { // media device path, file path
			return text(b[node:size])
		}
		b = b[size:]
	}
	return ""
}
