package eventlog_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"sekisho/attest"
	"sekisho/attest/eventlog"
)

// TestDiff names PCR and event of what two boots of one machine differ in.
func TestDiff(t *testing.T) {
	read := func(name string) []byte { return readCorpus(t, "eventlog-with-pcrs/"+name+".eventlog") }
	// One grub setting of the last good boot changed, as EVE's failed one was
	// (lf-edge/eve, tpmlog_diff.rs; its failed log is not in the corpus).
	eve := read("eve-last_good_log")
	l, err := eventlog.Parse(eve)
	if err != nil {
		t.Fatal(err)
	}
	changed := l.Events[slices.IndexFunc(l.Events, func(e eventlog.Event) bool { return e.PCR == 8 })]
	at := bytes.Index(eve, changed.Digest[:])
	for _, c := range []struct {
		name          string
		before, after []byte
		want          []string
	}{
		{"HP EliteBook 830 G6, MOKX entry added", read("guard-elitebook830g6-baseline"), read("guard-elitebook830g6-add-mokx"), []string{
			"PCR 1 event 14 EV_EFI_VARIABLE_BOOT BootOrder changed", "PCR 1 event 15 EV_EFI_VARIABLE_BOOT Boot0007 changed",
			"PCR 1 event 17 EV_EFI_VARIABLE_BOOT Boot0001 gone", "PCR 14 event 35 EV_IPL MokListX changed",
		}},
		{"Haruhi, good and failed: the same log", read("guard-laptop-haruhi-good1"), read("guard-laptop-haruhi-failed2"), nil},
		{"X1 Carbon, ancient and before: the same measurements", read("guard-x1carbon-ancient"), read("guard-x1carbon-before"), nil},
		{"EVE, one event changed", eve, flip(eve, at), []string{fmt.Sprintf("PCR 8 event %d %s %s changed", changed.Number, eventlog.TypeName(changed.Type), bytes.TrimRight(changed.Data, "\x00"))}},
	} {
		var got []string
		for _, x := range eventlog.Diff(c.before, c.after) {
			what := "changed"
			switch {
			case x.Was == "":
				what = "new"
			case x.Is == "":
				what = "gone"
			}
			got = append(got, fmt.Sprintf("PCR %d event %d %s %s %s", x.PCR, x.Number, eventlog.TypeName(x.Type), x.Event, what))
		}
		t.Logf("%s: %q", c.name, got)
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

func flip(data []byte, at int) []byte {
	out := bytes.Clone(data)
	out[at] ^= 1
	return out
}

// FuzzDiff: a log differs from itself in nothing, and in as many events the
// other way round.
func FuzzDiff(f *testing.F) {
	a := image.Boot().Bytes()
	f.Add(a, a)
	f.Add(a, image.Boot().Bytes()[:400])
	if data, err := os.ReadFile(filepath.Join(corpus, "eventlog-golden/tpm2tools-event.bin")); err == nil {
		f.Add(data, a)
	}
	f.Fuzz(func(t *testing.T, a, b []byte) {
		if list := eventlog.Diff(a, a); len(list) != 0 {
			t.Errorf("a log differs from itself: %+v", list)
		}
		x, errA := eventlog.Read(a)
		y, errB := eventlog.Read(b)
		if errA != nil || errB != nil {
			return
		}
		for _, bank := range x.Banks() {
			if !slices.Contains(y.Banks(), bank) {
				continue
			}
			count := func(list []attest.Change) (gone, come int) {
				for _, c := range list {
					if c.Was != "" {
						gone++
					}
					if c.Is != "" {
						come++
					}
				}
				return gone, come
			}
			gone, come := count(x.Diff(y, bank))
			if len(x.Events)-gone != len(y.Events)-come {
				t.Errorf("%s: %d of %d events gone, %d of %d new", bank, gone, len(x.Events), come, len(y.Events))
			}
		}
	})
}
