package fleet

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/attest/archive"
	"sekisho/attest/eventlog/logtest"
	"sekisho/attest/policy"
	"sekisho/attest/report"
	"sekisho/attest/tpm/faketpm"
)

const org = "Test City"

var image2 = logtest.Image{Kernel: "kernel 2", Initramfs: "initramfs 2", Cmdline: "quiet"}

// signers are the two who must sign the policies of a bench.
type signers [2]*ecdsa.PrivateKey

// full gives the service of a bench all that openAppraisal does.
func (b *bench) full(withPolicies bool) signers {
	b.t.Helper()
	var s signers
	for i := range s {
		var err error
		if s[i], err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			b.t.Fatal(err)
		}
	}
	key, err := loadReportKey(filepath.Join(b.dir, "report.key"))
	if err != nil {
		b.t.Fatal(err)
	}
	c := b.service.Config
	c.Brake = NewBrake(10)
	a, err := archive.Open(filepath.Join(b.dir, "archive"), archive.Retention{}, c.Now, func() error { return nil })
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { a.Close() })
	c.Reports = &Reports{a, key}
	if withPolicies {
		c.References, c.PolicyKeys = nil, s.ring(b.t)
	}
	b.use(c)
	return s
}

func (s signers) ring(t *testing.T) *policy.Keyring {
	t.Helper()
	ring, err := policy.NewKeyring(2, &s[0].PublicKey, &s[1].PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return ring
}

// sign makes a signed policy that accepts images.
func (s signers) sign(t *testing.T, version uint64, supersedes attest.Digest, change func(*policy.Bundle), images ...logtest.Image) ([]byte, attest.Digest) {
	t.Helper()
	b := &policy.Bundle{Profile: policy.Profile, Organization: org, Version: version, Supersedes: supersedes}
	for _, i := range images {
		b.References = append(b.References, policy.Reference{Values: i.Reference("sekisho", strings.TrimPrefix(i.Kernel, "kernel "))})
	}
	if change != nil {
		change(b)
	}
	var data []byte
	for _, k := range s {
		var err error
		if data, err = policy.Sign(b, data, k); err != nil {
			t.Fatal(err)
		}
	}
	id, err := b.ID()
	if err != nil {
		t.Fatal(err)
	}
	return data, id.Digest
}

// enrolled is a device of the bench and its id.
func (b *bench) enrolled() (*faketpm.TPM, attest.Digest) {
	b.t.Helper()
	d := b.device()
	e, err := b.enrol(d, b.ticket(1), nil)
	if err != nil {
		b.t.Fatal(err)
	}
	return d, e.Device
}

// boot attests d as booted with an image.
func (b *bench) boot(d *faketpm.TPM, id attest.Digest, i logtest.Image) *attest.AttestResponse {
	b.t.Helper()
	b.now = b.now.Add(time.Second)
	d.PCRs = i.Boot().PCRs()
	return b.attest(b.evidenceOf(d, id, b.nonce(id), i))
}

func TestUpdateLocksNobodyOut(t *testing.T) {
	b := newBench(t)
	s := b.full(true)
	d, id := b.enrolled()
	if r := b.boot(d, id, image).Result; r.Reason != attest.ReasonNoPolicy {
		t.Fatalf("without a policy: %v", r.Reason)
	}
	one, digest := s.sign(t, 1, attest.Digest{}, nil, image)
	if _, err := b.service.Publish(t.Context(), one, false, false); err != nil {
		t.Fatal(err)
	}
	r := b.boot(d, id, image)
	if r.Result.Status != attest.StatusAffirming || r.Result.Policy == nil || r.Result.Policy.Version != 1 || len(r.Token) == 0 {
		t.Fatalf("with it: %+v", r.Result)
	}
	// A policy that drops the image which is running would lock it out.
	bad, _ := s.sign(t, 2, digest, nil, image2)
	if _, err := b.service.Publish(t.Context(), bad, false, false); !errors.Is(err, errLocksOut) {
		t.Fatalf("a policy that locks out: %v", err)
	}
	sim, err := b.service.Simulate(t.Context(), bad)
	if err != nil || sim.Devices != 1 || sim.Refused != 1 || sim.Verdicts[0].Reason != attest.ReasonImageMismatch || len(sim.Verdicts[0].Findings) == 0 {
		t.Errorf("simulation: %+v %v", sim, err)
	}
	// The next image is approved before it is rolled out; both are valid.
	two, digest := s.sign(t, 2, digest, nil, image, image2)
	if _, err := b.service.Publish(t.Context(), two, false, false); err != nil {
		t.Fatal(err)
	}
	for _, i := range []logtest.Image{image, image2, image} {
		if r := b.boot(d, id, i).Result; r.Status != attest.StatusAffirming {
			t.Errorf("%s: %v", i.Kernel, r.Reason)
		}
	}
	// The one after it ends the old image, an hour from now.
	b.boot(d, id, image2)
	three, _ := s.sign(t, 3, digest, func(p *policy.Bundle) { p.NotBefore = b.now.Add(time.Hour).Unix() }, image2)
	if _, err := b.service.Publish(t.Context(), three, false, false); err != nil {
		t.Fatal(err)
	}
	if r := b.boot(d, id, image).Result; r.Status != attest.StatusAffirming {
		t.Errorf("before its time: %v", r.Reason)
	}
	b.now = b.now.Add(time.Hour)
	if r := b.boot(d, id, image).Result; r.Reason != attest.ReasonImageMismatch || r.Policy.Version != 3 {
		t.Errorf("after its time: %v", r.Reason)
	}
}

func TestPolicyRollback(t *testing.T) {
	b := newBench(t)
	s := b.full(true)
	one, digest := s.sign(t, 1, attest.Digest{}, nil, image)
	two, _ := s.sign(t, 2, digest, nil, image2)
	for _, p := range [][]byte{one, two} {
		if _, err := b.service.publish(t.Context(), p, false); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := b.service.publish(t.Context(), one, false); err == nil {
		t.Error("an old version was published again")
	}
	b.restart()
	if list := b.service.Policies.Status(b.now).Policies; len(list) != 2 || list[1].Version != 2 {
		t.Errorf("after a restart: %+v", list)
	}
	// Whoever can write to the store can neither take a version away nor
	// put another in its place.
	client := b.store.Client()
	for what, tamper := range map[string]func() error{
		"removed": func() error { _, err := client.Delete(t.Context(), b.service.keys.policyVersion(2)); return err },
		"old for new": func() error {
			_, err := client.Put(t.Context(), b.service.keys.policyVersion(2), string(one))
			return err
		},
	} {
		if err := tamper(); err != nil {
			t.Fatal(err)
		}
		if s, err := NewService(t.Context(), b.service.Config); err == nil {
			s.Close()
			t.Errorf("%s: the verifier started", what)
		}
	}
}

func TestShadowPolicy(t *testing.T) {
	b := newBench(t)
	s := b.full(true)
	one, digest := s.sign(t, 1, attest.Digest{}, nil, image)
	two, _ := s.sign(t, 2, digest, nil, image2)
	if _, err := b.service.Publish(t.Context(), one, false, false); err != nil {
		t.Fatal(err)
	}
	if _, err := b.service.Publish(t.Context(), two, true, false); err != nil {
		t.Fatal(err)
	}
	d, id := b.enrolled()
	r := b.boot(d, id, image).Result
	if r.Status != attest.StatusAffirming || r.Shadow == nil || r.Shadow.Reason != attest.ReasonImageMismatch || r.Shadow.Policy.Version != 2 {
		t.Errorf("%+v", r)
	}
	if err := b.service.DropShadow(t.Context()); err != nil {
		t.Fatal(err)
	}
	if r := b.boot(d, id, image).Result; r.Shadow != nil {
		t.Errorf("%+v", r.Shadow)
	}
}

func TestMassRefusalHolds(t *testing.T) {
	b := newBench(t)
	s := b.full(true)
	one, digest := s.sign(t, 1, attest.Digest{}, nil, image)
	if _, err := b.service.Publish(t.Context(), one, false, false); err != nil {
		t.Fatal(err)
	}
	pending, next := s.sign(t, 2, digest, func(p *policy.Bundle) { p.NotBefore = b.now.Add(time.Hour).Unix() }, image, image2)
	if _, err := b.service.Publish(t.Context(), pending, false, false); err != nil {
		t.Fatal(err)
	}
	type laptop struct {
		*faketpm.TPM
		id attest.Digest
	}
	var fleet []laptop
	for range 12 {
		d, id := b.enrolled()
		fleet = append(fleet, laptop{d, id})
	}
	for _, l := range fleet[:9] {
		b.boot(l.TPM, l.id, image2)
	}
	b.boot(fleet[0].TPM, fleet[0].id, image2) // the same device again is no more devices
	if h := b.service.Policies.Status(b.now).Hold; h != nil {
		t.Fatalf("held by 9 devices: %+v", h)
	}
	b.boot(fleet[9].TPM, fleet[9].id, image2)
	h := b.service.Policies.Status(b.now).Hold
	if h == nil || h.Refused != 10 || h.Devices != 12 || h.Version != 1 || h.Reasons[attest.ReasonImageMismatch] != 10 {
		t.Fatalf("hold: %+v", h)
	}
	// It opens nothing, stops newer policies, and outlives a restart.
	if r := b.boot(fleet[10].TPM, fleet[10].id, image2).Result; r.Status != attest.StatusContraindicated {
		t.Errorf("while held: %v", r.Status)
	}
	if r := b.boot(fleet[11].TPM, fleet[11].id, image).Result; r.Status != attest.StatusAffirming {
		t.Errorf("a good device while held: %v", r.Reason)
	}
	three, _ := s.sign(t, 3, next, func(p *policy.Bundle) { p.NotBefore = b.now.Add(time.Hour).Unix() }, image2)
	if _, err := b.service.Publish(t.Context(), three, false, true); err == nil {
		t.Error("published while held")
	}
	b.restart()
	p := b.service.Policies
	if v, _, _ := p.InForce(b.now.Add(2 * time.Hour)); v.Bundle.Version != 1 {
		t.Errorf("version %d came into force while held", v.Bundle.Version)
	}
	if err := b.service.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	if v, _, _ := p.InForce(b.now.Add(2 * time.Hour)); v.Bundle.Version != 2 {
		t.Errorf("version %d is in force after the release", v.Bundle.Version)
	}
}

func TestReportOfEachAppraisal(t *testing.T) {
	b := newBench(t)
	s := b.full(true)
	one, _ := s.sign(t, 1, attest.Digest{}, nil, image)
	if _, err := b.service.Publish(t.Context(), one, false, false); err != nil {
		t.Fatal(err)
	}
	d, id := b.enrolled()
	good := b.boot(d, id, image)
	bad := b.boot(d, id, image2)
	if r := bad.Result; r.LastGood == nil || len(r.Changes) == 0 {
		t.Errorf("no difference to the last good boot: %+v", r)
	}
	ring := s.ring(t)
	for _, r := range []*attest.AttestResponse{good, bad} {
		data, err := b.service.Reports.Get(r.Result.Report)
		if err != nil {
			t.Fatal(err)
		}
		v, err := report.Verify(data, report.Trust{Key: &b.service.Reports.key.PublicKey, Policy: ring})
		if err != nil {
			t.Fatal(err)
		}
		if a := v.Appraisal; a.Status != r.Result.Status || a.Reason != r.Result.Reason || a.Report != r.Result.Report || len(a.Changes) != len(r.Result.Changes) {
			t.Errorf("report: %+v", a)
		}
	}
	for range 2 * reportsKept {
		b.boot(d, id, image2)
	}
	list, err := b.service.ReportsOf(t.Context(), id)
	if err != nil || len(list) != reportsKept+1 || list[0].ID != good.Result.Report {
		t.Errorf("%d reports are kept: %v %v", len(list), list, err)
	}
}

// TestRefusedAfterNewReportKey: the last good boot's report, of a former report
// key, cannot be read. A bad boot is refused all the same, and a simulation
// counts the device as unknown.
func TestRefusedAfterNewReportKey(t *testing.T) {
	b := newBench(t)
	s := b.full(false)
	d, id := b.enrolled()
	if r := b.boot(d, id, image).Result; r.Status != attest.StatusAffirming {
		t.Fatalf("%+v", r)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	b.service.Reports.key = key
	draft, _ := s.sign(t, 1, attest.Digest{}, nil, image)
	if sim, err := b.service.Simulate(t.Context(), draft); err != nil || sim.Unknown != 1 {
		t.Errorf("simulation: %+v, %v", sim, err)
	}
	if r := b.boot(d, id, image2).Result; r.Status == attest.StatusAffirming || r.Reason != attest.ReasonImageMismatch && r.Reason != attest.ReasonImageUnknown {
		t.Errorf("%+v", r)
	}
}

// TestOnlyAuthenticEvidenceCounts sends evidence that anyone could make: by
// another TPM, and old evidence of the device, as its reports hold it, with
// something in it exchanged.
func TestOnlyAuthenticEvidenceCounts(t *testing.T) {
	b := newBench(t)
	b.full(false)
	d, id := b.enrolled()
	old := b.evidenceOf(d, id, make([]byte, 64), image)
	for _, change := range []func(*attest.Evidence){
		func(*attest.Evidence) {},
		func(e *attest.Evidence) { e.Key = []byte{1} },
		func(e *attest.Evidence) { e.Key = b.device().Identity().EK },
		func(e *attest.Evidence) { e.EventLog = nil },
		func(e *attest.Evidence) { e.PCRs = nil },
		func(e *attest.Evidence) { e.RunLog = []byte{1} },
		func(e *attest.Evidence) { e.Certify = nil },
	} {
		e := *old
		e.Nonce = b.nonce(id)
		change(&e)
		for range 3 * brakeDevices { // the nonce stays good for the device
			if r := b.attest(&e).Result; r.Reason == attest.ReasonNonceReused || r.Status != attest.StatusContraindicated {
				t.Fatalf("%+v", r)
			}
		}
	}
	thief := b.device()
	for range 3 * brakeDevices {
		if r := b.boot(thief, id, image).Result; r.Reason != attest.ReasonSignatureInvalid {
			t.Fatal(r.Reason)
		}
	}
	if list, err := b.service.ReportsOf(t.Context(), id); err != nil || len(list) != 0 {
		t.Errorf("stored: %v %v", list, err)
	}
	if len(b.service.Brake.refused) != 0 {
		t.Error("it pulled the brake")
	}
}

// TestClockRetriedOnce: a clock that is not safe is tried again once, then the
// device is degraded.
func TestClockRetriedOnce(t *testing.T) {
	b := newBench(t)
	b.full(false)
	d, id := b.enrolled()
	if r := b.boot(d, id, image).Result; r.Status != attest.StatusAffirming {
		t.Fatal(r.Reason)
	}
	d.Clock.Clock, d.Clock.Safe = 1, false
	for i, want := range []attest.Status{attest.StatusContraindicated, attest.StatusWarning, attest.StatusWarning} {
		r := b.boot(d, id, image)
		if r.Result.Reason != attest.ReasonClockUnsafe || r.Result.Status != want || r.Chain != nil {
			t.Errorf("%d: %v %v", i, r.Result.Reason, r.Result.Status)
		}
	}
	d.Clock.ResetCount++
	if r := b.boot(d, id, image).Result; r.Status != attest.StatusAffirming {
		t.Errorf("after a restart: %v", r.Reason)
	}
}

func TestCommons(t *testing.T) {
	b := newBench(t)
	b.full(false)
	var last *attest.Firmware
	for n := range 3 {
		d, id := b.enrolled()
		b.boot(d, id, image)
		until(t, "the firmware of the devices counted", func() bool { // a watch brings it
			b.service.Commons.mu.Lock()
			defer b.service.Commons.mu.Unlock()
			return len(b.service.Commons.devices) == n+1
		})
		last = b.boot(d, id, image).Result.Firmware
	}
	if last == nil || last.Devices != 2 || last.Organizations != 1 {
		t.Fatalf("%+v", last)
	}
	sum := b.service.Commons.Summary()
	if sum.Firmware[last.Digest] != 3 {
		t.Errorf("%+v", sum)
	}
	if err := b.service.ImportFirmware(t.Context(), sum); err == nil {
		t.Error("our own summary was imported")
	}
	sum.Organization = "Other City"
	if err := b.service.ImportFirmware(t.Context(), sum); err != nil {
		t.Fatal(err)
	}
	b.restart()
	if f := b.service.Commons.Count(attest.Digest{}, last.Digest); f.Devices != 6 || f.Organizations != 2 {
		t.Errorf("%+v", f)
	}
}

func TestKeysAreTheOwnersAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys", "nonce.key")
	key, err := loadNonceKey(path)
	if err != nil || key == ([32]byte{}) {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatal(info.Mode(), err)
	}
	if again, err := loadNonceKey(path); err != nil || again != key {
		t.Errorf("read again: %v", err)
	}
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := loadNonceKey(path); err == nil {
		t.Error("a key that others may read was used")
	}
}
