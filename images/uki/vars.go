package uki

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"time"
	"unicode/utf16"
)

// guid is an EFI_GUID in its byte order on the wire.
type guid [16]byte

// newGUID makes a guid from the parts of its registry text.
func newGUID(a uint32, b, c uint16, d [8]byte) (g guid) {
	binary.LittleEndian.PutUint32(g[0:], a)
	binary.LittleEndian.PutUint16(g[4:], b)
	binary.LittleEndian.PutUint16(g[6:], c)
	copy(g[8:], d[:])
	return g
}

// EFI_GLOBAL_VARIABLE, EFI_IMAGE_SECURITY_DATABASE_GUID and EFI_CERT_X509_GUID
// (UEFI specification 2.10, sections 3.3, 32.4.1 and 32.4.1.1).
func guidGlobal() guid {
	return newGUID(0x8be4df61, 0x93ca, 0x11d2, [8]byte{0xaa, 0x0d, 0x00, 0xe0, 0x98, 0x03, 0x2b, 0x8c})
}
func guidSecurityDatabase() guid {
	return newGUID(0xd719b2cb, 0x3d3a, 0x4596, [8]byte{0xa3, 0xbc, 0xda, 0xd0, 0x0e, 0x67, 0x65, 0x6f})
}
func guidX509() guid {
	return newGUID(0xa5c059a1, 0x94e4, 0x4aa7, [8]byte{0x87, 0xb5, 0xab, 0x15, 0x5c, 0x2b, 0xf0, 0x72})
}

// gEfiSecureBootEnableDisableGuid, gEfiSystemNvDataFvGuid and
// gEfiAuthenticatedVariableGuid of edk2 (SecurityPkg.dec, MdeModulePkg.dec).
func guidSecureBootEnable() guid {
	return newGUID(0xf0a30bc7, 0xaf08, 0x4556, [8]byte{0x99, 0xc4, 0x00, 0x10, 0x09, 0xc9, 0x3a, 0x44})
}
func guidNVData() guid {
	return newGUID(0xfff12b8d, 0x7696, 0x4c8b, [8]byte{0xa9, 0x85, 0x27, 0x47, 0x07, 0x5b, 0x4f, 0x50})
}
func guidVariableStore() guid {
	return newGUID(0xaaf32c78, 0x947b, 0x439a, [8]byte{0xa1, 0x80, 0x2e, 0x14, 0x4e, 0xc3, 0x77, 0x92})
}

// SecureBoot is what a machine trusts: one certificate for each role, no dbx.
type SecureBoot struct{ PK, KEK, DB *x509.Certificate }

// variable is a UEFI variable.
type variable struct {
	vendor     guid
	name       string
	attributes uint32
	time       time.Time // of authenticated variables
	data       []byte
}

// Variable attributes (UEFI specification 2.10, section 8.2).
const (
	attrNonVolatile  = 0x01
	attrBootService  = 0x02
	attrRuntime      = 0x04
	attrTimeAuth     = 0x20
	attrSecureBootDB = attrNonVolatile | attrBootService | attrRuntime | attrTimeAuth
)

// signatureData returns the EFI_SIGNATURE_DATA of cert. The owner, which no
// program looks at, is derived from the certificate, so that equal keys give
// equal variables.
func signatureData(cert *x509.Certificate) []byte {
	owner := sha256.Sum256(append([]byte("sekisho signature owner"), cert.Raw...))
	return append(owner[:16:16], cert.Raw...)
}

// signatureList returns the EFI_SIGNATURE_LIST with cert alone (UEFI
// specification 2.10, section 32.4.1).
func signatureList(cert *x509.Certificate) []byte {
	data, kind := signatureData(cert), guidX509()
	b := append([]byte(nil), kind[:]...)
	b = binary.LittleEndian.AppendUint32(b, uint32(28+len(data)))
	b = binary.LittleEndian.AppendUint32(b, 0)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

// variables returns the variables that enrol s. Their time is that of the
// certificate: a later signed update must be newer.
func (s SecureBoot) variables() []variable {
	v := func(vendor guid, name string, cert *x509.Certificate) variable {
		return variable{vendor, name, attrSecureBootDB, cert.NotBefore, signatureList(cert)}
	}
	return []variable{
		v(guidGlobal(), rolePK, s.PK),
		v(guidGlobal(), roleKEK, s.KEK),
		v(guidSecurityDatabase(), roleDB, s.DB),
		// The switch of edk2's setup screen. Firmware would make it by itself
		// when a PK is present; said here, it is not left to a default.
		// CustomMode and certdb are set by every boot (AuthVariableLibInitialize).
		{guidSecureBootEnable(), "SecureBootEnable", attrNonVolatile | attrBootService, time.Time{}, []byte{1}},
	}
}

// Layout of edk2's variable store: EFI_FIRMWARE_VOLUME_HEADER (PI
// specification volume 3, section 3.2.1), VARIABLE_STORE_HEADER and
// AUTHENTICATED_VARIABLE_HEADER (MdeModulePkg, VariableFormat.h).
const (
	fvGUID         = 16
	fvHeaderLength = 48
	storeHeader    = 28
	storeSize      = 16
	storeFormat    = 20
	storeState     = 21
	formatted      = 0x5a
	healthy        = 0xfe

	variableStart  = 0x55aa
	variableAdded  = 0x3f
	variableHeader = 60

	// maxVariables bounds the firmware's variable file; OVMF's is 528 KiB.
	maxVariables = 16 << 20
)

// Variables returns blank, a blank OVMF variable file (OVMF_VARS_4M.fd), with s
// enrolled: the machine is in user mode with Secure Boot on from its first
// boot, and trusts nothing but s.DB.
func (s SecureBoot) Variables(blank []byte) ([]byte, error) {
	le := binary.LittleEndian
	if len(blank) < 128 || len(blank) > maxVariables {
		return nil, fmt.Errorf("firmware variables: %d bytes", len(blank))
	}
	nv, store := guidNVData(), guidVariableStore()
	start := int(le.Uint16(blank[fvHeaderLength:]))
	if !bytes.Equal(blank[fvGUID:fvGUID+16], nv[:]) || start+storeHeader > len(blank) || !bytes.Equal(blank[start:start+16], store[:]) {
		return nil, errors.New("firmware variables: not an edk2 store of authenticated variables; want OVMF_VARS_4M.fd")
	}
	size := int(le.Uint32(blank[start+storeSize:]))
	if size < storeHeader || start+size > len(blank) || blank[start+storeFormat] != formatted || blank[start+storeState] != healthy {
		return nil, fmt.Errorf("firmware variables: store of %d bytes is not formatted", size)
	}
	out := bytes.Clone(blank)
	free := out[start+storeHeader : start+size]
	if len(bytes.Trim(free, "\xff")) != 0 {
		return nil, errors.New("firmware variables: store is not blank; want OVMF_VARS_4M.fd as Debian ships it")
	}
	for _, v := range s.variables() {
		b := v.marshal()
		if len(b) > len(free) {
			return nil, fmt.Errorf("firmware variables: no room for %s", v.name)
		}
		copy(free, b)
		// Headers are aligned to 4 bytes; the gap stays erased flash.
		free = free[min(align(len(b), 4), len(free)):]
	}
	return out, nil
}

func (v variable) marshal() []byte {
	name := append(utf16Bytes(v.name), 0, 0)
	b := make([]byte, variableHeader, variableHeader+len(name)+len(v.data))
	le := binary.LittleEndian
	le.PutUint16(b[0:], variableStart)
	b[2] = variableAdded
	le.PutUint32(b[4:], v.attributes)
	if !v.time.IsZero() {
		t := v.time.UTC()
		le.PutUint16(b[16:], uint16(t.Year()))
		b[18], b[19] = byte(t.Month()), byte(t.Day())
		b[20], b[21], b[22] = byte(t.Hour()), byte(t.Minute()), byte(t.Second())
	}
	le.PutUint32(b[36:], uint32(len(name)))
	le.PutUint32(b[40:], uint32(len(v.data)))
	copy(b[44:], v.vendor[:])
	return append(append(b, name...), v.data...)
}

// utf16Bytes is s in UTF-16LE without an end mark.
func utf16Bytes(s string) []byte {
	var b []byte
	for _, u := range utf16.Encode([]rune(s)) {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	return b
}
