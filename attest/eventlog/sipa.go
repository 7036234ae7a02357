package eventlog

import (
	"encoding/binary"
	"fmt"
)

// maxNesting bounds Windows' containers in containers. Logs of real machines
// nest twice; GHSA-hcm6-rjfh-f25p nested without end.
const maxNesting = 8

// isSIPA reports whether a tagged event is one of Windows' boot configuration
// log (System Integrity Platform Attestation, wbcl.h of the Windows SDK): the
// top byte holds two flags, the next the category. Tags of Linux and systemd
// use other bits.
func isSIPA(tag uint32) bool {
	category := tag >> 16 & 0xff
	return tag&0x3f000000 == 0 && category >= 1 && category <= 0x0c
}

// isContainer reports whether a SIPA event holds further events: the aggregation
// flag, or SIPAEVENTTYPE_CONTAINER itself.
func isContainer(tag uint32) bool {
	return isSIPA(tag) && (tag&0x40000000 != 0 || tag == 0x00010000)
}

// checkSIPA walks the SIPA events in b: each is its type, its size, its data.
func checkSIPA(b []byte, depth int) error {
	if depth > maxNesting {
		return fmt.Errorf("containers nested over %d deep", maxNesting)
	}
	for len(b) > 0 {
		if len(b) < 8 {
			return fmt.Errorf("%d bytes behind the last element", len(b))
		}
		tag, size := binary.LittleEndian.Uint32(b), uint64(binary.LittleEndian.Uint32(b[4:]))
		if size > uint64(len(b)-8) {
			return fmt.Errorf("element of %d bytes, %d left", size, len(b)-8)
		}
		if isContainer(tag) {
			if err := checkSIPA(b[8:8+size], depth+1); err != nil {
				return err
			}
		}
		b = b[8+size:]
	}
	return nil
}
