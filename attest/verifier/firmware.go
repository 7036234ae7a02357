package verifier

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"strings"
	"unicode"
	"unicode/utf16"

	"sekisho/attest"
	"sekisho/attest/eventlog"
)

// Event types of the firmware profile, section 10.4.1.
const (
	typeVersion  = 0x00000008 // EV_S_CRTM_VERSION
	typeVariable = 0x80000001 // EV_EFI_VARIABLE_DRIVER_CONFIG
)

// Limits of what is read out of one event.
const (
	maxVariableName = 256     // UTF-16 units
	maxForbidden    = 8192    // entries of a dbx
	maxText         = 128     // bytes of a firmware's name for its version
	maxDiff         = 64      // changes of one result
	maxPairs        = 4 << 20 // table entries of one comparison
)

// GUIDs as UEFI writes them (UEFI 2.10, sections 3.3 and 32.4).
const (
	guidGlobal   = "61dfe48bca93d211aa0d00e098032b8c" // EFI_GLOBAL_VARIABLE
	guidSecurity = "cbb219d73a3d9645a3bcdad00e67656f" // EFI_IMAGE_SECURITY_DATABASE_GUID
	guidSHA256   = "2616c4c14c509240aca941f936934328" // EFI_CERT_SHA256_GUID
)

// variable returns the content of a UEFI variable as PCR 7 has it. Only data
// that its digest covers counts, and only the one event before the separator:
// ok is false if there is none or more than one.
func variable(l *eventlog.Log, guid, name string) (content []byte, ok bool) {
	separator := sha256.Sum256(make([]byte, 4))
	for _, e := range l.Events {
		if e.PCR != 7 {
			continue
		}
		if e.Digest == separator {
			break
		}
		if e.Type != typeVariable || e.Digest != sha256.Sum256(e.Data) {
			continue
		}
		g, n, c, valid := parseVariable(e.Data)
		if !valid || g != guid || n != name {
			continue
		}
		if ok {
			return nil, false
		}
		content, ok = c, true
	}
	return content, ok
}

// parseVariable reads a UEFI_VARIABLE_DATA (firmware profile, section 10.2.6).
func parseVariable(b []byte) (guid, name string, content []byte, ok bool) {
	if len(b) < 32 {
		return "", "", nil, false
	}
	units, size := binary.LittleEndian.Uint64(b[16:]), binary.LittleEndian.Uint64(b[24:])
	rest := b[32:]
	if units > maxVariableName || uint64(len(rest)) < 2*units || size != uint64(len(rest))-2*units {
		return "", "", nil, false
	}
	var text []uint16
	for i := range int(units) {
		text = append(text, binary.LittleEndian.Uint16(rest[2*i:]))
	}
	return hex.EncodeToString(b[:16]), string(utf16.Decode(text)), rest[2*units:], true
}

// secureBoot returns "on" or "off", or nothing if the log does not say.
func secureBoot(l *eventlog.Log) string {
	switch v, ok := variable(l, guidGlobal, "SecureBoot"); {
	case ok && bytes.Equal(v, []byte{1}):
		return "on"
	case ok && bytes.Equal(v, []byte{0}):
		return "off"
	}
	return ""
}

// forbidden returns the SHA-256 digests in dbx, in hexadecimal. ok is false if
// the log does not say or a list is malformed.
func forbidden(l *eventlog.Log) (list []string, ok bool) {
	data, ok := variable(l, guidSecurity, "dbx")
	if !ok {
		return nil, false
	}
	return signatureLists(data)
}

// signatureLists reads EFI_SIGNATURE_LISTs (UEFI 2.10, section 32.4.1) and
// returns their SHA-256 digests; lists of other types are passed over.
func signatureLists(b []byte) (list []string, ok bool) {
	const head = 28
	for len(b) > 0 {
		if len(b) < head {
			return nil, false
		}
		size, header, entry := binary.LittleEndian.Uint32(b[16:]), binary.LittleEndian.Uint32(b[20:]), binary.LittleEndian.Uint32(b[24:])
		if uint64(size) > uint64(len(b)) || uint64(size) < head+uint64(header) {
			return nil, false
		}
		body := b[head+header : size]
		if hex.EncodeToString(b[:16]) == guidSHA256 {
			if entry != 16+sha256.Size || len(body)%int(entry) != 0 || len(list)+len(body)/int(entry) > maxForbidden {
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

// firmwareVersion is how the firmware calls itself, a hint.
func firmwareVersion(l *eventlog.Log) string {
	for _, e := range l.Events {
		if e.PCR == 0 && e.Type == typeVersion {
			return label(e.Data)
		}
	}
	return ""
}

// label reads the text in an event's data, UTF-16 or ASCII; nothing if it is
// no text.
func label(data []byte) string {
	if len(data) > 2*maxText {
		return ""
	}
	text := string(data)
	if len(data) >= 2 && len(data)%2 == 0 && data[1] == 0 {
		var units []uint16
		for i := 0; i < len(data); i += 2 {
			units = append(units, binary.LittleEndian.Uint16(data[i:]))
		}
		text = string(utf16.Decode(units))
	}
	text = strings.TrimRight(text, "\x00")
	if strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return ""
	}
	return text
}

// Diff says what an event log has that an older one had not, and the other way
// round, PCR by PCR in the order of events; at most 64 changes. A log that
// cannot be read differs in nothing that could be named.
func Diff(before, after []byte) []attest.Change {
	old, err := eventlog.Parse(before)
	if err != nil {
		return nil
	}
	now, err := eventlog.Parse(after)
	if err != nil {
		return nil
	}
	var list []attest.Change
	for pcr := range 24 {
		list = append(list, diff(of(old, pcr), of(now, pcr))...)
	}
	return list[:min(len(list), maxDiff)]
}

func of(l *eventlog.Log, pcr int) (list []eventlog.Event) {
	for _, e := range l.Events {
		if e.PCR == pcr {
			list = append(list, e)
		}
	}
	return list
}

// diff compares by the longest common subsequence of digests. An event that is
// gone and one that stands in its place are one change.
func diff(a, b []eventlog.Event) (list []attest.Change) {
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
			list = append(list, attest.Change{PCR: b[j].PCR, Number: b[j].Number, Type: b[j].Type, Event: label(b[j].Data), Was: a[i].Digest.String(), Is: b[j].Digest.String()})
			i, j = i+1, j+1
		case gone:
			list = append(list, attest.Change{PCR: a[i].PCR, Number: a[i].Number, Type: a[i].Type, Event: label(a[i].Data), Was: a[i].Digest.String()})
			i++
		case come:
			list = append(list, attest.Change{PCR: b[j].PCR, Number: b[j].Number, Type: b[j].Type, Event: label(b[j].Data), Is: b[j].Digest.String()})
			j++
		default:
			i, j = i+1, j+1
		}
	}
	return list
}

// common marks the events of a longest common subsequence. Logs so different
// that the table would be large have nothing in common.
func common(a, b []eventlog.Event) (keepA, keepB []bool) {
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
