package attester

import (
	"strings"
	"testing"
	"testing/fstest"

	"sekisho/attest"
)

func TestModel(t *testing.T) {
	file := func(s string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(s)} }
	for _, c := range []struct {
		dmi  fstest.MapFS
		want string
	}{
		{fstest.MapFS{}, ""},
		{fstest.MapFS{"sys_vendor": file("LENOVO\n"), "product_name": file("21AKS01J00\n")}, "LENOVO 21AKS01J00"},
		{fstest.MapFS{"sys_vendor": file("\x1b[31m\xff evil\n")}, "[31m evil"},
		{fstest.MapFS{"product_name": file(strings.Repeat("あ", 100))}, strings.Repeat("あ", attest.MaxModel/3)},
	} {
		if got := Model(c.dmi); got != c.want {
			t.Errorf("%q, want %q", got, c.want)
		}
	}
}
