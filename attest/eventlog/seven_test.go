package eventlog_test

import (
	"encoding/binary"
	"slices"
	"testing"

	"sekisho/attest"
	"sekisho/attest/eventlog"
	"sekisho/attest/eventlog/logtest"
)

// shimVariable is a variable under shim's GUID.
func shimVariable(name string, data []byte) []byte {
	v := logtest.Variable(name, data)
	copy(v, []byte{0x50, 0xab, 0x5d, 0x60, 0x46, 0xe0, 0x00, 0x43, 0xab, 0xb6, 0x3d, 0xd8, 0x10, 0xdd, 0x8b, 0x23})
	return v
}

// TestPolicySeven: what the firmware measured of its policy, before the
// separator, gives Secure Boot's state, or nothing does.
func TestPolicySeven(t *testing.T) {
	whole := logtest.SecureBoot(1)
	without := func(i int) [][]byte { return slices.Delete(slices.Clone(whole), i, i+1) }
	with := func(more ...[]byte) [][]byte { return append(slices.Clone(whole), more...) }
	database := func(size uint32) []byte {
		b := make([]byte, 28, 44)
		binary.LittleEndian.PutUint32(b[16:], 44)
		binary.LittleEndian.PutUint32(b[24:], size)
		return logtest.Variable("dbt", append(b, make([]byte, 16)...))
	}
	for _, c := range []struct {
		name   string
		policy [][]byte
		want   attest.Reason // of the first finding that blocks
		state  eventlog.SecureBoot
	}{
		{"on", whole, 0, on},
		{"off", logtest.SecureBoot(0), 0, off},
		{"off, in setup mode: nothing but the variable", [][]byte{logtest.Variable("SecureBoot", []byte{0})}, 0, off},
		{"neither on nor off", logtest.SecureBoot(2), 0, unknown},
		{"no variable", without(0), 0, unknown},
		{"no PK: nothing is verified", without(1), 0, unknown},
		{"no KEK", without(2), 0, unknown},
		{"no db", without(3), 0, unknown},
		{"no dbx", without(4), 0, on},
		{"PK empty", append(without(1), logtest.Variable("PK", nil)), 0, unknown},
		{"variable of no byte", append(without(0), logtest.Variable("SecureBoot", nil)), 0, unknown},
		{"variable of two bytes", append(without(0), logtest.Variable("SecureBoot", []byte{1, 0})), 0, unknown},
		{"second variable", with(whole[0]), 0, unknown},
		{"second db", with(whole[3]), 0, unknown},
		{"name in other case", append(without(0), logtest.Variable("Secureboot", []byte{1})), 0, unknown},
		{"name with a NUL", append(without(0), logtest.Variable("SecureBoot\x00", []byte{1})), 0, unknown},
		{"another one's SecureBoot, off", with(shimVariable("SecureBoot", []byte{0})), 0, on},
		{"another one's SecureBoot alone", append(without(0), shimVariable("SecureBoot", []byte{1})), 0, unknown},
		{"another one's db, no signature list", with(shimVariable("db", []byte("text"))), 0, on},
		{"signature list", with(database(16)), 0, on},
		{"signatures of 256 MiB", with(database(256 << 20)), attest.ReasonLogMalformed, unknown},
		{"signatures of no bytes", with(database(0)), attest.ReasonLogMalformed, unknown},
	} {
		r := judge(t, image.BootUnder(c.policy...))
		if got := firstBlock(r); got != c.want || r.SecureBoot != c.state {
			t.Errorf("%s: %v, Secure Boot %s; want %v, %s: %+v", c.name, got, r.SecureBoot, c.want, c.state, r.Findings)
		}
	}
	for _, c := range []struct {
		name string
		kind uint32
		data []byte
		want attest.Reason
	}{
		{"SecureBoot behind the separator", eventlog.TypeVariableConfig, whole[0], attest.ReasonLogOrder},
		{"dbx behind the separator", eventlog.TypeVariableConfig, whole[4], attest.ReasonLogOrder},
		{"policy relabelled as an authority", eventlog.TypeVariableAuth, whole[0], attest.ReasonLogEventType},
		{"policy relabelled as SPDM's", eventlog.TypeSPDMDevicePolicy, whole[0], attest.ReasonLogEventType},
		{"separator relabelled as an authority", eventlog.TypeVariableAuth, make([]byte, 4), attest.ReasonLogSeparator},
		{"action of the firmware, with a NUL", eventlog.TypeEFIAction, []byte("DMA Protection Disabled\x00"), 0},
		{"shim's verification off", eventlog.TypeVariableAuth, shimVariable("MokSBState", []byte{1}), 0},
	} {
		boot := image.Boot()
		boot.Hashed(7, c.kind, c.data)
		r := judge(t, boot)
		if got := firstBlock(r); got != c.want || (got == 0) != (r.SecureBoot == on) {
			t.Errorf("%s: %v, Secure Boot %s; want %v: %+v", c.name, got, r.SecureBoot, c.want, r.Findings)
		}
	}
	boot := image.Boot()
	boot.Add(7, eventlog.TypeSPDMDevicePolicy, []byte("anything"), boot.Extensions[1].Digest)
	if r := judge(t, boot); firstBlock(r) != attest.ReasonLogEventDigest {
		t.Errorf("SPDM policy that is not what was measured: %+v", r.Findings)
	}
}

// TestSeparatorRelabelled: whatever a separator is called, events behind it are
// not the firmware's.
func TestSeparatorRelabelled(t *testing.T) {
	for pcr := range 8 {
		for _, kind := range []uint32{eventlog.TypeEFIAction, eventlog.TypeVariableAuth, eventlog.TypeSPDMDevicePolicy, eventlog.TypePostCode, eventlog.TypeIPL, eventlog.TypeTag} {
			l := logtest.New()
			for i := range 8 {
				if i == pcr {
					l.Hashed(i, kind, make([]byte, 4))
				} else {
					l.Separator(i)
				}
			}
			if r := judge(t, l); r.Verdict != refuse {
				t.Errorf("PCR %d, %s: %+v", pcr, eventlog.TypeName(kind), r.Findings)
			}
		}
	}
}
