package eventlog

import (
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"fmt"
)

// Bank is a set of PCRs by its hash algorithm (TPM_ALG_ID; TPM 2.0 Library,
// Part 2, section 6.3). The zero value is none.
type Bank uint16

// The banks that can be replayed.
const (
	SHA1   Bank = 0x0004
	SHA256 Bank = 0x000b
	SHA384 Bank = 0x000c
	SHA512 Bank = 0x000d
)

// banks lists them, the one to prefer first.
var banks = [...]Bank{SHA256, SHA384, SHA512, SHA1}

func (b Bank) String() string {
	switch b {
	case SHA1:
		return "sha1"
	case SHA256:
		return "sha256"
	case SHA384:
		return "sha384"
	case SHA512:
		return "sha512"
	}
	if b == 0 {
		return "none"
	}
	return fmt.Sprintf("algorithm-0x%04x", uint16(b))
}

// ParseBank is the inverse of Bank.String for the banks that can be replayed.
func ParseBank(s string) (Bank, error) {
	for _, b := range banks {
		if s == b.String() {
			return b, nil
		}
	}
	return 0, fmt.Errorf("unknown PCR bank %.32q: want sha256, sha384, sha512 or sha1", s)
}

// MarshalText implements encoding.TextMarshaler.
func (b Bank) MarshalText() ([]byte, error) { return []byte(b.String()), nil }

// Size is the length of the bank's digests in bytes, 0 if it cannot be replayed.
func (b Bank) Size() int {
	switch b {
	case SHA1:
		return sha1.Size
	case SHA256:
		return sha256.Size
	case SHA384:
		return sha512.Size384
	case SHA512:
		return sha512.Size
	}
	return 0
}

// Sum appends the digest of data to dst.
func (b Bank) Sum(dst, data []byte) []byte {
	switch b {
	case SHA1:
		h := sha1.Sum(data)
		return append(dst, h[:]...)
	case SHA256:
		h := sha256.Sum256(data)
		return append(dst, h[:]...)
	case SHA384:
		h := sha512.Sum384(data)
		return append(dst, h[:]...)
	case SHA512:
		h := sha512.Sum512(data)
		return append(dst, h[:]...)
	}
	return dst
}
