package eventlog

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"strings"
	"testing"
)

// textLog is a log of events in PCR 5, each the text that it measures.
func textLog(words ...string) []byte {
	spec := []byte("Spec ID Event03\x00\x00\x00\x00\x00\x00\x02\x00\x02\x01\x00\x00\x00\x0b\x00\x20\x00\x00")
	b := binary.LittleEndian.AppendUint32(nil, 0)
	b = binary.LittleEndian.AppendUint32(b, TypeNoAction)
	b = append(b, make([]byte, 20)...)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(spec)))
	b = append(b, spec...)
	for _, w := range words {
		digest := sha256.Sum256([]byte(w))
		for _, v := range []uint32{5, 1, 1} { // PCR, type, digests
			b = binary.LittleEndian.AppendUint32(b, v)
		}
		b = binary.LittleEndian.AppendUint16(b, uint16(SHA256))
		b = append(b, digest[:]...)
		b = binary.LittleEndian.AppendUint32(b, uint32(len(w)))
		b = append(b, w...)
	}
	return b
}

func TestDiff(t *testing.T) {
	for _, c := range []struct {
		a, b []string
		want string
	}{
		{[]string{"a", "b", "c"}, []string{"a", "b", "c"}, ""},
		{[]string{"a", "b", "c"}, []string{"a", "x", "c"}, "~x"},
		{[]string{"a", "c"}, []string{"a", "b", "c"}, "+b"},
		{[]string{"a", "b", "c"}, []string{"a", "c"}, "-b"},
		{[]string{"a", "b"}, []string{"b", "a"}, "-a +a"},
		{nil, []string{"a"}, "+a"},
	} {
		var got []string
		for _, d := range Diff(textLog(c.a...), textLog(c.b...)) {
			sign := "~"
			if d.Was == "" {
				sign = "+"
			} else if d.Is == "" {
				sign = "-"
			}
			got = append(got, sign+d.Event)
		}
		if s := strings.Join(got, " "); s != c.want {
			t.Errorf("%v to %v: %q, want %q", c.a, c.b, s, c.want)
		}
	}
}

func TestForbidden(t *testing.T) {
	list := func(entries int) []byte {
		b, _ := hex.DecodeString(guidSHA256)
		b = binary.LittleEndian.AppendUint32(b, uint32(28+48*entries))
		b = binary.LittleEndian.AppendUint32(b, 0)
		b = binary.LittleEndian.AppendUint32(b, 48)
		for i := range entries {
			b = append(b, make([]byte, 16)...)
			b = append(b, append([]byte{byte(i)}, make([]byte, 31)...)...)
		}
		return b
	}
	if got, ok := forbidden(append(list(2), list(1)...)); !ok || len(got) != 3 || !strings.HasPrefix(got[1], "0100") {
		t.Errorf("%v %v", got, ok)
	}
	for name, bad := range map[string][]byte{
		"truncated": list(1)[:60], "no head": list(1)[:20], "size below head": append(list(0)[:16], make([]byte, 12)...),
	} {
		if _, ok := forbidden(bad); ok {
			t.Errorf("%s: accepted", name)
		}
	}
}

func FuzzForbidden(f *testing.F) {
	f.Add(make([]byte, 28))
	f.Fuzz(func(t *testing.T, data []byte) {
		if list, ok := forbidden(data); ok && len(list) > len(data)/48 {
			t.Errorf("%d entries in %d bytes", len(list), len(data))
		}
		shown(Event{Data: data})
	})
}
