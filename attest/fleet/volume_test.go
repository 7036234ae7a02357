package fleet

import (
	"crypto/sha256"
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/attest/runlog"
	"sekisho/attest/tpm/faketpm"
)

// withDisk is evidence of a boot in which the work disk of that measurement was
// unlocked.
func (b *bench) withDisk(d *faketpm.TPM, id, volume attest.Digest) *attest.Evidence {
	b.t.Helper()
	event := attest.RunEvent{Kind: attest.EventDiskKey, Detail: volume}
	run, err := runlog.Append(nil, event)
	if err != nil {
		b.t.Fatal(err)
	}
	boot := image.Boot()
	d.PCRs = boot.PCRs()
	if err := d.Extend(15, runlog.Digest(event)); err != nil {
		b.t.Fatal(err)
	}
	b.now = b.now.Add(time.Second)
	_, key := identify(b.t, d)
	e, err := evidenceFor(d, id, key, b.nonce(id), boot.Bytes())
	if err != nil {
		b.t.Fatal(err)
	}
	e.RunLog = run
	extra, err := attest.Binding{Nonce: e.Nonce, Device: id, Verifier: name, Purpose: e.Purpose, Key: key, EventLog: sha256.Sum256(e.EventLog), RunLog: run}.Digest()
	if err != nil {
		b.t.Fatal(err)
	}
	p, err := d.Attest(extra)
	if err != nil {
		b.t.Fatal(err)
	}
	e.Quote, e.QuoteSig, e.Certify, e.CertifySig = p.Quote, p.QuoteSig, p.Certify, p.CertifySig
	return e
}

// TestVolumeIsRemembered: the first work disk seen is kept, over boots without
// one and with another one.
func TestVolumeIsRemembered(t *testing.T) {
	b := newBench(t)
	d, id := b.enrolled()
	mine, other := attest.Digest{1}, attest.Digest{2}
	for _, c := range []struct {
		what    string
		answer  func() *attest.AttestResponse
		changed bool
	}{
		{"locked", func() *attest.AttestResponse { return b.boot(d, id, image) }, false},
		{"first", func() *attest.AttestResponse { return b.attest(b.withDisk(d, id, mine)) }, false},
		{"same", func() *attest.AttestResponse { return b.attest(b.withDisk(d, id, mine)) }, false},
		{"another", func() *attest.AttestResponse { return b.attest(b.withDisk(d, id, other)) }, true},
		{"locked again", func() *attest.AttestResponse { return b.boot(d, id, image) }, false},
		{"another, still", func() *attest.AttestResponse { return b.attest(b.withDisk(d, id, other)) }, true},
		{"the first again", func() *attest.AttestResponse { return b.attest(b.withDisk(d, id, mine)) }, false},
	} {
		r := c.answer().Result
		if r.Status != attest.StatusAffirming {
			t.Fatalf("%s: %+v", c.what, r)
		}
		if found := len(r.Findings) == 1 && r.Findings[0].Reason == attest.ReasonVolumeChanged; found != c.changed {
			t.Errorf("%s: %+v", c.what, r.Findings)
		}
	}
}
