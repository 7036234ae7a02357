package main

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"sekisho/attest"
	"sekisho/attest/attester"
	"sekisho/attest/eventlog/logtest"
	"sekisho/attest/gate"
	"sekisho/attest/seal"
	"sekisho/attest/tpm"
	"sekisho/attest/tpm/faketpm"
	"sekisho/attest/tpm/tpmtest"
)

// csr is a certificate request in PEM.
func csr(t *testing.T, key crypto.Signer) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "taro@CITY.EXAMPLE"}}, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}

func cardRequest(c tpm.Certified, csr []byte) *gate.CardRequest {
	return &gate.CardRequest{CSR: csr, Key: c.Key, Storage: c.Storage, Certify: c.Statement, CertifySig: c.Signature}
}

// card runs card check and returns its exit status and the names of what it
// found.
func (d *desk) card(args ...string) (int, []string) {
	d.t.Helper()
	var out, stderr bytes.Buffer
	exit := administer(d.t.Context(), append([]string{"-json", "card", "check"}, args...), &out, &stderr)
	var r cardReport
	if exit == exitNone {
		return exit, []string{stderr.String()}
	}
	if err := json.Unmarshal(out.Bytes(), &r); err != nil {
		d.t.Fatalf("%v: %s%s", err, &out, &stderr)
	}
	var found []string
	for _, f := range r.Findings {
		if f.Sentence.JA == "" || f.Action.EN == "" {
			d.t.Errorf("%s without words", f.Code)
		}
		found = append(found, f.Code.String())
	}
	if (r.Verdict == "pass") != (exit == exitPass) {
		d.t.Errorf("%s with exit %d", r.Verdict, exit)
	}
	return exit, found
}

// release signs the policies of a release with the desk's key of that name and
// returns that key's policy for logon.
func (d *desk) release(name string) attest.Digest {
	d.t.Helper()
	d.json("refs.json", logtest.Image{Kernel: "k", Initramfs: "i", Cmdline: "c"}.Reference("sekisho", "7"))
	d.must(name+".json", "seal sign", options{sealOptions: sealOptions{key: d.path(name + ".key"), epoch: seal.FirstEpoch}}, d.path("refs.json"))
	key, err := seal.NewReleaseKey(d.keys[name].Public())
	if err != nil {
		d.t.Fatal(err)
	}
	p, err := key.Authorized(seal.PurposeLogin)
	if err != nil {
		d.t.Fatal(err)
	}
	return p
}

func TestCardCheck(t *testing.T) {
	d := newDesk(t, "release", "other", "verifier")
	policy, otherPolicy := d.release("release"), d.release("other")
	dev, elsewhere := faketpm.New(), faketpm.New()
	d.write("ak", dev.Identity().AK)
	key, good := dev.LogonKey(policy, nil)
	request := csr(t, key)
	stranger, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	other := func(on *faketpm.TPM, policy attest.Digest, change func(*tpm2.TPMTPublic)) *gate.CardRequest {
		k, c := on.LogonKey(policy, change)
		return cardRequest(c, csr(t, k))
	}
	attribute := func(p *tpm2.TPMTPublic) { p.ObjectAttributes.FixedTPM = false }
	_, second := dev.LogonKey(policy, nil)
	swapped := good
	swapped.Statement, swapped.Signature = second.Statement, second.Signature
	moved := good
	moved.Storage = append([]byte(nil), good.Storage...)
	moved.Storage[9] ^= 1
	block, _ := pem.Decode(request)
	broken := append([]byte(nil), block.Bytes...)
	broken[len(broken)-1] ^= 1
	forged := pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: broken})
	for _, c := range []struct {
		name string
		r    *gate.CardRequest
		want []string
	}{
		{"good", cardRequest(good, request), nil},
		{"other AK", other(elsewhere, policy, nil), []string{"card-attestation-key"}},
		{"other key in the CSR", cardRequest(good, csr(t, stranger)), []string{"card-request-other-key"}},
		{"forged CSR", cardRequest(good, forged), []string{"card-request-signature"}},
		{"no CSR", cardRequest(good, []byte("x")), []string{"card-request-signature"}},
		{"other attributes", other(dev, policy, attribute), []string{"card-key-attributes"}},
		{"other policy", other(dev, otherPolicy, nil), []string{"card-key-policy"}},
		{"no policy", other(dev, policy, func(p *tpm2.TPMTPublic) {
			p.AuthPolicy, p.ObjectAttributes.UserWithAuth = tpm2.TPM2BDigest{}, true
		}), []string{"card-key-attributes"}},
		{"certification of another key", cardRequest(swapped, request), []string{"card-key-not-certified"}},
		{"in another place", cardRequest(moved, request), []string{"card-key-not-certified"}},
		{"no key", cardRequest(tpm.Certified{Key: []byte{1}, Storage: good.Storage, Statement: good.Statement, Signature: good.Signature}, request), []string{"card-key-attributes"}},
		{"all at once", other(elsewhere, otherPolicy, attribute), []string{"card-attestation-key", "card-key-attributes"}},
	} {
		d.json("r", c.r)
		exit, found := d.card(d.path("r"), "-release", d.path("release.json"), "-ak", d.path("ak"))
		if !slices.Equal(found, c.want) || (exit == exitPass) != (c.want == nil) || exit == exitNone {
			t.Errorf("%s: exit %d, %v", c.name, exit, found)
		}
	}
	d.json("r", cardRequest(good, request))
	bare := *cardRequest(good, request)
	bare.Key = nil
	d.json("bare", &bare)
	d.write("pem", pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: nil}))
	image := logtest.Image{Kernel: "kernel", Initramfs: "initramfs", Cmdline: "quiet"}
	writeReport(t, d.path("report"), d.keys["verifier"], image, image)
	spki, err := x509.MarshalPKIXPublicKey(d.keys["verifier"].Public())
	if err != nil {
		t.Fatal(err)
	}
	d.write("verifier.pub", pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: spki}))
	release := []string{d.path("r"), "-release", d.path("release.json")}
	for _, c := range []struct {
		args []string
		exit int
		want string
	}{
		{append(release, "-ak", d.path("ak"), "-kind", "rsa-2048"), 1, "card-key-attributes"},
		{append(release, "-report", d.path("report"), "-verifier-key", d.path("verifier.pub")), 1, "card-attestation-key"}, // of another device
		{append(release, "-report", d.path("report")), 2, "-verifier-key is needed"},
		{append(release, "-report", d.path("report"), "-verifier-key", d.path("ak")), 2, "ak"},
		{append(release, "-ak", d.path("ak"), "-kind", "dsa"), 2, "dsa"},
		{append(release, "-ak", d.path("pem")), 2, "attestation key"},
		{append(release, "-device", "00", "-socket", d.path("nobody")), 2, "device 00"},
		{release, 2, "is needed"},
		{[]string{d.path("r"), "-ak", d.path("ak")}, 2, "-release"},
		{[]string{d.path("bare"), "-release", d.path("release.json"), "-ak", d.path("ak")}, 2, "no key"},
		{[]string{d.path("absent"), "-release", d.path("release.json"), "-ak", d.path("ak")}, 2, "absent"},
	} {
		if exit, said := d.card(c.args...); exit != c.exit || !strings.Contains(strings.Join(said, " "), c.want) {
			t.Errorf("%v: exit %d, %v", c.args[1:], exit, said)
		}
	}
	var ja, stderr bytes.Buffer
	d.json("r", cardRequest(good, csr(t, stranger)))
	if administer(t.Context(), append([]string{"card", "check", "-lang", "ja", "-ak", d.path("ak")}, release...), &ja, &stderr) != exitRefuse || !strings.Contains(ja.String(), "別の鍵") {
		t.Errorf("%s%s", &ja, &stderr)
	}
}

// onTPM signs as the card does.
type onTPM struct {
	dev    *tpm.TPM
	boot   tpm.Boot
	key    seal.Sealed
	public crypto.PublicKey
}

func (s onTPM) Public() crypto.PublicKey { return s.public }

func (s onTPM) Sign(_ io.Reader, digest []byte, _ crypto.SignerOpts) ([]byte, error) {
	if _, ok := s.public.(*rsa.PublicKey); !ok {
		return s.dev.UseLogonKey(s.boot, s.key, attest.LogonSign, digest)
	}
	info := []byte{0x30, 0x31, 0x30, 0x0d, 6, 9, 0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, 1, 5, 0, 4, 0x20}
	block := append([]byte{0, 1}, bytes.Repeat([]byte{0xff}, 256-3-len(info)-len(digest))...)
	return s.dev.UseLogonKey(s.boot, s.key, attest.LogonRSA, slices.Concat(block, []byte{0}, info, digest))
}

// TestCardCheckTPM: keys of both kinds in a software TPM, bound to a release
// that runs, pass; those of another TPM, and unbound ones, do not.
func TestCardCheckTPM(t *testing.T) {
	emulators := [2]*tpmtest.Emulator{tpmtest.Start(t), tpmtest.Start(t)}
	d := newDesk(t, "release")
	d.release("release")
	key, err := seal.NewReleaseKey(d.keys["release"].Public())
	if err != nil {
		t.Fatal(err)
	}
	refs := &attest.ReferenceValues{Image: "sekisho", Version: "x", PCRs: make(map[int]attest.Digest)}
	for _, i := range []int{7, 11} {
		refs.PCRs[i] = sha256.Sum256(append(make([]byte, 32), bytes.Repeat([]byte{byte(i)}, 32)...))
	}
	release, err := seal.SignPolicy(d.keys["release"], refs, seal.FirstEpoch)
	if err != nil {
		t.Fatal(err)
	}
	boot := tpm.Boot{Release: release, Key: key}
	request := func(dev *tpm.TPM, b tpm.Boot, kind string) string {
		t.Helper()
		k, err := dev.CreateLogonKey(b, kind, false)
		if err != nil {
			t.Fatal(err)
		}
		public, err := x509.ParsePKIXPublicKey(k.SPKI)
		if err != nil {
			t.Fatal(err)
		}
		d.json("r", cardRequest(k.Certified(), csr(t, onTPM{dev, b, k.Sealed, public})))
		return d.path("r")
	}
	for i, e := range emulators {
		dev, err := tpm.Open(e.Socket)
		if err != nil {
			t.Fatal(err)
		}
		defer dev.Close()
		for _, pcr := range []int{7, 11} {
			if err := dev.Extend(pcr, attest.Digest(bytes.Repeat([]byte{byte(pcr)}, 32))); err != nil {
				t.Fatal(err)
			}
		}
		if err := dev.CreateRollbackCounter(release, key); err != nil {
			t.Fatal(err)
		}
		var other []string
		if i == 0 {
			d.write("ak", dev.Identity().AK)
		} else {
			other = []string{"card-attestation-key"}
		}
		for _, kind := range []string{attest.LogonRSA2048, attest.LogonP256} {
			if _, found := d.card(request(dev, boot, kind), "-release", d.path("release.json"), "-ak", d.path("ak"), "-kind", kind); !slices.Equal(found, other) {
				t.Errorf("TPM %d, %s: %v", i, kind, found)
			}
			if _, found := d.card(request(dev, tpm.Boot{}, kind), "-unbound", "-ak", d.path("ak")); !slices.Equal(found, other) {
				t.Errorf("TPM %d, %s, unbound: %v", i, kind, found)
			}
			if _, found := d.card(d.path("r"), "-release", d.path("release.json"), "-ak", d.path("ak")); !slices.Equal(found, append(other[:len(other):len(other)], "card-key-attributes")) {
				t.Errorf("TPM %d, %s, unbound for a release: %v", i, kind, found)
			}
		}
	}
}

// TestCardCheckDevice takes the attestation key from where it is known
// beforehand: a verifier that runs, and a report that it signed.
func TestCardCheckDevice(t *testing.T) {
	d := newDesk(t, "release", "verifier", "a", "b")
	d.approvers("a", "b")
	o := newOrganisation(t, setup{approvers: d.path("approvers.pem")})
	policy := d.release("release")
	image := logtest.Image{Kernel: "kernel", Initramfs: "initramfs", Cmdline: "quiet"}
	reported := writeReport(t, d.path("report"), d.keys["verifier"], image, image)
	spki, err := x509.MarshalPKIXPublicKey(d.keys["verifier"].Public())
	if err != nil {
		t.Fatal(err)
	}
	d.write("verifier.pub", pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: spki}))
	enrolled := faketpm.New()
	enrolled.PCRs = image.Boot().PCRs()
	if err := enrolled.Certify(o.maker, o.key, nil); err != nil {
		t.Fatal(err)
	}
	o.laptop(image.Boot(), strings.Fields(o.ctl(0, "ticket", "create"))[0], func() (attester.Hardware, error) { return enrolled, nil })
	endorsement, err := tpm.ParsePublic(enrolled.Identity().EK)
	if err != nil {
		t.Fatal(err)
	}
	id := attest.DeviceID(endorsement.Name()).String()
	o.until("the device", func(s string) bool { return strings.Contains(s, id) }, "device", "list")
	sources := map[*faketpm.TPM][]string{
		enrolled: {"-socket", o.socket, "-device", id},
		reported: {"-report", d.path("report"), "-verifier-key", d.path("verifier.pub")},
	}
	for dev := range sources {
		key, c := dev.LogonKey(policy, nil)
		d.json("r", cardRequest(c, csr(t, key)))
		for of, source := range sources {
			want := exitRefuse
			if of == dev {
				want = exitPass
			}
			if exit, found := d.card(append([]string{d.path("r"), "-release", d.path("release.json")}, source...)...); exit != want {
				t.Errorf("%s: exit %d, %v", source[0], exit, found)
			}
		}
	}
	if exit, said := d.card(d.path("r"), "-release", d.path("release.json"), "-socket", o.socket, "-device", attest.Digest{1}.String()); exit != exitNone {
		t.Errorf("a device that is not enrolled: exit %d, %v", exit, said)
	}
	o.cardPermit(d, id)
}

// cardPermit has a permit for a device's card made, signed by two and passed
// on.
func (o *organisation) cardPermit(d *desk, id string) {
	o.t.Helper()
	o.ctl(2, "card", "permit", "-device", id, "-user", "taro", "-do", "open", "-reason", "forgot it")
	o.ctl(2, "card", "permit", "-device", id, "-user", "taro", "-do", "pin-only", "-minutes", "2000", "-reason", "broken")
	sign := func(who, from, to string) {
		d.write(to, []byte(o.ctl(0, "approval", "sign", "-key", d.path(who+".key"), d.path(from))))
	}
	d.write("p0", []byte(o.ctl(0, "card", "permit", "-device", id, "-user", "taro", "-do", "enrol", "-reason", "new here")))
	sign("a", "p0", "p1")
	sign("b", "p1", "p2")
	o.ctl(1, "card", "add", d.path("p1"))
	if s := o.ctl(0, "card", "add", d.path("p2")); !strings.Contains(s, "enrol taro") {
		o.t.Error(s)
	}
	o.ctl(2, "card", "add", d.path("p2"))
	if s := o.ctl(0, "card", "show", id); !strings.Contains(s, "new here") {
		o.t.Error(s)
	}
	if s := o.ctl(0, "card", "logons", id); strings.Count(s, "\n") != 1 {
		o.t.Error(s)
	}
	o.ctl(2, "card", "request", id)
}
