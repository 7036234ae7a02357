package eventlog

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"slices"

	"sekisho/attest"
)

// placed lists, for PCR 0 to 7, the event types that belong there besides
// EV_SEPARATOR (sections 3.3.4 and 10.4.1).
func placed(pcr int) []uint32 {
	switch pcr {
	case 0:
		return []uint32{TypePostCode, TypePostCode2, TypeAction, TypeEFIAction, TypeTag, TypeCRTMContents, TypeCRTMVersion, TypeMicrocode,
			TypeNonhostCode, TypeNonhostInfo, TypeCompactHash, TypeBootDriver, TypeRuntimeDriver, TypeFirmwareBlob, TypeFirmwareBlob2,
			TypeHandoffTables, TypeHandoffTables2, TypeHCRTM}
	case 1:
		return []uint32{TypeAction, TypeEFIAction, TypeTag, TypeMicrocode, TypeConfigFlags, TypeTableOfDevices, TypeCompactHash, TypeNonhostConfig,
			TypePostCode, TypeVariableConfig, TypeVariableBoot, TypeVariableBoot2, TypeHandoffTables, TypeHandoffTables2, TypeSPDMConfig}
	case 2:
		return []uint32{TypePostCode, TypePostCode2, TypeAction, TypeEFIAction, TypeTag, TypeNonhostCode, TypeNonhostInfo, TypeCompactHash,
			TypeApplication, TypeBootDriver, TypeRuntimeDriver, TypeFirmwareBlob, TypeFirmwareBlob2, TypeSPDMBlob}
	case 3:
		return []uint32{TypeAction, TypeEFIAction, TypeTag, TypeNonhostConfig, TypeNonhostInfo, TypeConfigFlags, TypeVariableConfig,
			TypeHandoffTables, TypeHandoffTables2, TypeSPDMConfig}
	case 4:
		return []uint32{TypeAction, TypeEFIAction, TypeCompactHash, TypeIPL, TypeOmitBootDevice, TypeApplication, TypeBootDriver, TypeRuntimeDriver}
	case 5:
		return []uint32{TypeAction, TypeEFIAction, TypeTag, TypeCompactHash, TypeIPL, TypeIPLPartition, TypeGPT, TypeGPT2,
			TypeVariableConfig, TypeVariableBoot, TypeVariableBoot2}
	case 6:
		return []uint32{TypeAction, TypeEFIAction, TypeTag, TypeCompactHash, TypeNonhostInfo}
	case 7:
		return []uint32{TypeEFIAction, TypeVariableConfig, TypeVariableAuth, TypeSPDMDevicePolicy, TypeSPDMDeviceAuth}
	}
	return nil
}

// separates returns a function that reports by digest whether an event is a
// separator: one of another type with a separator's digest is as good as a
// separator to a PCR.
func (b Bank) separates() func(*Event) bool {
	zeros, ones := b.Sum(nil, []byte{0, 0, 0, 0}), b.Sum(nil, []byte{0xff, 0xff, 0xff, 0xff})
	return func(e *Event) bool {
		d := e.DigestIn(b)
		return bytes.Equal(d, zeros) || bytes.Equal(d, ones)
	}
}

// separators demands one separator in each of PCR 0 to 7.
func (a *appraisal) separators() {
	separates := a.Bank.separates()
	var count [8]int
	for i := range a.Events {
		e := &a.Events[i]
		if e.PCR > 7 {
			continue
		}
		switch {
		case separates(e):
			count[e.PCR]++
			if e.Type != TypeSeparator {
				a.findEvent(attest.SeverityBlock, attest.ReasonLogSeparator, e, say("PCR %d の区切りが種類 %s に書き換えられています。", "separator of PCR %d, relabelled as %s", e.PCR, TypeName(e.Type)))
			}
		case e.Type != TypeSeparator:
		case len(e.Data) > 0 && len(e.Data) != 4 && padding(e.Data) && bytes.Equal(e.DigestIn(a.Bank), a.Bank.Sum(nil, e.Data)):
			// Firmware before UEFI wrote one byte (guard-binary_bios_measurements_27).
			count[e.PCR]++
			a.findEvent(attest.SeverityDegrade, attest.ReasonLogSeparator, e, say("PCR %d の区切りが %d バイトです（4 バイトが正しい）。", "separator of PCR %d of %d bytes, want 4", e.PCR, len(e.Data)))
		default:
			a.findEvent(attest.SeverityBlock, attest.ReasonLogSeparator, e, say("PCR %d の区切りが正しい値ではありません。ファームウェアがエラーを報告しています。", "separator of PCR %d is not a legal one; the firmware reported an error", e.PCR))
			count[e.PCR]++
		}
	}
	low := 0 // of PCR 0 to 6 that have one
	for _, n := range count[:7] {
		low += min(n, 1)
	}
	for pcr, n := range count {
		switch {
		case n > 1:
			a.findPCR(attest.SeverityBlock, attest.ReasonLogSeparator, pcr, say("PCR %d に区切りが %d 個あります（1 個が正しい）。", "PCR %d has %d separators, want 1", pcr, n))
		case n == 1, pcr < 7 && low == 0:
		case low == 0 && (a.PCRs == nil || a.pcrs[pcr].events == 0): // a value without events was judged above
		case a.pcrs[pcr].events == 0 && a.PCRs[pcr] == nil:
			a.findPCR(attest.SeverityBlock, attest.ReasonLogSeparator, pcr, say("PCR %d には値もイベントもありません。ログの一部だけです。", "PCR %d has neither a value nor an event: the log is a piece of one", pcr))
		default:
			a.findPCR(attest.SeverityBlock, attest.ReasonLogSeparator, pcr, say("PCR %d に区切りがありません。ファームウェアの処理が正しく終わっていません。", "PCR %d has no separator: firmware did not end there as it must", pcr))
		}
	}
	if low == 0 {
		// A piece of a log; or firmware that separates PCR 7 alone (Google's
		// first shielded machines, goattestation-sb_cert_eventlog) or nothing
		// (coreboot).
		a.find(attest.SeverityDegrade, attest.ReasonLogSeparator, say("PCR 0 から 6 のどれにも区切りがありません。ファームウェアとその後の処理を区別できません。", "none of PCR 0 to 6 has a separator: the log does not tell the firmware from what came after it"))
	}
}

// rules judges each event by its type, place and data.
func (a *appraisal) rules() {
	var lists [8][]uint32
	for pcr := range lists {
		lists[pcr] = placed(pcr)
	}
	called := false // the boot manager has called the first application
	seven := seven{appraisal: a, separates: a.Bank.separates(), seen: make(map[string]bool)}
	for i := range a.Events {
		e := &a.Events[i]
		if e.PCR <= 7 && e.Type != TypeSeparator && !slices.Contains(lists[e.PCR], e.Type) {
			severity := attest.SeverityWarn
			if e.PCR == 4 || e.PCR == 7 {
				severity = attest.SeverityBlock
			}
			a.findEvent(severity, attest.ReasonLogEventType, e, say("種類 %s のイベントは PCR %d にあるはずがありません。", "type %s does not belong into PCR %d", TypeName(e.Type), e.PCR))
			continue
		}
		if !a.covers(e) {
			severity, then := attest.SeverityBlock, say("ログの内容が書き換えられています。", ": the data in the log was changed")
			if e.Type == TypeCRTMVersion { // Dell and others hash something else
				severity, then = attest.SeverityWarn, say("記載されたバージョンは信用できません。", ": do not believe the version that it names")
			}
			f := a.findEvent(severity, attest.ReasonLogEventDigest, e, joined(say("ダイジェストが内容と一致しません。", "its digest is not that of its data"), then))
			f.Expected, f.Seen = hex.EncodeToString(e.DigestIn(a.Bank)), hex.EncodeToString(a.Bank.Sum(nil, e.Data))
			continue
		}
		switch {
		case e.PCR == 7:
			seven.judge(e)
		case e.PCR == 4 && e.Type == TypeEFIAction:
			called = true
		case e.PCR == 4 && e.Type == TypeApplication && !called:
			called = true // say it once
			a.findEvent(attest.SeverityWarn, attest.ReasonLogOrder, e, say("ブートマネージャーが宣言する前にアプリケーションが起動されています。", "an application was started before the boot manager said that it calls one"))
		case e.PCR >= 11 && e.PCR <= 14 && e.Type == TypeTag:
			if err := checkSIPA(e.Data, 0); sipaTag(e) && err != nil {
				a.findEvent(attest.SeverityBlock, attest.ReasonLogMalformed, e, say("Windows のイベントを読み取れません（%v）。", "Windows' event: %v", err))
			}
		}
	}
}

// sipaTag reports whether e's data begins as a SIPA event does.
func sipaTag(e *Event) bool {
	return len(e.Data) >= 8 && isSIPA(binary.LittleEndian.Uint32(e.Data))
}

// covers recomputes e's digest if its type says that it is of its data
// (section 10.4.1). Two forms are allowed where firmware of both is about.
func (a *appraisal) covers(e *Event) bool {
	want := e.DigestIn(a.Bank)
	is := func(data []byte) bool {
		var buf [64]byte
		return bytes.Equal(a.Bank.Sum(buf[:0], data), want)
	}
	switch e.Type {
	case TypeSeparator, TypeGPT, TypeCRTMVersion:
		return is(e.Data)
	case TypeEFIAction:
		return is(e.Data) || is(bytes.TrimRight(e.Data, "\x00")) // a NUL that was logged and not hashed
	case TypeAction:
		// coreboot names by it what it measures, with a final NUL that no action
		// of the profile has (src/security/tpm/tspi/log-tpm2.c of coreboot).
		return is(e.Data) || e.PCR < 4 && bytes.HasSuffix(e.Data, []byte{0})
	case TypeSPDMDevicePolicy, TypeSPDMDeviceAuth:
		return is(e.Data) // a UEFI_VARIABLE_DATA (section 10.4.1)
	case TypeVariableConfig:
		return is(e.Data) || e.PCR != 7 && a.coversValue(e, is)
	case TypeVariableBoot, TypeVariableBoot2:
		return is(e.Data) || a.coversValue(e, is) // EDK II before 2019 hashed the value alone
	case TypeVariableAuth:
		// shim before 15.3 logged one byte more than it hashed, see maxShimRest.
		return is(e.Data) || len(e.Data) > 0 && is(e.Data[:len(e.Data)-1])
	case TypeTag:
		return e.PCR < 11 || e.PCR > 14 || !sipaTag(e) || is(e.Data)
	}
	return true
}

func (a *appraisal) coversValue(e *Event, is func([]byte) bool) bool {
	v, err := parseVariable(e.Data, 0)
	return err == nil && is(v.data)
}
