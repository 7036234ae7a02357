package eventlog_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"strings"
	"testing"

	"sekisho/attest"
	"sekisho/attest/eventlog"
	"sekisho/attest/eventlog/logtest"
)

// valuesOf replays a log in SHA-256, with more extensions.
func valuesOf(l *logtest.Log, more ...logtest.Extension) map[int][]byte {
	values := make(map[int][]byte)
	for pcr := range 24 {
		values[pcr] = make([]byte, 32)
	}
	for _, x := range append(l.Extensions, more...) {
		v := sha256.Sum256(append(bytes.Clone(values[x.PCR]), x.Digest[:]...))
		values[x.PCR] = v[:]
	}
	for pcr := 17; pcr <= 22; pcr++ {
		if bytes.Equal(values[pcr], make([]byte, 32)) {
			values[pcr] = bytes.Repeat([]byte{0xff}, 32)
		}
	}
	return values
}

// measured are texts that user space measures into a PCR.
func measured(pcr int, texts ...string) (list []logtest.Extension) {
	for _, s := range texts {
		list = append(list, logtest.Extension{PCR: pcr, Digest: sha256.Sum256([]byte(s))})
	}
	return list
}

// TestMachines are logs as firmware and boot loaders write them that are not in
// the corpus, and what hides behind their likeness.
func TestMachines(t *testing.T) {
	sipa := nested(1)
	windows := func() *logtest.Log {
		l := image.BootUnder(logtest.SecureBoot(1)...)
		for pcr := 12; pcr <= 14; pcr++ {
			l.Hashed(pcr, eventlog.TypeTag, sipa)
		}
		return l
	}
	ones := sha256.Sum256(append(bytes.Repeat([]byte{0xff}, 32), make([]byte, 32)...))
	for _, c := range []struct {
		name string
		log  func() (*logtest.Log, map[int][]byte)
		want attest.Reason
	}{
		{"H-CRTM: locality 4, an event of its own, two of the CRTM", func() (*logtest.Log, map[int][]byte) {
			l := logtest.New()
			l.Add(0, eventlog.TypeNoAction, append([]byte("StartupLocality\x00"), 4), attest.Digest{})
			l.Extensions = nil
			l.Add(0, eventlog.TypeHCRTM, []byte("HCRTM"), attest.Digest{1})
			l.Add(0, eventlog.TypeCRTMContents, []byte("Boot Guard Measured S-CRTM"), attest.Digest{2})
			l.Hashed(0, eventlog.TypeCRTMVersion, []byte("1\x00.\x002\x00\x00\x00"))
			for pcr := range 8 {
				l.Separator(pcr)
			}
			values, zero := valuesOf(l), attest.Digest{31: 4}
			for _, x := range l.Extensions {
				if x.PCR == 0 {
					zero = sha256.Sum256(append(zero[:], x.Digest[:]...))
				}
			}
			values[0] = zero[:]
			return l, values
		}, 0},
		{"separators of ones, as BIOS and SeaBIOS write them", func() (*logtest.Log, map[int][]byte) {
			l := logtest.New()
			for pcr := range 8 {
				l.Hashed(pcr, eventlog.TypeSeparator, []byte{0xff, 0xff, 0xff, 0xff})
			}
			l.Add(4, eventlog.TypeIPL, []byte("MBR"), attest.Digest{1})
			l.Add(5, eventlog.TypeIPLPartition, []byte("partition table"), attest.Digest{2})
			return l, valuesOf(l)
		}, 0},
		{"coreboot alone: actions name what they measure, no separators", func() (*logtest.Log, map[int][]byte) {
			l := logtest.New()
			l.Add(2, eventlog.TypeAction, []byte("FMAP: COREBOOT CBFS: bootblock\x00"), attest.Digest{1})
			l.Add(3, eventlog.TypeAction, []byte("FMAP: RW_MRC_CACHE\x00"), attest.Digest{2})
			return l, valuesOf(l)
		}, 0},
		{"an action without NUL is of its text", func() (*logtest.Log, map[int][]byte) {
			l := image.Boot()
			l.Add(2, eventlog.TypeAction, []byte("Entering ROM Based Setup"), attest.Digest{1})
			return l, valuesOf(l)
		}, attest.ReasonLogEventDigest},
		{"an action of the boot loader, with NUL, is of its text", func() (*logtest.Log, map[int][]byte) {
			l := image.Boot()
			l.Add(4, eventlog.TypeAction, []byte("Booting\x00"), attest.Digest{1})
			return l, valuesOf(l)
		}, attest.ReasonLogEventDigest},
		{"action logged with the NUL that was not hashed", func() (*logtest.Log, map[int][]byte) {
			l := image.Boot()
			l.Add(5, eventlog.TypeEFIAction, []byte("Exit Boot Services Invocation\x00"), sha256.Sum256([]byte("Exit Boot Services Invocation")))
			return l, valuesOf(l)
		}, 0},
		{"GRUB, shim, Linux, systemd-stub and systemd-boot", func() (*logtest.Log, map[int][]byte) {
			l := image.Boot()
			l.Hashed(5, eventlog.TypeTag, []byte{0xf5, 0xbc, 0x82, 0xf5, 0, 0, 0, 0}) // loader.conf
			l.Add(8, eventlog.TypeIPL, []byte("grub_cmd: linux /vmlinuz\x00"), attest.Digest{1})
			l.Add(9, eventlog.TypeIPL, []byte("/vmlinuz\x00"), attest.Digest{2})
			l.Add(9, eventlog.TypeTag, []byte{0xed, 0x22, 0x3b, 0x8f, 1, 0, 0, 0, 'i'}, attest.Digest{3})
			l.Add(12, eventlog.TypeTag, []byte{0xed, 0x22, 0x3b, 0x8f, 1, 0, 0, 0, 'c'}, attest.Digest{4})
			l.Add(14, eventlog.TypeIPL, []byte("MokList\x00"), attest.Digest{5})
			return l, valuesOf(l, measured(15, "machine-id")...)
		}, 0},
		{"vendor's events in PCR 6, unknown ones in PCR 1", func() (*logtest.Log, map[int][]byte) {
			l := image.Boot()
			l.Add(6, eventlog.TypeCompactHash, []byte("Dell Configuration Information 1"), attest.Digest{1})
			l.Add(1, 0x8000f00d, nil, attest.Digest{2})
			return l, valuesOf(l)
		}, 0},
		{"phases of systemd from the initrd on", func() (*logtest.Log, map[int][]byte) {
			l := image.Boot()
			return l, valuesOf(l, measured(11, "enter-initrd", "leave-initrd", "sysinit", "ready")...)
		}, 0},
		{"phases of systemd, initrd of another kind", func() (*logtest.Log, map[int][]byte) {
			l := image.Boot()
			return l, valuesOf(l, measured(11, "sysinit", "ready")...)
		}, 0},
		{"phases out of order", func() (*logtest.Log, map[int][]byte) {
			l := image.Boot()
			return l, valuesOf(l, measured(11, "leave-initrd", "enter-initrd")...)
		}, attest.ReasonLogReplay},
		{"something behind the phases", func() (*logtest.Log, map[int][]byte) {
			l := image.Boot()
			return l, valuesOf(l, measured(11, "sysinit", "ready", "other")...)
		}, attest.ReasonLogReplay},
		{"dynamic launch: PCR 17 begins at zeros", func() (*logtest.Log, map[int][]byte) {
			l := image.Boot()
			l.Add(17, 0x502, []byte("SINIT"), attest.Digest{1})
			l.Add(18, 0x502, nil, attest.Digest{2})
			return l, valuesOf(l)
		}, 0},
		{"PCR 20 extended without a dynamic launch", func() (*logtest.Log, map[int][]byte) {
			l := image.Boot()
			l.Add(20, eventlog.TypeIPL, nil, attest.Digest{})
			values := valuesOf(l)
			values[20] = ones[:]
			return l, values
		}, 0},
		{"Windows", func() (*logtest.Log, map[int][]byte) { l := windows(); return l, valuesOf(l) }, 0},
		{"Windows, its boot configuration left out", func() (*logtest.Log, map[int][]byte) {
			l := image.Boot()
			l.Hashed(13, eventlog.TypeTag, sipa)
			return l, valuesOf(windows())
		}, attest.ReasonLogMissingEvents},
		{"extended by user space where Windows does not run", func() (*logtest.Log, map[int][]byte) {
			l := image.Boot()
			return l, valuesOf(l, append(measured(13, "a container"), measured(14, "a configuration")...)...)
		}, 0},
		{"PCR 9 extended and not in the log", func() (*logtest.Log, map[int][]byte) {
			l := image.Boot()
			return l, valuesOf(l, measured(9, "initrd")...)
		}, attest.ReasonLogMissingEvents},
	} {
		l, values := c.log()
		log, err := eventlog.Read(l.Bytes())
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		r := log.Appraise(eventlog.Options{Bank: eventlog.SHA256, PCRs: values})
		if got := firstBlock(r); got != c.want {
			t.Errorf("%s: %v, want %v: %+v", c.name, got, c.want, r.Findings)
		}
	}
	// The verifier's laptops have no systemd: nothing is forgiven.
	boot := image.Boot()
	l, err := eventlog.Parse(boot.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	phased := boot.PCRs()
	phased[11] = attest.Digest(valuesOf(boot, measured(11, "sysinit")...)[11])
	if got := reason(t, check(l, phased)); got != attest.ReasonLogReplay {
		t.Errorf("phases of systemd to the verifier: %v", got)
	}
}

// bankLog writes the events of l in other banks.
func bankLog(t *testing.T, l *logtest.Log, banks ...eventlog.Bank) ([]byte, map[int][]byte) {
	t.Helper()
	spec := []byte("Spec ID Event03\x00\x00\x00\x00\x00\x00\x02\x00\x02")
	spec = binary.LittleEndian.AppendUint32(spec, uint32(len(banks)))
	for _, b := range banks {
		size := max(b.Size(), 32) // SM3's too
		if b == eventlog.SHA1 {
			size = 20
		}
		spec = binary.LittleEndian.AppendUint16(binary.LittleEndian.AppendUint16(spec, uint16(b)), uint16(size))
	}
	out := append(make([]byte, 4), 3, 0, 0, 0)
	out = append(out, make([]byte, 20)...)
	out = binary.LittleEndian.AppendUint32(out, uint32(len(spec)+1))
	out = append(append(out, spec...), 0)
	values := make(map[int][]byte)
	log, err := eventlog.Read(l.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range log.Events {
		out = binary.LittleEndian.AppendUint32(out, uint32(e.PCR))
		out = binary.LittleEndian.AppendUint32(out, e.Type)
		out = binary.LittleEndian.AppendUint32(out, uint32(len(banks)))
		for _, b := range banks {
			out = binary.LittleEndian.AppendUint16(out, uint16(b))
			if b.Size() == 0 {
				out = append(out, make([]byte, 32)...)
				continue
			}
			out = b.Sum(out, e.Data)
		}
		out = binary.LittleEndian.AppendUint32(out, uint32(len(e.Data)))
		out = append(out, e.Data...)
		b := banks[0]
		if values[e.PCR] == nil {
			values[e.PCR] = make([]byte, b.Size())
		}
		values[e.PCR] = b.Sum(nil, b.Sum(values[e.PCR], e.Data))
	}
	return out, values
}

// TestBanks judges a boot in each bank, with others beside it.
func TestBanks(t *testing.T) {
	for _, banks := range [][]eventlog.Bank{
		{eventlog.SHA384}, {eventlog.SHA512}, {eventlog.SHA256, eventlog.SHA1}, {eventlog.SHA384, eventlog.SHA1, eventlog.SHA256, eventlog.SHA512},
		{eventlog.SHA256, 0x12}, // SM3, which nobody replays
	} {
		data, values := bankLog(t, image.Boot(), banks...)
		l, err := eventlog.Read(data)
		if err != nil {
			t.Fatalf("%v: %v", banks, err)
		}
		if r := l.Appraise(eventlog.Options{Bank: banks[0], PCRs: values}); r.Verdict != pass || r.SecureBoot != on {
			t.Errorf("%v: %s, Secure Boot %s: %+v", banks, r.Verdict, r.SecureBoot, r.Findings)
		}
		values[4][0] ^= 1
		if r := l.Appraise(eventlog.Options{Bank: banks[0], PCRs: values}); firstBlock(r) != attest.ReasonLogReplay {
			t.Errorf("%v, another PCR 4: %+v", banks, r.Findings)
		}
	}
}

// TestValues: a file of PCR values that proves nothing is none.
func TestValues(t *testing.T) {
	zeros := strings.Repeat("00", 32)
	for text, want := range map[string]bool{
		`{"sha256": {"0": "` + zeros + `"}}`:                                       true,
		`{"SHA256": {"0": "0x` + zeros + `"}, "sm3_256": {"0": "00"}, "sha1": {}}`: true,
		`{"sha256": {}}`: false, `{}`: false, `null`: false, `[]`: false, `{"sha256": {"24": "` + zeros + `"}}`: false,
		`{"sha256": {"0": "00"}}`: false, `{"sha256": {"-1": "` + zeros + `"}}`: false, `{"sha256": {"0": ""}}`: false,
		`{"sha256": {"0": "` + zeros + `"}, "SHA256": {"0": "` + zeros + `"}}`: false,
	} {
		if v, err := eventlog.ParseValues([]byte(text)); (err == nil) != want {
			t.Errorf("%s: %v, %v", text, v, err)
		}
	}
}
