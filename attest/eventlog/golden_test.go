package eventlog_test

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"math/big"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"sekisho/attest/eventlog"
)

// golden is one event of a dump that another program made of a log: what it
// does not say is empty.
type golden struct {
	pcr     uint32
	kind    string
	digests map[string]string // hexadecimal by algorithm
	size    int               // of the data, -1 if not said
	data    []byte
}

// dump is a whole dump. PCRs are numbers of the size that the dump has kept.
type dump struct {
	events []golden
	pcrs   map[string]map[int]*big.Float
}

// guardDump reads guard-oss' JSON, which keeps no digests.
func guardDump(t *testing.T, data []byte) (d dump) {
	var list []struct {
		Index, Type uint32
		Data        []byte
	}
	if err := json.Unmarshal(data, &list); err != nil {
		t.Fatal(err)
	}
	for _, e := range list {
		d.events = append(d.events, golden{e.Index, eventlog.TypeName(e.Type), nil, len(e.Data), e.Data})
	}
	return d
}

// toolsDump reads what tpm2_eventlog printed and python3-uefi-eventlog made
// JSON of.
func toolsDump(t *testing.T, data []byte) (d dump) {
	var all struct {
		Events []struct {
			PCRIndex  uint32
			EventType string
			EventSize int
			Digests   []struct{ AlgorithmId, Digest string }
		}
		PCRs map[string]map[int]json.Number `json:"pcrs"`
	}
	if err := json.Unmarshal(data, &all); err != nil {
		t.Fatal(err)
	}
	for _, e := range all.Events {
		g := golden{pcr: e.PCRIndex, kind: e.EventType, digests: map[string]string{}, size: e.EventSize}
		for _, x := range e.Digests {
			g.digests[x.AlgorithmId] = x.Digest
		}
		d.events = append(d.events, g)
	}
	d.pcrs = make(map[string]map[int]*big.Float)
	for bank, pcrs := range all.PCRs {
		d.pcrs[bank] = make(map[int]*big.Float)
		for i, v := range pcrs {
			f, _, err := big.ParseFloat(v.String(), 10, 53, big.ToNearestEven)
			if err != nil {
				t.Fatal(err)
			}
			d.pcrs[bank][i] = f
		}
	}
	return d
}

// yamlDump reads what tpm2_eventlog prints, line by line: older versions print
// no valid YAML.
func yamlDump(t *testing.T, data []byte) (d dump) {
	d.pcrs = make(map[string]map[int]*big.Float)
	algorithm, bank, final := "", "", false
	for line := range strings.Lines(string(data)) {
		key, value, _ := strings.Cut(strings.TrimSpace(strings.TrimLeft(line, " -")), ":")
		key, value = strings.TrimSpace(key), strings.Trim(strings.TrimSpace(value), `"`)
		number := func() int {
			n, err := strconv.Atoi(value)
			if err != nil {
				t.Fatalf("%q: %v", line, err)
			}
			return n
		}
		switch last := len(d.events) - 1; {
		case line == "pcrs:\n":
			final = true
		case final && value == "":
			bank, d.pcrs[key] = key, make(map[int]*big.Float)
		case final:
			i, err := strconv.Atoi(key)
			v, ok := new(big.Int).SetString(strings.TrimPrefix(value, "0x"), 16)
			if err != nil || !ok {
				t.Fatalf("%q: %v", line, err)
			}
			d.pcrs[bank][i] = new(big.Float).SetInt(v)
		case key == "PCRIndex":
			d.events = append(d.events, golden{pcr: uint32(number()), digests: map[string]string{}, size: -1})
		case last < 0:
		case key == "EventType" && d.events[last].kind == "":
			d.events[last].kind = value
		case key == "AlgorithmId":
			algorithm = value
		case key == "Digest" && algorithm != "" && d.events[last].digests[algorithm] == "":
			d.events[last].digests[algorithm], algorithm = value, ""
		case key == "EventSize" && d.events[last].size < 0:
			d.events[last].size = number()
		}
	}
	return d
}

// TestGolden compares what we read from a log, event by event, with the dumps
// that the corpus has of it: type, PCR, digests, data, and the final PCRs.
func TestGolden(t *testing.T) {
	readCorpus(t, "MANIFEST.md")
	files, err := os.ReadDir(filepath.Join(corpus, "eventlog-golden"))
	if err != nil {
		t.Fatal(err)
	}
	read := 0
	for _, f := range files {
		name := "eventlog-golden/" + f.Name()
		var d dump
		switch ext := filepath.Ext(name); {
		case ext == ".yaml":
			d = yamlDump(t, readCorpus(t, name))
		case ext == ".json" && strings.HasPrefix(f.Name(), "guard-"):
			d = guardDump(t, readCorpus(t, name))
		case ext == ".json":
			d = toolsDump(t, readCorpus(t, name))
		default:
			continue
		}
		read++
		t.Run(f.Name(), func(t *testing.T) { compareGolden(t, readCorpus(t, strings.TrimSuffix(name, filepath.Ext(name))), d) })
	}
	if read < 14 {
		t.Errorf("%d dumps, the corpus has 14", read)
	}
}

func compareGolden(t *testing.T, data []byte, want dump) {
	l, err := eventlog.Read(data)
	if err != nil {
		t.Fatal(err)
	}
	byNumber := make(map[int]eventlog.Event)
	for _, e := range append(l.Events, l.Notes...) {
		byNumber[e.Number] = e
	}
	digests := 0
	for i, g := range want.events {
		e, ok := byNumber[i]
		if !ok {
			if i == 0 && l.Format == eventlog.FormatAgile && g.kind == "EV_NO_ACTION" {
				continue // the header, which is no event to us
			}
			t.Fatalf("event %d (PCR %d, %s) is missing", i, g.pcr, g.kind)
		}
		if uint32(e.PCR) != g.pcr || eventlog.TypeName(e.Type) != g.kind || g.size >= 0 && len(e.Data) != g.size || g.data != nil && !bytes.Equal(e.Data, g.data) {
			t.Errorf("event %d: PCR %d, %s, %d bytes; the dump has PCR %d, %s, %d bytes", i, e.PCR, eventlog.TypeName(e.Type), len(e.Data), g.pcr, g.kind, g.size)
		}
		for name, digest := range g.digests {
			b, err := eventlog.ParseBank(name)
			if err != nil {
				t.Fatal(err)
			}
			digests++
			if got := hex.EncodeToString(e.DigestIn(b)); got != digest {
				t.Errorf("event %d: %s %s; the dump has %s", i, name, got, digest)
			}
		}
		delete(byNumber, i)
	}
	if l.Format == eventlog.FormatAgile {
		delete(byNumber, 0)
	}
	for n, e := range byNumber {
		// tpm2_eventlog ends before the note that Windows writes last, of PCR
		// 0xFFFFFFFF (keylimeuefi-ideapad).
		if n != len(want.events) || e.Type != eventlog.TypeNoAction || uint32(e.PCR) != 0xffffffff {
			t.Errorf("event %d (PCR %d, %s) is not in the dump", n, e.PCR, eventlog.TypeName(e.Type))
		}
	}
	for name, pcrs := range want.pcrs {
		b, err := eventlog.ParseBank(name)
		if err != nil {
			t.Fatal(err)
		}
		seen := 0
		for _, p := range l.Appraise(eventlog.Options{Bank: b}).PCRs {
			v, ok := new(big.Int).SetString(p.Replayed, 16)
			if !ok || pcrs[p.PCR] == nil {
				continue
			}
			seen++
			if got := new(big.Float).SetPrec(pcrs[p.PCR].Prec()).SetInt(v); got.Cmp(pcrs[p.PCR]) != 0 {
				t.Errorf("%s PCR %d: %s; the dump has %s", name, p.PCR, p.Replayed, pcrs[p.PCR].Text('g', 20))
			}
		}
		if seen != len(pcrs) {
			t.Errorf("%s: %d of the dump's %d PCRs", name, seen, len(pcrs))
		}
	}
	t.Logf("%d events, %d digests, %d banks of final PCRs are the same", len(want.events), digests, len(want.pcrs))
}
