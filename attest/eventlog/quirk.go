package eventlog

import (
	"bytes"
	"encoding/binary"
	"unicode/utf16"

	"sekisho/attest"
)

// The end of boot services, as section 3.3.4.6 has it in PCR 5.
const (
	exitInvoked = "Exit Boot Services Invocation"
	exitDone    = "Exit Boot Services Returned with Success"
	exitFailed  = "Exit Boot Services Returned with Failure"
)

// quirk reports whether value is what the events give but for a known and
// harmless gap in logs of real machines. Each changes nothing but what the gap
// itself is, and is reported.
func (a *appraisal) quirk(pcr int, value []byte) bool {
	switch pcr {
	case 0:
		// The startup locality was left out.
		for _, at := range []byte{3, 4} {
			if !a.pcrs[0].locality && bytes.Equal(value, a.from(0, at)) {
				a.findPCR(attest.SeverityWarn, attest.ReasonLogOrder, 0, say("PCR 0 はローカリティ %d から始まりましたが、イベントログに記録がありません。", "PCR 0 began at locality %d and the event log does not say so", at))
				return true
			}
		}
	case 5:
		// The log was read before the firmware wrote its last events
		// (google/go-attestation, ebs_event_missing).
		if a.hasAction(5, exitInvoked) {
			return false
		}
		for _, end := range [][]string{{exitInvoked, exitDone}, {exitInvoked, exitFailed}, {exitInvoked, exitFailed, exitDone}} {
			var more [][]byte
			for _, action := range end {
				more = append(more, a.Bank.Sum(nil, []byte(action)))
			}
			if bytes.Equal(value, a.from(5, 0, more...)) {
				a.findPCR(attest.SeverityWarn, attest.ReasonLogMissingEvents, 5, say("PCR 5 にあるブートサービスの終了が、イベントログにありません。", "the event log leaves out the end of boot services, which PCR 5 has"))
				return true
			}
		}
	}
	return false
}

func (a *appraisal) hasAction(pcr int, action string) bool {
	for i := range a.Events {
		if e := &a.Events[i]; e.PCR == pcr && e.Type == TypeEFIAction && string(e.Data) == action {
			return true
		}
	}
	return false
}

// isHPE reports whether this is a server of HPE, whose logs do not give PCR 0
// (ProLiant DL160 Gen10, ROM U31 2.58). It goes by what PCR 7 proves, HPE's
// platform key, and by the name of the ROM in PCR 0. Who owns a machine can
// enrol a key of any name: so this only lowers a finding to degrade, which the
// verifier refuses all the same.
func (a *appraisal) isHPE() bool {
	seven, given := a.PCRs[7]
	if !given || !bytes.Equal(seven, a.pcrs[7].value[:a.Bank.Size()]) {
		return false
	}
	rom, key := false, false
	for i := range a.Events {
		e := &a.Events[i]
		switch {
		case e.PCR == 0 && e.Type == TypeCRTMVersion:
			rom = isHPEROM(e.Data)
		case e.PCR == 7 && e.Type == TypeVariableConfig && bytes.Equal(e.DigestIn(a.Bank), a.Bank.Sum(nil, e.Data)):
			v, err := parseVariable(e.Data, 0)
			if err == nil && v.guid == globalVariable && v.name == "PK" {
				key = bytes.Contains(v.data, []byte("Hewlett Packard Enterprise"))
			}
		}
	}
	return rom && key
}

// isHPEROM reads names such as "U31 v2.58 (11/24/2021)".
func isHPEROM(data []byte) bool {
	units := make([]uint16, 0, 32)
	for i := 0; i+1 < len(data) && len(units) < 32; i += 2 {
		units = append(units, binary.LittleEndian.Uint16(data[i:]))
	}
	name := string(utf16.Decode(units))
	return len(name) > 6 && name[0] >= 'A' && name[0] <= 'Z' && name[3:5] == " v"
}
