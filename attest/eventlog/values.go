package eventlog

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
)

// MaxValues bounds a file of PCR values, in bytes.
const MaxValues = 64 << 10

// ParseValues reads PCR values from JSON: {"sha256": {"0": "hexadecimal"}}.
// Banks that cannot be replayed are left out.
func ParseValues(data []byte) (map[Bank]map[int][]byte, error) {
	if len(data) > MaxValues {
		return nil, fmt.Errorf("PCR values: %d bytes, at most %d", len(data), MaxValues)
	}
	var text map[string]map[int]string
	if err := json.Unmarshal(data, &text); err != nil {
		return nil, fmt.Errorf("PCR values: %w; want {\"sha256\": {\"0\": \"hexadecimal\"}}", err)
	}
	out := make(map[Bank]map[int][]byte)
	for name, pcrs := range text {
		b, err := ParseBank(strings.ToLower(name))
		if err != nil || len(pcrs) == 0 {
			continue
		}
		if out[b] != nil {
			return nil, fmt.Errorf("PCR values: bank %s comes twice", b)
		}
		out[b] = make(map[int][]byte, len(pcrs))
		for i, digits := range pcrs {
			v, err := hex.DecodeString(strings.TrimPrefix(digits, "0x"))
			if err != nil || len(v) != b.Size() || i < 0 || i > 23 {
				return nil, fmt.Errorf("PCR values: %s PCR %d: want an index of 0 to 23 and %d bytes in hexadecimal", b, i, b.Size())
			}
			out[b][i] = v
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("PCR values: no values of a bank of %v", banks)
	}
	return out, nil
}

// BestBank is the first bank, the best one first, that the log can be judged by
// and that values has; any of the log's if values is nil; SHA-256 if there is
// none.
func (l *Log) BestBank(values map[Bank]map[int][]byte) Bank {
	for _, b := range l.Banks() {
		if _, ok := values[b]; ok || values == nil {
			return b
		}
	}
	return SHA256
}
