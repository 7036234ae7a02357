package verifier

import (
	"crypto/sha256"
	"slices"
	"testing"

	"sekisho/attest"
	"sekisho/attest/runlog"
	"sekisho/attest/tpm"
)

// resign binds and signs b's evidence with its run-time log.
func (b *bench) resign() {
	b.t.Helper()
	e := b.in.Evidence
	key, err := tpm.ParsePublic(e.Key)
	if err != nil {
		b.t.Fatal(err)
	}
	spki, err := key.SPKI()
	if err != nil {
		b.t.Fatal(err)
	}
	if b.extra, err = (attest.Binding{
		Nonce: e.Nonce, Device: e.DeviceID(), Verifier: e.Verifier, Purpose: e.Purpose,
		Key: sha256.Sum256(spki), EventLog: sha256.Sum256(e.EventLog), RunLog: e.RunLog,
	}).Digest(); err != nil {
		b.t.Fatal(err)
	}
	b.attest(b.extra)
}

// TestRunTimeEvents: what was extended after the boot is affirmed when it is
// known events and all of them, and refused otherwise.
func TestRunTimeEvents(t *testing.T) {
	work := attest.RunEvent{Kind: attest.EventWorkDomain, Detail: attest.Digest{1}}
	disk := attest.RunEvent{Kind: attest.EventDiskKey, Detail: attest.Digest{2}}
	log := func(events ...attest.RunEvent) (b []byte) {
		for _, e := range events {
			var err error
			if b, err = runlog.Append(b, e); err != nil {
				t.Fatal(err)
			}
		}
		return b
	}
	for name, c := range map[string]struct {
		extended []attest.RunEvent // in truth
		log      []byte            // as claimed
		pcr11    bool              // PCR 11 was extended as well
		want     attest.Reason
	}{
		"work domain started":         {extended: []attest.RunEvent{work}, log: log(work)},
		"disk used, work domain":      {extended: []attest.RunEvent{disk, work}, log: log(disk, work)},
		"no log":                      {extended: []attest.RunEvent{work}, want: attest.ReasonLogMissingEvents},
		"an event is left out":        {extended: []attest.RunEvent{work, work}, log: log(work), want: attest.ReasonRunLogReplay},
		"an event is relabelled":      {extended: []attest.RunEvent{work}, log: log(disk), want: attest.ReasonRunLogReplay},
		"an event that was not":       {log: log(work), want: attest.ReasonRunLogReplay},
		"another volume":              {extended: []attest.RunEvent{disk}, log: log(attest.RunEvent{Kind: disk.Kind}), want: attest.ReasonRunLogReplay},
		"rubbish":                     {extended: []attest.RunEvent{work}, log: []byte("x"), want: attest.ReasonRunLogMalformed},
		"the boot's PCRs stay judged": {extended: []attest.RunEvent{work}, log: log(work), pcr11: true, want: attest.ReasonLogReplay},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			for _, e := range c.extended {
				pcr, _ := e.Kind.PCR()
				if err := b.tpm.Extend(pcr, runlog.Digest(e)); err != nil {
					t.Fatal(err)
				}
			}
			if c.pcr11 {
				if err := b.tpm.Extend(11, attest.Digest{1}); err != nil {
					t.Fatal(err)
				}
			}
			b.in.Evidence.RunLog = c.log
			b.resign()
			if out := Appraise(b.in); out.Result.Reason != c.want || (out.Result.Status == attest.StatusAffirming) != (c.want == attest.ReasonNone) {
				t.Errorf("%s %s: %s, want %q", out.Result.Status, out.Result.Reason, out.Result.Detail, c.want)
			} else if c.want == attest.ReasonNone && !slices.Equal(out.Result.Events, c.extended) {
				t.Errorf("events %v, want %v", out.Result.Events, c.extended)
			}
		})
	}
}

// TestRunTimeLogIsBound: a log taken away after the quote is noticed before
// anything is replayed.
func TestRunTimeLogIsBound(t *testing.T) {
	b := newBench(t)
	log, err := runlog.Append(nil, attest.RunEvent{Kind: attest.EventWorkDomain})
	if err != nil {
		t.Fatal(err)
	}
	b.in.Evidence.RunLog = log
	b.resign()
	b.in.Evidence.RunLog = nil
	if out := Appraise(b.in); out.Result.Reason != attest.ReasonBindingMismatch {
		t.Error(out.Result.Reason)
	}
}
