package eventlog

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"strings"
	"unicode"

	"sekisho/attest"
)

const (
	typeVersion  uint32 = 0x00000008 // EV_S_CRTM_VERSION, section 10.4.1
	maxForbidden        = 8192       // entries of a dbx
	maxText             = 128        // bytes of a text that is shown
)

// GUIDs as UEFI lays them out (UEFI 2.10, section 32.4.1), in hexadecimal.
const (
	guidSecurity = "cbb219d73a3d9645a3bcdad00e67656f" // EFI_IMAGE_SECURITY_DATABASE_GUID
	guidSHA256   = "2616c4c14c509240aca941f936934328" // EFI_CERT_SHA256_GUID
)

// SecureBoot is what the SHA-256 bank's PCR 7 says. Check must have passed.
func (l *Log) SecureBoot() SecureBoot { return l.secureBoot(SHA256) }

// Forbidden returns the SHA-256 digests in dbx, in hexadecimal, as the one
// event of PCR 7 before the separator has it. ok is false if there is none or
// more than one, if its digest does not cover it, or if it is malformed. Check
// must have passed.
func (l *Log) Forbidden() (list []string, ok bool) {
	var data []byte
	for i := range l.Events {
		e := &l.Events[i]
		if e.PCR != 7 {
			continue
		}
		if e.Type == TypeSeparator {
			break
		}
		if e.Type != TypeVariableConfig {
			continue
		}
		v, err := parseVariable(e.Data, 0)
		if err != nil || v.name != "dbx" || hex.EncodeToString(v.guid[:]) != guidSecurity {
			continue
		}
		if ok || e.Digest != sha256.Sum256(e.Data) {
			return nil, false
		}
		data, ok = v.data, true
	}
	if !ok {
		return nil, false
	}
	return forbidden(data)
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
		if e.PCR == 0 && e.Type == typeVersion {
			return shown(e)
		}
	}
	return ""
}

// shown is an event's label if people can read it.
func shown(e Event) string {
	s := e.label()
	if len(s) > maxText || strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return ""
	}
	return s
}

// Limits of a comparison.
const (
	maxDiff  = 64      // changes
	maxPairs = 4 << 20 // entries of the table of one PCR
)

// Diff says what an event log has that an older one had not, and the other way
// round, PCR by PCR in the order of events; at most 64 changes. A log that
// cannot be read differs in nothing that could be named.
func Diff(before, after []byte) []attest.Change {
	old, err := Parse(before)
	if err != nil {
		return nil
	}
	now, err := Parse(after)
	if err != nil {
		return nil
	}
	var list []attest.Change
	for pcr := range 24 {
		list = append(list, diff(eventsOf(old, pcr), eventsOf(now, pcr))...)
	}
	return list[:min(len(list), maxDiff)]
}

func eventsOf(l *Log, pcr int) (list []Event) {
	for _, e := range l.Events {
		if e.PCR == pcr {
			list = append(list, e)
		}
	}
	return list
}

// diff compares by the longest common subsequence of digests. An event that is
// gone and one that stands in its place are one change.
func diff(a, b []Event) (list []attest.Change) {
	for len(a) > 0 && len(b) > 0 && a[0].Digest == b[0].Digest {
		a, b = a[1:], b[1:]
	}
	for len(a) > 0 && len(b) > 0 && a[len(a)-1].Digest == b[len(b)-1].Digest {
		a, b = a[:len(a)-1], b[:len(b)-1]
	}
	keepA, keepB := common(a, b)
	i, j := 0, 0
	for i < len(a) || j < len(b) {
		gone, come := i < len(a) && !keepA[i], j < len(b) && !keepB[j]
		switch {
		case gone && come:
			list = append(list, attest.Change{PCR: b[j].PCR, Number: b[j].Number, Type: b[j].Type, Event: shown(b[j]), Was: a[i].Digest.String(), Is: b[j].Digest.String()})
			i, j = i+1, j+1
		case gone:
			list = append(list, attest.Change{PCR: a[i].PCR, Number: a[i].Number, Type: a[i].Type, Event: shown(a[i]), Was: a[i].Digest.String()})
			i++
		case come:
			list = append(list, attest.Change{PCR: b[j].PCR, Number: b[j].Number, Type: b[j].Type, Event: shown(b[j]), Is: b[j].Digest.String()})
			j++
		default:
			i, j = i+1, j+1
		}
	}
	return list
}

// common marks the events of a longest common subsequence. Logs so different
// that the table would be large have nothing in common.
func common(a, b []Event) (keepA, keepB []bool) {
	keepA, keepB = make([]bool, len(a)), make([]bool, len(b))
	if (len(a)+1)*(len(b)+1) > maxPairs {
		return keepA, keepB
	}
	width := len(b) + 1
	length := make([]uint16, (len(a)+1)*width)
	for i := len(a) - 1; i >= 0; i-- {
		for j := len(b) - 1; j >= 0; j-- {
			if a[i].Digest == b[j].Digest {
				length[i*width+j] = length[(i+1)*width+j+1] + 1
			} else {
				length[i*width+j] = max(length[(i+1)*width+j], length[i*width+j+1])
			}
		}
	}
	for i, j := 0, 0; i < len(a) && j < len(b); {
		switch {
		case a[i].Digest == b[j].Digest:
			keepA[i], keepB[j] = true, true
			i, j = i+1, j+1
		case length[(i+1)*width+j] >= length[i*width+j+1]:
			i++
		default:
			j++
		}
	}
	return keepA, keepB
}
