package eventlog

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"strings"
	"unicode/utf16"

	"sekisho/attest"
)

// Comparison is how a boot differs from one image's reference values.
type Comparison struct {
	Reference *attest.ReferenceValues
	Match     bool             // every final PCR value is the reference's
	Findings  []attest.Finding // what differs, most telling first
	Known     int              // components of the reference that were seen
}

// Compare compares a boot with reference values. The final PCR values alone
// decide; the components only say in words which part differs. Check must
// have passed.
func (l *Log) Compare(pcrs map[int]attest.Digest, ref *attest.ReferenceValues) Comparison {
	c := Comparison{Reference: ref, Match: len(ref.PCRs) > 0}
	wrong := make(map[int]bool)
	for _, i := range attest.QuotedPCRs {
		if want, ok := ref.PCRs[i]; ok && pcrs[i] != want {
			wrong[i], c.Match = true, false
		}
	}
	// A reference value for a PCR that no quote covers can never be met.
	for i := range ref.PCRs {
		if _, quoted := pcrs[i]; !quoted {
			wrong[i], c.Match = true, false
		}
	}
	named := make(map[int]bool)
	for _, comp := range ref.Components {
		seen, ok := l.find(comp)
		if ok {
			c.Known++
			continue
		}
		named[comp.PCR] = true
		c.Findings = append(c.Findings, attest.Finding{
			Reason: attest.ReasonImageMismatch, Component: comp.Name, PCR: comp.PCR, Event: comp.Event,
			Expected: comp.Digest.String(), Seen: seen,
		})
	}
	sortFindings(c.Findings)
	for _, i := range attest.QuotedPCRs {
		if !wrong[i] || named[i] {
			continue
		}
		reason, name := attest.ReasonImageMismatch, ""
		if i == 7 {
			reason, name = attest.ReasonSecureBoot, "Secure Boot"
		}
		c.Findings = append(c.Findings, attest.Finding{
			Reason: reason, Component: name, PCR: i,
			Expected: ref.PCRs[i].String(), Seen: pcrs[i].String(),
		})
	}
	return c
}

// find looks for the event of a component. seen is the digest that stands in
// its place, empty if nothing does.
//
// systemd-stub measures each section of a UKI twice: its name with the final
// NUL, then its content, both with the name as event data
// (src/boot/stub.c, measure_sections).
func (l *Log) find(comp attest.Component) (seen string, ok bool) {
	name := sha256.Sum256(append([]byte(comp.Event), 0))
	var candidates []Event
	for _, e := range l.Events {
		if e.PCR != comp.PCR {
			continue
		}
		if e.Digest == comp.Digest {
			return e.Digest.String(), true
		}
		switch {
		case comp.Event != "":
			if e.label() == comp.Event && e.Digest != attest.Digest(name) {
				candidates = append(candidates, e)
			}
		case e.Type == TypeApplication:
			candidates = append(candidates, e)
		}
	}
	if len(candidates) == 0 {
		return "", false
	}
	return candidates[0].Digest.String(), false
}

// label reads the text by which the one who measured names the event. Linux's
// EFI boot code puts it in a tagged event: identifier, size, text
// (drivers/firmware/efi/libstub/efi-stub-helper.c of the kernel).
func (e Event) label() string {
	if e.Type == TypeTag && len(e.Data) >= 8 && int(binary.LittleEndian.Uint32(e.Data[4:])) == len(e.Data)-8 {
		return text(e.Data[8:])
	}
	return text(e.Data)
}

// text reads a short text: ASCII, or UTF-16LE as systemd-stub writes it.
func text(data []byte) string {
	if len(data) > 512 {
		return ""
	}
	if len(data) >= 2 && len(data)%2 == 0 && data[1] == 0 {
		units := make([]uint16, 0, len(data)/2)
		for i := 0; i < len(data); i += 2 {
			units = append(units, binary.LittleEndian.Uint16(data[i:]))
		}
		return strings.TrimRight(string(utf16.Decode(units)), "\x00")
	}
	return string(bytes.TrimRight(data, "\x00"))
}

// sortFindings puts what people change first: kernel, initramfs, command line,
// then other sections of PCR 11, then what merely follows from them.
func sortFindings(f []attest.Finding) {
	rank := func(f attest.Finding) int {
		switch {
		case f.Component == "kernel" && f.PCR == 11:
			return 0
		case f.Component == "initramfs" && f.PCR == 11:
			return 1
		case f.Component == "cmdline" && f.PCR == 11:
			return 2
		case f.PCR == 11:
			return 3
		}
		return 4 + f.PCR
	}
	slices.SortStableFunc(f, func(a, b attest.Finding) int { return cmp.Compare(rank(a), rank(b)) })
}

// Judge compares a boot with every image that may be accepted and returns the
// one that matches or, if none does, a *attest.Refusal with the findings
// against the nearest.
func (l *Log) Judge(pcrs map[int]attest.Digest, refs []attest.ReferenceValues) (*attest.ReferenceValues, []attest.Finding, error) {
	if len(refs) == 0 {
		return nil, nil, attest.Refuse(attest.ReasonNoReferenceValues, "the verifier has no reference values; add those of a release")
	}
	var nearest Comparison
	for i := range refs {
		c := l.Compare(pcrs, &refs[i])
		if c.Match {
			return &refs[i], nil, nil
		}
		if nearest.Reference == nil || c.Known > nearest.Known ||
			c.Known == nearest.Known && len(c.Findings) < len(nearest.Findings) {
			nearest = c
		}
	}
	if nearest.Known == 0 && len(nearest.Reference.Components) > 0 || len(nearest.Findings) == 0 {
		return nil, nearest.Findings, attest.Refuse(attest.ReasonImageUnknown, "image not in the reference values; the nearest is %s %s", nearest.Reference.Image, nearest.Reference.Version)
	}
	var parts []string
	for _, f := range nearest.Findings {
		// PCR 4 and 9 hold the same parts again: they add no word.
		if len(parts) > 0 && (f.PCR == 4 || f.PCR == 9) && nearest.Findings[0].PCR == 11 {
			continue
		}
		parts = append(parts, f.String())
	}
	return nil, nearest.Findings, &attest.Refusal{Reason: nearest.Findings[0].Reason, Detail: strings.Join(parts, "; ")}
}
