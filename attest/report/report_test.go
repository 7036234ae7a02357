package report

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"

	"sekisho/attest"
	"sekisho/attest/ek"
	"sekisho/attest/eventlog/logtest"
	"sekisho/attest/policy"
	"sekisho/attest/tpm"
	"sekisho/attest/tpm/faketpm"
	"sekisho/attest/verifier"
)

const (
	name = "verifier.test"
	org  = "Test City"
)

var (
	image = logtest.Image{Kernel: "kernel 1", Initramfs: "initramfs 1", Cmdline: "quiet"}
	start = time.Unix(1_800_000_000, 0).UTC()
)

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// sample is an appraisal of a device that booted boot where image is accepted
// by a signed policy.
type sample struct {
	in   verifier.Input
	rec  Record
	keys [2]*ecdsa.PrivateKey // of the policy
}

func newSample(t testing.TB, boot logtest.Image) *sample {
	t.Helper()
	d := faketpm.New()
	d.PCRs = boot.Boot().PCRs()
	id := d.Identity()
	ek, err := tpm.ParsePublic(id.EK)
	if err != nil {
		t.Fatal(err)
	}
	key, err := tpm.ParsePublic(id.Key)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := key.SPKI()
	if err != nil {
		t.Fatal(err)
	}
	device := attest.DeviceID(ek.Name())
	log := boot.Boot().Bytes()
	nonce := verifier.NewNonces(name, [32]byte{1}).New(device, start)
	extra, err := attest.Binding{Nonce: nonce, Device: device, Verifier: name, Purpose: attest.PurposeNetwork, Key: sha256.Sum256(spki), EventLog: sha256.Sum256(log)}.Digest()
	if err != nil {
		t.Fatal(err)
	}
	p, err := d.Attest(extra)
	if err != nil {
		t.Fatal(err)
	}
	e := &attest.Evidence{
		Profile: attest.Profile, Device: device[:], Verifier: name, Purpose: attest.PurposeNetwork, Nonce: nonce,
		Quote: p.Quote, QuoteSig: p.QuoteSig, PCRs: make(map[int][]byte), EventLog: log, Key: key.Bytes, Certify: p.Certify, CertifySig: p.CertifySig,
	}
	for i, v := range p.PCRs {
		e.PCRs[i] = v[:]
	}
	s := &sample{keys: [2]*ecdsa.PrivateKey{newKey(t), newKey(t)}}
	b := &policy.Bundle{
		Profile: policy.Profile, Organization: org, Version: 1, References: []policy.Reference{{Values: image.Reference("sekisho", "1")}},
		Rules: []policy.Rule{{ID: "boot", Fact: policy.FactSecureBoot, Op: policy.OpEqual, Values: []string{"on"}, Severity: attest.SeverityWarn, Why: attest.Text{JA: "理由", EN: "reason"}}},
	}
	var data []byte
	for _, k := range s.keys {
		if data, err = policy.Sign(b, data, k); err != nil {
			t.Fatal(err)
		}
	}
	signed, err := policy.Read(data)
	if err != nil {
		t.Fatal(err)
	}
	s.in = verifier.Input{
		Evidence: e, Device: &verifier.Device{ID: device, AK: id.AK}, Verifier: name, Now: start, Policy: signed, PolicyNeeded: true,
		LastGood: image.Boot().Bytes(), Firmware: &attest.Firmware{Digest: verifier.FirmwareOf(e), Devices: 3, Organizations: 2},
	}
	s.rec = Record{ID: device[:], EK: id.EK, EKCertificate: id.EKCertificate, AK: id.AK}
	return s
}

func (s *sample) make(t testing.TB, key *ecdsa.PrivateKey) (report, token []byte) {
	t.Helper()
	report, token, err := Make(encoded(s.in), s.in, verifier.Appraise(s.in), s.rec, org, 10*time.Minute, key)
	if err != nil {
		t.Fatal(err)
	}
	return report, token
}

// TestVerifyGivesTheSameBytes verifies reports of a good and of a refused boot
// offline.
func TestVerifyGivesTheSameBytes(t *testing.T) {
	for _, c := range []struct {
		boot   logtest.Image
		status attest.Status
		reason attest.Reason
	}{
		{image, attest.StatusAffirming, attest.ReasonNone},
		{logtest.Image{Kernel: "evil", Initramfs: image.Initramfs, Cmdline: image.Cmdline}, attest.StatusContraindicated, attest.ReasonImageMismatch},
	} {
		key, s := newKey(t), newSample(t, c.boot)
		data, _ := s.make(t, key)
		ring, err := policy.NewKeyring(2, &s.keys[0].PublicKey, &s.keys[1].PublicKey)
		if err != nil {
			t.Fatal(err)
		}
		v, err := Verify(data, Trust{Key: &key.PublicKey, Policy: ring})
		if err != nil {
			t.Fatal(err)
		}
		if !v.Same || !v.Trusted || v.Policy != "verified" || v.Appraisal.Status != c.status || v.Appraisal.Reason != c.reason {
			t.Errorf("%+v", v)
		}
		if v.Appraisal.Firmware == nil || v.Appraisal.Firmware.Organizations != 2 || v.Claims.Nonce == nil {
			t.Errorf("claims: %+v", v.Claims)
		}
		if v, err := Verify(data, Trust{}); err != nil || v.Trusted || v.Policy != "unverified" {
			t.Errorf("without keys: %+v %v", v, err)
		}
		if _, err := Verify(data, Trust{Key: &key.PublicKey, EK: ek.NewRoots()}); err == nil {
			t.Error("an endorsement key without a certificate passes where makers are asked for")
		}
		if _, err := Verify(data, Trust{Key: &newKey(t).PublicKey}); err == nil {
			t.Error("another key's report was accepted")
		}
		stranger, err := policy.NewKeyring(1, &newKey(t).PublicKey)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Verify(data, Trust{Key: &key.PublicKey, Policy: stranger}); err == nil {
			t.Error("a stranger's policy was accepted")
		}
	}
}

// TestVerifyRefusesAnotherVerdict is a verifier, or someone with its key, that
// writes a verdict which the evidence does not give.
func TestVerifyRefusesAnotherVerdict(t *testing.T) {
	key := newKey(t)
	s := newSample(t, logtest.Image{Kernel: "evil"})
	out := verifier.Appraise(s.in)
	out.Result.Status, out.Result.Reason, out.Result.Findings = attest.StatusAffirming, attest.ReasonNone, nil
	data, _, err := Make(encoded(s.in), s.in, out, s.rec, org, time.Minute, key)
	if err != nil {
		t.Fatal(err)
	}
	if v, err := Verify(data, Trust{Key: &key.PublicKey}); !errors.Is(err, ErrDifferent) || v == nil || v.Same || v.Different == "" {
		t.Errorf("%+v %v", v, err)
	}
	s.rec.ID = make([]byte, 32)
	if data, _, err = Make(encoded(s.in), s.in, out, s.rec, org, time.Minute, key); err != nil {
		t.Fatal(err)
	}
	if _, err := Verify(data, Trust{Key: &key.PublicKey}); err == nil {
		t.Error("a device id that is not the EK's was accepted")
	}
}

func TestEveryByteIsSigned(t *testing.T) {
	key := newKey(t)
	data, token := newSample(t, image).make(t, key)
	for _, c := range []struct {
		data  []byte
		check func([]byte) error
	}{
		{data, func(b []byte) error { _, _, err := Parse(b, &key.PublicKey); return err }},
		{token, func(b []byte) error { _, _, err := open(b, maxToken, earType, "", &key.PublicKey); return err }},
	} {
		for i := 0; i < len(c.data); i += 7 {
			bad := bytes.Clone(c.data)
			bad[i] ^= 0x10
			if c.check(bad) == nil {
				t.Fatalf("byte %d of %d is not signed", i, len(c.data))
			}
		}
	}
}

// TestAttackResultReplayed replays an affirming result to a gateway of another
// organisation, for another device, with another key, and too late.
func TestAttackResultReplayed(t *testing.T) {
	key, s := newKey(t), newSample(t, image)
	_, token := s.make(t, key)
	out := verifier.Appraise(s.in)
	id, err := policy.KeyID(out.Key)
	if err != nil {
		t.Fatal(err)
	}
	good := Expect{Organization: org, Device: s.in.Device.ID, Key: id, Now: start.Add(time.Minute)}
	if _, err := CheckToken(token, &key.PublicKey, good); err != nil {
		t.Fatal(err)
	}
	refused, _ := newSample(t, logtest.Image{Kernel: "evil"}).make(t, key)
	for name, check := range map[string]func() error{
		"gateway of another organisation": func() error {
			e := good
			e.Organization = "Other City"
			_, err := CheckToken(token, &key.PublicKey, e)
			return err
		},
		"another device": func() error {
			e := good
			e.Device[0] ^= 1
			_, err := CheckToken(token, &key.PublicKey, e)
			return err
		},
		"another key": func() error {
			e := good
			e.Key[0] ^= 1
			_, err := CheckToken(token, &key.PublicKey, e)
			return err
		},
		"after its end": func() error {
			e := good
			e.Now = start.Add(10 * time.Minute)
			_, err := CheckToken(token, &key.PublicKey, e)
			return err
		},
		"before it was made": func() error {
			e := good
			e.Now = start.Add(-time.Hour)
			_, err := CheckToken(token, &key.PublicKey, e)
			return err
		},
		"another verifier's key":  func() error { _, err := CheckToken(token, &newKey(t).PublicKey, good); return err },
		"no key":                  func() error { _, err := CheckToken(token, nil, good); return err },
		"a report, not its token": func() error { _, err := CheckToken(refused, &key.PublicKey, good); return err },
	} {
		if check() == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	e := newSample(t, logtest.Image{Kernel: "evil"})
	_, bad := e.make(t, key)
	if _, err := CheckToken(bad, &key.PublicKey, Expect{Organization: org, Device: e.in.Device.ID, Key: id, Now: start}); err == nil {
		t.Error("a refusal was accepted")
	}
}

// TestClaimKeys pins the labels to the registries: RFC 8392 and 9711 and the
// example of draft-ietf-rats-ear-04.
func TestClaimKeys(t *testing.T) {
	key := newKey(t)
	_, token := newSample(t, image).make(t, key)
	payload, _, err := open(token, maxToken, earType, "", &key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	var m map[int]cbor.RawMessage
	if err := cbor.Unmarshal(payload, &m); err != nil {
		t.Fatal(err)
	}
	for _, k := range []int{1, 3, 4, 6, 8, 10, 256, 265, 266, 1004} {
		if m[k] == nil {
			t.Errorf("no claim %d", k)
		}
	}
	var sub map[string]map[int]cbor.RawMessage
	if err := cbor.Unmarshal(m[266], &sub); err != nil {
		t.Fatal(err)
	}
	if s := sub["sekisho"]; len(sub) != 1 || string(s[1000]) != "\x02" || s[1001] == nil || s[1003] == nil {
		t.Errorf("appraisal: %v", sub)
	}
	if want := append([]byte{0x58, 33, 1}, newSample(t, image).rec.ID[:0]...); !bytes.HasPrefix(m[256], want) {
		t.Errorf("ueid: %x", m[256])
	}
}

func FuzzVerify(f *testing.F) {
	key := newKey(f)
	data, token := newSample(f, image).make(f, key)
	f.Add(data)
	f.Add(token)
	f.Fuzz(func(t *testing.T, b []byte) {
		v, err := Verify(b, Trust{})
		if err == nil && !v.Same {
			t.Error("no error and another verdict")
		}
	})
}

// BenchmarkMake is what a report adds to an appraisal: encoding and two
// signatures.
func BenchmarkMake(b *testing.B) {
	key, s := newKey(b), newSample(b, image)
	out := verifier.Appraise(s.in)
	for b.Loop() {
		if _, _, err := Make(encoded(s.in), s.in, out, s.rec, org, time.Minute, key); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkVerify(b *testing.B) {
	key, s := newKey(b), newSample(b, image)
	data, _ := s.make(b, key)
	for b.Loop() {
		if _, err := Verify(data, Trust{Key: &key.PublicKey}); err != nil {
			b.Fatal(err)
		}
	}
}

func FuzzCheckToken(f *testing.F) {
	key := newKey(f)
	_, token := newSample(f, image).make(f, key)
	f.Add(token)
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := CheckToken(b, &key.PublicKey, Expect{Now: start}); err == nil {
			t.Error("a token for nobody was accepted")
		}
		if payload, _, err := open(b, maxToken, earType, "", nil); err == nil {
			c, err := decodeAs[Claims](payload)
			if err == nil {
				c.Appraisal()
				c.Device()
			}
		}
	})
}

// encoded is the evidence of an input.
func encoded(in verifier.Input) []byte {
	data, err := in.Evidence.Encode()
	if err != nil {
		panic(err) // the tests made it
	}
	return data
}
