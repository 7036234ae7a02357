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

// phases are what systemd measures into PCR 11 while the system starts and ends
// (systemd-pcrphase.service(8)).
var phases = []string{"enter-initrd", "leave-initrd", "sysinit", "ready", "shutdown", "final"}

// quirk reports whether value is what the events give but for a known and
// harmless gap in logs of real machines. Each changes nothing but what the gap
// itself is, and is reported.
func (a *appraisal) quirk(pcr int, value []byte) bool {
	switch {
	case pcr == 0 && !a.pcrs[0].locality:
		// The startup locality was left out.
		for _, at := range []byte{3, 4} {
			var start [64]byte
			start[a.Bank.Size()-1] = at
			if bytes.Equal(value, a.from(0, start)) {
				a.findPCR(attest.SeverityWarn, attest.ReasonLogOrder, 0, say("PCR 0 はローカリティ %d から始まりましたが、イベントログに記録がありません。", "PCR 0 began at locality %d and the event log does not say so", at))
				return true
			}
		}
	case pcr == 5:
		// The log was read before the firmware wrote its last events
		// (google/go-attestation, ebs_event_missing).
		if !a.hasAction(5, exitInvoked) && a.endsWith(5, value, []string{exitInvoked, exitDone}, []string{exitInvoked, exitFailed}, []string{exitInvoked, exitFailed, exitDone}) {
			a.findPCR(attest.SeverityWarn, attest.ReasonLogMissingEvents, 5, say("PCR 5 にあるブートサービスの終了が、イベントログにありません。", "the event log leaves out the end of boot services, which PCR 5 has"))
			return true
		}
	case pcr == 11 && !a.Complete:
		// A unified kernel image of systemd: its sections are in the firmware's
		// log, the phases that follow are not.
		var ends [][]string
		for from := range phases {
			for to := from; to < len(phases); to++ {
				ends = append(ends, phases[from:to+1])
			}
		}
		if a.endsWith(11, value, ends...) {
			a.findPCR(attest.SeverityWarn, attest.ReasonLogMissingEvents, 11, say("PCR 11 には systemd の起動段階も記録されていますが、ファームウェアのログには現れません。", "PCR 11 holds the phases of systemd's start as well, which a firmware log does not show"))
			return true
		}
	case pcr >= 17 && pcr <= 22:
		// Extended without a dynamic launch, which would have reset it to zeros.
		return bytes.Equal(value, a.from(pcr, [64]byte(bytes.Repeat([]byte{0xff}, 64))))
	}
	return false
}

// endsWith reports whether the events of a PCR and then one of ends, texts that
// are measured as such, give value.
func (a *appraisal) endsWith(pcr int, value []byte, ends ...[]string) bool {
	for _, end := range ends {
		var more [][]byte
		for _, text := range end {
			more = append(more, a.Bank.Sum(nil, []byte(text)))
		}
		if bytes.Equal(value, a.from(pcr, [64]byte{}, more...)) {
			return true
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
