package eventlog

import (
	"encoding/hex"

	"sekisho/attest"
)

// Limits of a comparison.
const (
	maxDiff  = 64      // changes
	maxPairs = 4 << 20 // entries of the table of one PCR
)

// Diff says what an event log has that an older one had not, and the other way
// round, PCR by PCR in the order of events, by SHA-256; at most 64 changes. A
// log that cannot be read differs in nothing that could be named.
func Diff(before, after []byte) []attest.Change {
	old, err := Parse(before)
	if err != nil {
		return nil
	}
	now, err := Parse(after)
	if err != nil {
		return nil
	}
	list := old.Diff(now, SHA256)
	return list[:min(len(list), maxDiff)]
}

// Diff is the function Diff for logs of either format, in one bank, with all
// changes. Only digests count: no PCR covers types and data.
func (l *Log) Diff(after *Log, b Bank) (list []attest.Change) {
	for pcr := range 24 {
		list = append(list, diff(measured(l, pcr, b), measured(after, pcr, b))...)
	}
	return list
}

// measurement is an event with its digest in one bank, in hexadecimal.
type measurement struct {
	Event
	digest string
}

func measured(l *Log, pcr int, b Bank) (list []measurement) {
	for _, e := range l.Events {
		if e.PCR == pcr {
			list = append(list, measurement{e, hex.EncodeToString(e.DigestIn(b))})
		}
	}
	return list
}

// diff compares by the longest common subsequence of digests. An event that is
// gone and one that stands in its place are one change.
func diff(a, b []measurement) (list []attest.Change) {
	for len(a) > 0 && len(b) > 0 && a[0].digest == b[0].digest {
		a, b = a[1:], b[1:]
	}
	for len(a) > 0 && len(b) > 0 && a[len(a)-1].digest == b[len(b)-1].digest {
		a, b = a[:len(a)-1], b[:len(b)-1]
	}
	keepA, keepB := common(a, b)
	i, j := 0, 0
	for i < len(a) || j < len(b) {
		gone, come := i < len(a) && !keepA[i], j < len(b) && !keepB[j]
		switch {
		case gone && come:
			list = append(list, attest.Change{PCR: b[j].PCR, Number: b[j].Number, Type: b[j].Type, Event: shown(b[j].Event), Was: a[i].digest, Is: b[j].digest})
			i, j = i+1, j+1
		case gone:
			list = append(list, attest.Change{PCR: a[i].PCR, Number: a[i].Number, Type: a[i].Type, Event: shown(a[i].Event), Was: a[i].digest})
			i++
		case come:
			list = append(list, attest.Change{PCR: b[j].PCR, Number: b[j].Number, Type: b[j].Type, Event: shown(b[j].Event), Is: b[j].digest})
			j++
		default:
			i, j = i+1, j+1
		}
	}
	return list
}

// common marks the events of a longest common subsequence. Logs so different
// that the table would be large have nothing in common.
func common(a, b []measurement) (keepA, keepB []bool) {
	keepA, keepB = make([]bool, len(a)), make([]bool, len(b))
	if (len(a)+1)*(len(b)+1) > maxPairs {
		return keepA, keepB
	}
	width := len(b) + 1
	length := make([]uint16, (len(a)+1)*width)
	for i := len(a) - 1; i >= 0; i-- {
		for j := len(b) - 1; j >= 0; j-- {
			if a[i].digest == b[j].digest {
				length[i*width+j] = length[(i+1)*width+j+1] + 1
			} else {
				length[i*width+j] = max(length[(i+1)*width+j], length[i*width+j+1])
			}
		}
	}
	for i, j := 0, 0; i < len(a) && j < len(b); {
		switch {
		case a[i].digest == b[j].digest:
			keepA[i], keepB[j] = true, true
			i, j = i+1, j+1
		case length[(i+1)*width+j] >= length[i*width+j+1]:
			i++
		default:
			j++
		}
	}
	return keepA, keepB
}
