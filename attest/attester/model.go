package attester

import (
	"io/fs"
	"strings"
	"unicode"

	"sekisho/attest"
)

// Model is the machine's maker and model as Linux shows the firmware's SMBIOS
// tables in dmi, /sys/class/dmi/id; empty if it shows nothing. By it the
// verifier tells which firmware is common on which machines; it opens nothing.
func Model(dmi fs.FS) string {
	var words []string
	for _, name := range []string{"sys_vendor", "product_name"} {
		if data, err := fs.ReadFile(dmi, name); err == nil {
			words = append(words, strings.FieldsFunc(string(data), func(r rune) bool {
				return unicode.IsSpace(r) || !unicode.IsPrint(r) || r == unicode.ReplacementChar
			})...)
		}
	}
	s := strings.Join(words, " ")
	return strings.ToValidUTF8(s[:min(len(s), attest.MaxModel)], "")
}
