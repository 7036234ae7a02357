package eventlog

import (
	"encoding/binary"
	"fmt"
	"unicode/utf16"
)

// variable is a UEFI_VARIABLE_DATA (section 10.4.4).
type variable struct {
	guid [16]byte
	name string
	data []byte
}

// globalVariable is EFI_GLOBAL_VARIABLE, 8be4df61-93ca-11d2-aa0d-00e098032b8c
// (UEFI 2.10, section 3.3), as UEFI lays it out.
var globalVariable = [16]byte{0x61, 0xdf, 0xe4, 0x8b, 0xca, 0x93, 0xd2, 0x11, 0xaa, 0x0d, 0x00, 0xe0, 0x98, 0x03, 0x2b, 0x8c}

// securityDatabase is EFI_IMAGE_SECURITY_DATABASE_GUID,
// d719b2cb-3d3a-4596-a3bc-dad00e67656f (UEFI 2.10, section 32.6.1).
var securityDatabase = [16]byte{0xcb, 0xb2, 0x19, 0xd7, 0x3a, 0x3d, 0x96, 0x45, 0xa3, 0xbc, 0xda, 0xd0, 0x0e, 0x67, 0x65, 0x6f}

// shimLock is shim's GUID, 605dab50-e046-4300-abb6-3dd810dd8b23.
var shimLock = [16]byte{0x50, 0xab, 0x5d, 0x60, 0x46, 0xe0, 0x00, 0x43, 0xab, 0xb6, 0x3d, 0xd8, 0x10, 0xdd, 0x8b, 0x23}

// policy is the variable's name if it is one of Secure Boot's policy, empty
// otherwise: a name counts under its own GUID alone, and names differ by case.
func (v *variable) policy() string {
	switch {
	case v.guid == globalVariable && (v.name == "SecureBoot" || v.name == "PK" || v.name == "KEK"),
		v.guid == securityDatabase && (v.name == "db" || v.name == "dbx" || v.name == "dbt" || v.name == "dbr"):
		return v.name
	}
	return ""
}

// maxShimRest is what shim before 15.3 logged behind an authority: the padding
// of its own structure, and of that one byte more than it hashed
// (https://github.com/rhboot/shim/commit/8a27a4809a6a2b40fb6a4049071bf96d6ad71b50).
const maxShimRest = 8

// parseVariable reads a UEFI_VARIABLE_DATA with at most rest bytes behind it.
func parseVariable(b []byte, rest uint64) (*variable, error) {
	const head = 16 + 8 + 8
	if len(b) < head {
		return nil, fmt.Errorf("variable of %d bytes, shorter than its head", len(b))
	}
	left := uint64(len(b) - head)
	units, size := binary.LittleEndian.Uint64(b[16:]), binary.LittleEndian.Uint64(b[24:])
	if units > left/2 || size > left-2*units || left-2*units-size > rest {
		return nil, fmt.Errorf("variable with a name of %d characters and %d bytes of data in %d bytes", units, size, len(b))
	}
	name := make([]uint16, units)
	for i := range name {
		name[i] = binary.LittleEndian.Uint16(b[head+2*i:])
	}
	at := head + 2*int(units)
	v := &variable{name: string(utf16.Decode(name)), data: b[at : at+int(size)]}
	copy(v.guid[:], b)
	return v, nil
}

// checkSignatureLists walks a signature database: EFI_SIGNATURE_LISTs one after
// the other (UEFI 2.10, section 32.4.1). Nothing is allocated by what it says,
// and certificates are not looked into.
func checkSignatureLists(b []byte) error {
	const head = 16 + 4 + 4 + 4 // type, list size, header size, signature size
	for len(b) > 0 {
		if len(b) < head {
			return fmt.Errorf("signature list of %d bytes, shorter than its head", len(b))
		}
		list, header, sig := uint64(binary.LittleEndian.Uint32(b[16:])), uint64(binary.LittleEndian.Uint32(b[20:])), uint64(binary.LittleEndian.Uint32(b[24:]))
		switch {
		case list < head || list > uint64(len(b)):
			return fmt.Errorf("signature list of %d bytes, %d left", list, len(b))
		case header > list-head:
			return fmt.Errorf("signature list of %d bytes with a header of %d", list, header)
		case sig < 16: // each signature begins with its owner's GUID
			return fmt.Errorf("signatures of %d bytes", sig)
		case (list-head-header)%sig != 0:
			return fmt.Errorf("%d bytes of signatures of %d bytes each", list-head-header, sig)
		}
		b = b[list:]
	}
	return nil
}

// SecureBoot is what a log says about Secure Boot. The zero value is unknown.
type SecureBoot uint8

// The states. There is no guess between them.
const (
	SecureBootUnknown SecureBoot = 0
	SecureBootOn      SecureBoot = 1
	SecureBootOff     SecureBoot = 2
)

func (s SecureBoot) String() string {
	switch s {
	case SecureBootOn:
		return "on"
	case SecureBootOff:
		return "off"
	}
	return "unknown"
}

// MarshalText implements encoding.TextMarshaler.
func (s SecureBoot) MarshalText() ([]byte, error) { return []byte(s.String()), nil }
