package verifier

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"math/big"
	mathrand "math/rand/v2"
	"strings"
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/attest/eventlog/logtest"
	"sekisho/attest/tpm"
	"sekisho/attest/tpm/faketpm"
)

const name = "verifier.test"

// nonceKey is shared by the verifiers of these tests.
var nonceKey = [NonceKeySize]byte{1}

var (
	image = logtest.Image{Kernel: "kernel 1", Initramfs: "initramfs 1", Cmdline: "quiet"}
	start = time.Date(2026, 11, 21, 10, 0, 0, 0, time.UTC)
)

// bench is a device that is enrolled, and evidence of it that is right.
type bench struct {
	t     *testing.T
	tpm   *faketpm.TPM
	in    Input
	extra attest.Digest
}

func newBench(t *testing.T) *bench {
	t.Helper()
	b := &bench{t: t, tpm: faketpm.New()}
	boot := image.Boot()
	b.tpm.PCRs = boot.PCRs()
	id := attest.DeviceID([]byte("ek"))
	ident := b.tpm.Identity()
	b.in = Input{
		Verifier: name, Now: start, References: []attest.ReferenceValues{image.Reference("sekisho", "1")},
		Device: &Device{ID: id, AK: ident.AK},
		Evidence: &attest.Evidence{
			Profile: attest.Profile, Device: id[:], Verifier: name, Purpose: attest.PurposeNetwork,
			Nonce: []byte("nonce"), EventLog: boot.Bytes(), Key: ident.Key,
		},
	}
	b.sign()
	return b
}

// sign binds and signs the evidence as it stands.
func (b *bench) sign() {
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
	b.extra, err = attest.Binding{
		Nonce: e.Nonce, Device: e.DeviceID(), Verifier: e.Verifier, Purpose: e.Purpose,
		Key: sha256.Sum256(spki), EventLog: sha256.Sum256(e.EventLog),
	}.Digest()
	if err != nil {
		b.t.Fatal(err)
	}
	b.attest(b.extra)
}

func (b *bench) attest(extra attest.Digest) {
	b.t.Helper()
	p, err := b.tpm.Attest(extra)
	if err != nil {
		b.t.Fatal(err)
	}
	e := b.in.Evidence
	e.Quote, e.QuoteSig, e.Certify, e.CertifySig = p.Quote, p.QuoteSig, p.Certify, p.CertifySig
	e.PCRs = make(map[int][]byte)
	for i, v := range p.PCRs {
		e.PCRs[i] = v[:]
	}
}

// requote replaces the quote by one that change has altered before signing.
func (b *bench) requote(change func(*faketpm.Quote)) {
	b.in.Evidence.Quote, b.in.Evidence.QuoteSig = b.tpm.Quote(b.extra, change)
}

func TestAppraiseAffirms(t *testing.T) {
	b := newBench(t)
	out := Appraise(b.in)
	if out.Result.Status != attest.StatusAffirming || out.Result.Reason != attest.ReasonNone || out.Result.Image != "sekisho 1" {
		t.Fatalf("result: %+v", out.Result)
	}
	if out.Key == nil || out.Clock.Clock == 0 {
		t.Errorf("outcome: %+v", out)
	}
}

// TestAppraiseRefuses has one case for each line of Appraise's list of what an
// affirming result proves.
func TestAppraiseRefuses(t *testing.T) {
	for _, c := range []struct {
		name   string
		attack func(*bench)
		want   attest.Reason
	}{
		{"for another verifier", func(b *bench) { b.in.Evidence.Verifier = "other"; b.sign() }, attest.ReasonVerifierMismatch},
		{"for another purpose", func(b *bench) { b.in.Evidence.Purpose = 9; b.sign() }, attest.ReasonPurposeMismatch},
		{"not enrolled", func(b *bench) { b.in.Device = nil }, attest.ReasonDeviceUnknown},
		{"record of another device", func(b *bench) { b.in.Device.ID[0] ^= 1 }, attest.ReasonDeviceUnknown},
		{"foreign AK", func(b *bench) { b.in.Device.AK = faketpm.New().Identity().AK }, attest.ReasonSignatureInvalid},
		{"signature flipped", func(b *bench) { b.in.Evidence.QuoteSig[10] ^= 1 }, attest.ReasonSignatureInvalid},
		{"signature empty", func(b *bench) { b.in.Evidence.QuoteSig = nil }, attest.ReasonSignatureInvalid},
		{"quote flipped", func(b *bench) { b.in.Evidence.Quote[60] ^= 1 }, attest.ReasonSignatureInvalid},
		{"magic", func(b *bench) { b.requote(func(q *faketpm.Quote) { q.Magic = 0x12345678 }) }, attest.ReasonQuoteMagic},
		{"certification as quote", func(b *bench) {
			b.in.Evidence.Quote, b.in.Evidence.QuoteSig = b.in.Evidence.Certify, b.in.Evidence.CertifySig
		}, attest.ReasonQuoteType},
		{"other signer named", func(b *bench) { b.requote(func(q *faketpm.Quote) { q.Signer[5] ^= 1 }) }, attest.ReasonQuoteSigner},
		{"wrong extraData", func(b *bench) { b.attest(attest.Digest{1}) }, attest.ReasonBindingMismatch},
		{"nonce exchanged", func(b *bench) { b.in.Evidence.Nonce = []byte("other") }, attest.ReasonBindingMismatch},
		{"key exchanged", func(b *bench) { b.in.Evidence.Key = faketpm.New().Identity().Key }, attest.ReasonBindingMismatch},
		{"model exchanged", func(b *bench) { b.in.Evidence.Model = "another laptop" }, attest.ReasonBindingMismatch},
		{"log exchanged", func(b *bench) { b.in.Evidence.EventLog = logtest.New().Bytes() }, attest.ReasonBindingMismatch},
		{"empty selection", func(b *bench) { b.requote(func(q *faketpm.Quote) { q.Selections = nil }) }, attest.ReasonPCRSelection},
		{"selection of no PCR", func(b *bench) { b.requote(func(q *faketpm.Quote) { q.Selections[0].Mask = make([]byte, 3) }) }, attest.ReasonPCRSelection},
		{"a PCR less", func(b *bench) { b.requote(func(q *faketpm.Quote) { q.Selections[0].Mask[1] &^= 1 << 3 }) }, attest.ReasonPCRSelection},
		{"a PCR more", func(b *bench) { b.requote(func(q *faketpm.Quote) { q.Selections[0].Mask[2] = 1 }) }, attest.ReasonPCRSelection},
		{"another bank", func(b *bench) { b.requote(func(q *faketpm.Quote) { q.Selections[0].Bank = 4 }) }, attest.ReasonPCRSelection},
		{"two banks", func(b *bench) {
			b.requote(func(q *faketpm.Quote) { q.Selections = append(q.Selections, q.Selections[0]) })
		}, attest.ReasonPCRSelection},
		{"a value missing", func(b *bench) { delete(b.in.Evidence.PCRs, 9) }, attest.ReasonPCRSelection},
		{"a value not quoted", func(b *bench) { b.in.Evidence.PCRs[16] = make([]byte, 32) }, attest.ReasonPCRSelection},
		{"values not the quoted", func(b *bench) { b.in.Evidence.PCRs[11] = make([]byte, 32) }, attest.ReasonPCRDigest},
		{"clock went back", func(b *bench) { b.in.Device.Clock = &tpm.Clock{Clock: 1 << 40, ResetCount: 1} }, attest.ReasonClockReversed},
		{"replay of the same evidence", func(b *bench) {
			c := Appraise(b.in).Clock
			b.in.Device.Clock = &c
		}, attest.ReasonClockReversed},
		{"clock not safe", func(b *bench) {
			b.tpm.Clock.Safe = false
			b.sign()
			b.in.Device.Clock = &tpm.Clock{Clock: 1 << 40, ResetCount: 1}
		}, attest.ReasonClockUnsafe},
		{"reset count went back", func(b *bench) { b.in.Device.Clock = &tpm.Clock{ResetCount: 2} }, attest.ReasonClockReversed},
		{"key of the AK's template", func(b *bench) { b.in.Evidence.Key = b.tpm.Identity().AK; b.sign() }, attest.ReasonKeyAttributes},
		{"key no public area", func(b *bench) { b.in.Evidence.Key = []byte("key") }, attest.ReasonKeyAttributes},
		{"certification by another AK", func(b *bench) {
			other, err := faketpm.New().Attest(b.extra)
			if err != nil {
				b.t.Fatal(err)
			}
			b.in.Evidence.Certify, b.in.Evidence.CertifySig = other.Certify, other.CertifySig
		}, attest.ReasonKeyNotCertified},
		{"certification of another key", func(b *bench) {
			b.in.Evidence.Key = faketpm.New().Identity().Key
			b.sign()
		}, attest.ReasonKeyNotCertified},
		{"quote as certification", func(b *bench) {
			b.in.Evidence.Certify, b.in.Evidence.CertifySig = b.in.Evidence.Quote, b.in.Evidence.QuoteSig
		}, attest.ReasonKeyNotCertified},
		{"certification of another session", func(b *bench) {
			old, err := b.tpm.Attest(attest.Digest{7})
			if err != nil {
				b.t.Fatal(err)
			}
			b.in.Evidence.Certify, b.in.Evidence.CertifySig = old.Certify, old.CertifySig
		}, attest.ReasonKeyNotCertified},
		{"readers disagree", func(b *bench) {
			log := b.in.Evidence.EventLog
			// The vendor's part of the Spec ID event, the last of the header:
			// nobody else looks at its length.
			b.in.Evidence.EventLog = bytes.Clone(log)
			b.in.Evidence.EventLog[32+binary.LittleEndian.Uint32(log[28:])-1] = 9
			b.sign()
		}, attest.ReasonLogMalformed},
		{"log malformed", func(b *bench) { b.in.Evidence.EventLog = []byte("log"); b.sign() }, attest.ReasonLogMalformed},
		{"log of another boot", func(b *bench) {
			b.in.Evidence.EventLog = logtest.Image{Kernel: "other"}.Boot().Bytes()
			b.sign()
		}, attest.ReasonLogReplay},
		{"log without events", func(b *bench) { b.in.Evidence.EventLog = logtest.New().Bytes(); b.sign() }, attest.ReasonLogMissingEvents},
		{"extended after boot", func(b *bench) { b.tpm.PCRs[15] = attest.Digest{1}; b.sign() }, attest.ReasonLogMissingEvents},
		{"another kernel", func(b *bench) {
			evil := image
			evil.Kernel = "evil"
			b.tpm.PCRs, b.in.Evidence.EventLog = evil.Boot().PCRs(), evil.Boot().Bytes()
			b.sign()
		}, attest.ReasonImageMismatch},
		{"an unknown image", func(b *bench) {
			evil := logtest.Image{Kernel: "a", Initramfs: "b", Cmdline: "c"}
			b.tpm.PCRs, b.in.Evidence.EventLog = evil.Boot().PCRs(), evil.Boot().Bytes()
			b.sign()
		}, attest.ReasonImageUnknown},
		{"no reference values", func(b *bench) { b.in.References = nil }, attest.ReasonNoReferenceValues},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t)
			c.attack(b)
			out := Appraise(b.in)
			if out.Result.Status != attest.StatusContraindicated || out.Result.Reason != c.want || out.Result.Detail == "" {
				t.Errorf("%v %v (%s), want %v", out.Result.Status, out.Result.Reason, out.Result.Detail, c.want)
			}
			if out.Key != nil || out.Clock != (tpm.Clock{}) || out.Volume != nil {
				t.Errorf("a refusal entitles to %+v", out)
			}
			for _, f := range out.Result.Findings {
				if f.Sentence.JA == "" || f.Sentence.EN == "" || f.Action.JA == "" || f.Action.EN == "" {
					t.Errorf("%+v is not said in both languages, with what to do", f)
				}
			}
		})
	}
}

func TestAppraiseAcceptsANewerBoot(t *testing.T) {
	b := newBench(t)
	b.in.Device.Clock = &tpm.Clock{Clock: 1 << 40, ResetCount: 0}
	if out := Appraise(b.in); out.Result.Status != attest.StatusAffirming {
		t.Errorf("result: %+v", out.Result)
	}
}

func refusal(t *testing.T, err error) attest.Reason {
	t.Helper()
	if err == nil {
		return attest.ReasonNone
	}
	var r *attest.Refusal
	if !errors.As(err, &r) {
		t.Fatalf("%v is no refusal", err)
	}
	return r.Reason
}

func TestNonces(t *testing.T) {
	n, device := NewNonces(name, nonceKey), attest.Digest{1}
	nonce := func() []byte { return n.New(device, start) }
	flipped := func(i int) []byte {
		v := nonce()
		v[i] ^= 1
		return v
	}
	again := nonce()
	if a, err := n.Check(again, device, start); err != nil || !bytes.Equal(a.ID[:], again[:nonceRandom]) || !a.Issued.Equal(start) {
		t.Fatal(a, err)
	}
	for _, c := range []struct {
		name   string
		nonce  []byte
		device attest.Digest
		at     time.Time
		want   attest.Reason
	}{
		{"fresh", nonce(), device, start.Add(NonceLife), attest.ReasonNone},
		{"again: whether it was used is for the store to say", again, device, start, attest.ReasonNone},
		{"expired", nonce(), device, start.Add(NonceLife + time.Millisecond), attest.ReasonNonceExpired},
		{"from the future", nonce(), device, start.Add(-NonceLife - time.Second), attest.ReasonNonceExpired},
		{"another device", nonce(), attest.Digest{2}, start, attest.ReasonDeviceMismatch},
		{"empty", nil, device, start, attest.ReasonNonceInvalid},
		{"truncated", nonce()[:nonceSize-1], device, start, attest.ReasonNonceInvalid},
		{"random flipped", flipped(0), device, start, attest.ReasonNonceInvalid},
		{"time flipped", flipped(20), device, start, attest.ReasonNonceInvalid},
		{"device flipped", flipped(30), device, start, attest.ReasonDeviceMismatch},
		{"mac flipped", flipped(nonceSize - 1), device, start, attest.ReasonNonceInvalid},
		{"another verifier's", NewNonces("other", nonceKey).New(device, start), device, start, attest.ReasonVerifierMismatch},
		{"another organisation's", NewNonces(name, [NonceKeySize]byte{9}).New(device, start), device, start, attest.ReasonNonceInvalid},
	} {
		if got := reason(t, n, c.nonce, c.device, c.at); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

func reason(t *testing.T, n *Nonces, nonce []byte, device attest.Digest, at time.Time) attest.Reason {
	t.Helper()
	_, err := n.Check(nonce, device, at)
	return refusal(t, err)
}

func TestNoncesAreDistinct(t *testing.T) {
	n, seen := NewNonces(name, nonceKey), make(map[string]bool)
	for range 1000 {
		seen[string(n.New(attest.Digest{}, start)[:nonceRandom])] = true
	}
	if len(seen) != 1000 {
		t.Errorf("%d distinct nonces of 1000", len(seen))
	}
}

func FuzzNonce(f *testing.F) {
	n := NewNonces(name, nonceKey)
	f.Add(n.New(attest.Digest{}, start)[:nonceBody])
	f.Fuzz(func(t *testing.T, data []byte) {
		if _, err := n.Check(data, attest.Digest{}, start); err == nil {
			t.Error("a forged nonce was accepted")
		}
	})
}

// TestIssue: a certificate is, byte for byte, what crypto/x509 makes of the
// template, and its signature is good, for CA keys of each curve.
func TestIssue(t *testing.T) {
	device := attest.Digest{0xab}
	leaf, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		curve        elliptic.Curve
		organization string
		result       string
		now          time.Time
	}{
		{elliptic.P256(), "Test City", ResultID([]byte("evidence")), start},
		{elliptic.P384(), "Test City", "ff000000000000000000000000000001", start},
		{elliptic.P521(), "Test City", "00000000000000000000000000000001", start},
		{elliptic.P256(), "試験市", "7fffffffffffffffffffffffffffffff", start},
		{elliptic.P256(), strings.Repeat("long ", 40), "80ffffffffffffffffffffffffffffff", time.Date(2049, 12, 31, 23, 55, 0, 0, time.UTC)},
	} {
		key, err := ecdsa.GenerateKey(c.curve, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		template := &x509.Certificate{
			SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "devices"}, IsCA: true, BasicConstraintsValid: true,
			KeyUsage: x509.KeyUsageCertSign, NotBefore: c.now.Add(-time.Hour), NotAfter: c.now.Add(time.Hour),
		}
		der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		ca, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		issuer, err := NewIssuer(ca, key, c.organization, 10*time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		if der, err = issuer.Issue(device, &leaf.PublicKey, c.result, c.now); err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		if err := cert.CheckSignatureFrom(ca); err != nil {
			t.Error(c, err)
		}
		if cert.Subject.CommonName != device.String() || cert.Subject.Organization[0] != c.organization || cert.IsCA ||
			len(cert.URIs) != 1 || cert.URIs[0].String() != "urn:sekisho:device:"+device.String() ||
			len(cert.ExtKeyUsage) != 1 || cert.ExtKeyUsage[0] != x509.ExtKeyUsageClientAuth || !leaf.PublicKey.Equal(cert.PublicKey) {
			t.Errorf("certificate: %+v", cert)
		}
		if !cert.NotBefore.Equal(c.now.Add(-time.Minute)) || !cert.NotAfter.Equal(c.now.Add(10*time.Minute)) {
			t.Errorf("in force from %v to %v", cert.NotBefore, cert.NotAfter)
		}
		serial, _ := new(big.Int).SetString(c.result, 16)
		want, err := x509.CreateCertificate(rand.Reader, issuer.template(device, serial, c.now), ca, &leaf.PublicKey, key)
		if err != nil {
			t.Fatal(err)
		}
		theirs, err := x509.ParseCertificate(want)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(cert.RawTBSCertificate, theirs.RawTBSCertificate) || cert.SignatureAlgorithm != theirs.SignatureAlgorithm {
			t.Errorf("%s, %s:\n%x\nwant\n%x", c.organization, c.result, cert.RawTBSCertificate, theirs.RawTBSCertificate)
		}
		for _, life := range []time.Duration{0, time.Second, 48 * time.Hour} {
			if _, err := NewIssuer(ca, key, c.organization, life); err == nil {
				t.Errorf("a lifetime of %v was accepted", life)
			}
		}
	}
}

// TestIssueLikeCryptoX509 makes certificates of any device, result, key and
// time, on both sides of 2050, by CAs with and without a key identifier: what is
// signed must be what crypto/x509 makes.
func TestIssueLikeCryptoX509(t *testing.T) {
	random := mathrand.New(mathrand.NewPCG(1, 2))
	text := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(random.Uint32())
		}
		return b
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	var leaves []*ecdsa.PublicKey
	for _, curve := range []elliptic.Curve{elliptic.P256(), elliptic.P384()} {
		leaf, err := ecdsa.GenerateKey(curve, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		leaves = append(leaves, &leaf.PublicKey)
	}
	for _, id := range [][]byte{nil, text(20)} {
		template := &x509.Certificate{
			SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "devices", Country: []string{"JP"}, Organization: []string{"試験市"}}, IsCA: true, BasicConstraintsValid: true,
			KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Date(1990, 1, 1, 0, 0, 0, 0, time.UTC), NotAfter: time.Date(2070, 1, 1, 0, 0, 0, 0, time.UTC),
		}
		if template.SubjectKeyId = id; id == nil {
			template.IsCA, template.BasicConstraintsValid = false, false // crypto/x509 would give it one
		}
		der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		ca, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		ca.IsCA = true
		for range 100 {
			lifetime := MinLifetime + time.Duration(random.Int64N(int64(MaxLifetime-MinLifetime)))
			issuer, err := NewIssuer(ca, key, "City", lifetime)
			if err != nil {
				t.Fatal(err)
			}
			now := time.Unix(631152000+random.Int64N(79*365*24*3600), random.Int64N(1e9)).In(time.FixedZone("JST", 9*3600))
			if random.IntN(3) == 0 {
				now = time.Date(2049, 12, 31, 23, 59, 59, 0, time.UTC).Add(time.Duration(random.Int64N(int64(2*lifetime))) - lifetime)
			}
			device, result := attest.Digest(text(32)), hex.EncodeToString(text(16))
			serial, _ := new(big.Int).SetString(result, 16)
			leaf := leaves[random.IntN(2)]
			der, err := issuer.Issue(device, leaf, result, now)
			if err != nil {
				t.Fatal(err)
			}
			ours, err := x509.ParseCertificate(der)
			if err != nil {
				t.Fatal(err)
			}
			if der, err = x509.CreateCertificate(rand.Reader, issuer.template(device, serial, now), ca, leaf, key); err != nil {
				t.Fatal(err)
			}
			theirs, err := x509.ParseCertificate(der)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(ours.RawTBSCertificate, theirs.RawTBSCertificate) || ours.CheckSignatureFrom(ca) != nil && id != nil {
				t.Fatalf("%s, %s, %s:\n%x\nwant\n%x", device, result, now, ours.RawTBSCertificate, theirs.RawTBSCertificate)
			}
		}
		issuer, err := NewIssuer(ca, key, "City", MaxLifetime)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := issuer.Issue(attest.Digest{}, leaves[0], strings.Repeat("1", 32), ca.NotAfter.Add(time.Second)); err == nil {
			t.Error("an expired CA certified a key")
		}
	}
}

func TestHead(t *testing.T) {
	if _, _, err := tpm.Head(bytes.Repeat([]byte{1}, 5)); err == nil {
		t.Error("five bytes have a head")
	}
	magic, kind, err := tpm.Head(binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint32(nil, tpm.Generated), tpm.TypeQuote))
	if err != nil || magic != tpm.Generated || kind != tpm.TypeQuote {
		t.Errorf("%x %x %v", magic, kind, err)
	}
}
