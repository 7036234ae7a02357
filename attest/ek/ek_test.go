package ek_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/attest/ek"
	"sekisho/attest/tpm"
	"sekisho/attest/tpm/faketpm"
)

// corpus is public data beside the repository.
const corpus = "../../../shared/corpus/attest"

func readFile(t testing.TB, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(corpus, name))
	if errors.Is(err, os.ErrNotExist) {
		t.Skip("needs the corpus beside the repository: " + corpus)
	}
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// pin reads certificates of the corpus, PEM or DER.
func pin(t testing.TB, names ...string) *ek.Roots {
	t.Helper()
	r := ek.NewRoots()
	for _, name := range names {
		data := readFile(t, name)
		if !bytes.Contains(data, []byte("-----BEGIN")) {
			data = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: data})
		}
		if err := r.AddPEM(data); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	return r
}

// vendors pins what the manifest's class vendor-roots holds.
func vendors(t testing.TB) *ek.Roots {
	t.Helper()
	readFile(t, "MANIFEST.md")
	var names []string
	err := filepath.WalkDir(filepath.Join(corpus, "vendor-roots"), func(p string, d os.DirEntry, err error) error {
		if ext := filepath.Ext(p); err == nil && (ext == ".pem" || ext == ".crt") {
			rel, err := filepath.Rel(corpus, p)
			names = append(names, rel)
			return err
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return pin(t, names...)
}

var now = time.Date(2026, 11, 22, 0, 0, 0, 0, time.UTC)

// TestSamples prints file, expected and got for every certificate of the
// manifest's class ekcert.
func TestSamples(t *testing.T) {
	makers := vendors(t)
	google := []string{"ekcert/gotpmtools-ca-gcp_ek_ak_ca_root.crt", "ekcert/gotpmtools-ca-gcp_ek_ak_ca_intermediate_v3.crt", "ekcert/gotpmtools-ca-tpm_ek_root_1.cer"}
	identity := []string{"ekcert/keylime-idevid-chain.pem"}
	lab := []string{"ekcert/hirs-ci-ca.crt"}
	for _, c := range []struct {
		file    string
		roots   []string // nil: the makers'
		verdict string
		keyType string
		says    string // a part of a sentence
	}{
		{"gotpmtools-ca-gcp_ek_ak_ca_intermediate_v3.crt", google, "refuse", "RSA 4096", "is a CA's"},
		{"gotpmtools-ca-gcp_ek_ak_ca_root.crt", google, "refuse", "RSA 4096", "is a CA's"},
		{"gotpmtools-ca-tpm_ek_root_1.cer", google, "refuse", "RSA 4096", "is a CA's"},
		{"hirs-ci-ca.crt", lab, "refuse", "RSA 2048", "is a CA's"},
		{"keylime-idevid-chain.pem", identity, "refuse", "RSA 4096", "is a CA's"},
		{"gotpmtools-gce-pca_tpm_ecc_enc_cert.pem", google, "pass", "ECC P-256", ""},
		{"gotpmtools-gce-pca_tpm_rsa_sign_cert.pem", google, "pass", "RSA 2048", "attestation key"},
		{"gotpmtools-gce-uca_tpm_rsa_enc_cert.pem", nil, "refuse", "RSA 2048", "not pinned"},
		{"guard-sr630-ek.pem", nil, "pass", "RSA 2048", ""},
		{"hirs-ab21ccf2-tpmcert.pem", nil, "refuse", "RSAES-OAEP (TPM 1.2)", "cannot be used"},
		{"hirs-nuc-1-ek_cert_7_byte_header_removed.cer", nil, "refuse", "RSAES-OAEP (TPM 1.2)", "cannot be used"},
		{"hirs-nuc-1-ek_cert_untouched.cer", nil, "refuse", "RSAES-OAEP (TPM 1.2)", "cannot be used"},
		{"hirs-ci-ek_cert.der", nil, "refuse", "RSA 2041", "not pinned"},
		{"hirs-ci-ek_cert.der", lab, "pass", "RSA 2041", ""},
		{"keylime-iak.der", nil, "refuse", "RSA 2048", "not pinned"},
		{"keylime-iak.der", identity, "pass", "RSA 2048", "expired"},
		{"keylime-idevid.der", nil, "refuse", "RSASSA-PSS", "not pinned"},
		{"keylime-idevid.der", identity, "pass", "RSASSA-PSS", "device identity"},
		{"keylime-infineon-rsa.der", nil, "pass", "RSA 2048", ""},
		{"keylime-nuvoton-malformed-2.der", nil, "pass", "RSA 2048", ""},
		{"keylime-stm-rsa.der", nil, "pass", "RSA 2048", ""},
	} {
		raw := readFile(t, "ekcert/"+c.file)
		cert, err := ek.Parse(raw)
		if err != nil {
			t.Errorf("%s: %v", c.file, err)
			continue
		}
		if !bytes.Equal(cert.Received, raw) {
			t.Errorf("%s: not kept byte for byte", c.file)
		}
		roots := makers
		if c.roots != nil {
			roots = pin(t, c.roots...)
		}
		r := ek.Judge(cert, roots, now)
		t.Logf("%-50s expected %-6s %-20s  got %-6s %-20s chain of %d", c.file, c.verdict, c.keyType, r.Verdict, r.KeyType, len(r.Chain))
		if strings.Contains(c.file, "-gce-") && (r.Instance == nil || r.Instance.Zone != "us-central1-a" || r.Instance.ProjectID != "google.com:wuale-gcp-testing" || !strings.HasPrefix(r.Instance.Name, "cs-debug")) {
			t.Errorf("%s: instance %+v", c.file, r.Instance)
		}
		said := c.says == ""
		for _, f := range r.Findings {
			said = said || strings.Contains(f.Sentence.EN, c.says)
		}
		if r.Verdict != c.verdict || r.KeyType != c.keyType || !said {
			t.Errorf("%s: %+v, want a finding with %q", c.file, r, c.says)
		}
	}
}

// TestFormsOfTPMs reads certificates as TPMs keep them, and finds expiry alone
// no reason to refuse.
func TestFormsOfTPMs(t *testing.T) {
	d := faketpm.New()
	maker, key := authority(t)
	if err := d.Certify(maker, key, nil); err != nil {
		t.Fatal(err)
	}
	plain, roots := d.Identity().EKCertificate, ek.NewRoots(maker)
	header := append([]byte{0x10, 0x01, 0, 0, 0, 0x10, 0x02}, plain...)
	public, err := tpm.ParsePublic(d.Identity().EK)
	if err != nil {
		t.Fatal(err)
	}
	for name, raw := range map[string][]byte{
		"plain": plain, "with header": header, "padded": append(bytes.Clone(plain), 0xff, 0xff), "both": append(bytes.Clone(header), 0, 0, 0),
	} {
		c, err := ek.Parse(raw)
		if err != nil || !bytes.Equal(c.Raw, plain) {
			t.Errorf("%s: %v", name, err)
		}
		for _, at := range []time.Time{time.Now(), time.Now().AddDate(100, 0, 0)} {
			if err := ek.Check(public, raw, roots, at); err != nil {
				t.Errorf("%s, %s: %v", name, at, err)
			}
		}
	}
	other, err := tpm.ParsePublic(faketpm.New().Identity().EK)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name  string
		key   *tpm.Public
		raw   []byte
		roots *ek.Roots
		want  attest.Reason
	}{
		{"of another TPM", other, plain, roots, attest.ReasonEKMismatch},
		{"none", public, nil, roots, attest.ReasonEKMissing},
		{"too large", public, make([]byte, ek.MaxCertificate+1), roots, attest.ReasonEKUntrusted},
		{"the CA's own", public, maker.Raw, roots, attest.ReasonEKUntrusted},
		{"maker not pinned", public, plain, ek.NewRoots(), attest.ReasonEKUntrusted},
		{"nothing pinned", public, plain, nil, attest.ReasonEKUntrusted},
	} {
		var r *attest.Refusal
		if err := ek.Check(c.key, c.raw, c.roots, time.Now()); !errors.As(err, &r) || r.Reason != c.want {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
}

// TestOtherUses refuses, by its use, what a maker certified for something else
// than endorsement, such as a server or an attestation key.
func TestOtherUses(t *testing.T) {
	maker, key := authority(t)
	leaf, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	endorsement, attestation := asn1.ObjectIdentifier{2, 23, 133, 8, 1}, asn1.ObjectIdentifier{2, 23, 133, 8, 3}
	for _, c := range []struct {
		known   []x509.ExtKeyUsage
		unknown []asn1.ObjectIdentifier
		want    bool
	}{
		{nil, nil, true}, // as Google's
		{nil, []asn1.ObjectIdentifier{endorsement}, true},
		{[]x509.ExtKeyUsage{x509.ExtKeyUsageAny}, nil, true},
		{[]x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, []asn1.ObjectIdentifier{attestation, endorsement}, true},
		{nil, []asn1.ObjectIdentifier{attestation}, false},
		{[]x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, nil, false},
	} {
		template := &x509.Certificate{SerialNumber: big.NewInt(2), NotBefore: maker.NotBefore, NotAfter: maker.NotAfter,
			KeyUsage: x509.KeyUsageKeyAgreement, ExtKeyUsage: c.known, UnknownExtKeyUsage: c.unknown}
		der, err := x509.CreateCertificate(rand.Reader, template, maker, leaf.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := ek.Parse(der)
		if err != nil {
			t.Fatal(err)
		}
		if r := ek.Judge(cert, ek.NewRoots(maker), time.Now()); r.Accepted != c.want {
			t.Errorf("%v %v: %s, %+v", c.known, c.unknown, r.Verdict, r.Findings)
		}
	}
}

// TestCAsOfTheTPM is a TPM that brings CAs along, between its own certificate
// and the maker's, as Intel's do since the 11th generation.
func TestCAsOfTheTPM(t *testing.T) {
	maker, makerKey := authority(t)
	none, usage := asn1.ObjectIdentifier{2, 23, 133, 8, 3}, x509.KeyUsageCertSign
	type link struct {
		name string
		ca   bool
		path int // -1: any
		use  x509.KeyUsage
		eku  []asn1.ObjectIdentifier
	}
	rom, kernel, leaf := link{"rom", true, -1, usage, nil}, link{"kernel", true, 0, usage, nil}, link{"", false, -1, x509.KeyUsageKeyAgreement, nil}
	build := func(links ...link) (all [][]byte) {
		parent, key := maker, makerKey
		for i, l := range links {
			own, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			template := &x509.Certificate{SerialNumber: big.NewInt(int64(i + 2)), Subject: pkix.Name{CommonName: l.name}, NotBefore: maker.NotBefore, NotAfter: maker.NotAfter,
				KeyUsage: l.use, UnknownExtKeyUsage: l.eku, BasicConstraintsValid: true, IsCA: l.ca}
			if l.ca {
				template.MaxPathLen, template.MaxPathLenZero = l.path, l.path == 0
			}
			der, err := x509.CreateCertificate(rand.Reader, template, parent, own.Public(), key)
			if err != nil {
				t.Fatal(err)
			}
			if parent, err = x509.ParseCertificate(der); err != nil {
				t.Fatal(err)
			}
			key, all = own, append([][]byte{der}, all...) // the leaf first
		}
		return all
	}
	good := build(rom, kernel, leaf)
	text := func(list [][]byte) (out []byte) {
		for _, der := range list {
			out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
		}
		return out
	}
	changed := func(f func(l []link)) []byte {
		l := []link{rom, kernel, leaf}
		f(l)
		return bytes.Join(build(l...), nil)
	}
	short := *maker
	short.MaxPathLen, short.MaxPathLenZero = 1, false
	roots := ek.NewRoots(maker)
	for _, c := range []struct {
		name  string
		raw   []byte
		roots *ek.Roots
		want  bool
	}{
		{"CAs behind it", bytes.Join(good, nil), roots, true},
		{"in another order", bytes.Join([][]byte{good[0], good[2], good[1]}, nil), roots, true},
		{"padding between", bytes.Join(good, []byte{0xff, 0xff, 0}), roots, true},
		{"PEM", text(good), roots, true},
		{"the maker's own beside them", bytes.Join(append(slices.Clone(good), maker.Raw), nil), roots, true},
		{"one missing", bytes.Join([][]byte{good[0], good[2]}, nil), roots, false},
		{"maker not pinned, its own beside them", bytes.Join(append(slices.Clone(good), maker.Raw), nil), ek.NewRoots(), false},
		{"nothing pinned", bytes.Join(good, nil), nil, false},
		{"EK that says CA and may sign nothing, as Intel's", changed(func(l []link) { l[2].ca, l[2].eku = true, []asn1.ObjectIdentifier{{2, 23, 133, 8, 1}} }), roots, true},
		{"CA that does not say what for", changed(func(l []link) { l[2].ca = true }), roots, false},
		{"a CA's certificate", changed(func(l []link) { l[2].ca, l[2].use = true, usage }), roots, false},
		{"another EK as CA", changed(func(l []link) { l[1].ca = false }), roots, false},
		{"CA that may not sign", changed(func(l []link) { l[1].use = x509.KeyUsageKeyAgreement }), roots, false},
		{"CA for another use", changed(func(l []link) { l[1].eku = []asn1.ObjectIdentifier{none} }), roots, false},
		{"CA below one that may have none", changed(func(l []link) { l[0].path = 0 }), roots, false},
		{"maker that may have one CA below it", bytes.Join(good, nil), ek.NewRoots(&short), false},
	} {
		cert, err := ek.Parse(c.raw)
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		if r := ek.Judge(cert, c.roots, time.Now()); r.Accepted != c.want || c.want && len(r.Chain) != 4 {
			t.Errorf("%s: %s, %+v", c.name, r.Verdict, r.Findings)
		}
	}
}

func TestBundle(t *testing.T) {
	makers := vendors(t)
	if makers.Len() < 150 {
		t.Errorf("%d certificates of makers", makers.Len())
	}
	data := ek.FormatBundle(makers, now)
	if !bytes.Equal(data, ek.FormatBundle(makers, now)) {
		t.Error("the same certificates make different bundles")
	}
	again, err := ek.ParseBundle(data)
	if err != nil || again.Len() != makers.Len() {
		t.Fatalf("%v", err)
	}
	at := bytes.LastIndex(data, []byte("-----BEGIN"))
	if _, err := ek.ParseBundle(data[:at]); err == nil {
		t.Error("a bundle without its last certificate was read")
	}
	if _, err := ek.ParseBundle(data[100:]); err == nil {
		t.Error("a bundle without its head was read")
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte{0x10, 0x01, 0, 0, 0, 0x10, 0x02, 0x30, 0})
	for _, name := range []string{"keylime-stm-rsa.der", "keylime-idevid.der", "hirs-nuc-1-ek_cert_untouched.cer", "guard-sr630-ek.pem", "keylime-nuvoton-malformed-2.der", "gotpmtools-gce-pca_tpm_ecc_enc_cert.pem"} {
		if data, err := os.ReadFile(filepath.Join(corpus, "ekcert", name)); err == nil {
			f.Add(data)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := ek.Parse(data)
		if err != nil {
			return
		}
		if ek.Judge(c, ek.NewRoots(), now).Accepted {
			t.Error("accepted without a pinned certificate")
		}
	})
}

func FuzzRoots(f *testing.F) {
	f.Add(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte{0x30, 0}}))
	f.Add(ek.FormatBundle(ek.NewRoots(), now))
	f.Fuzz(func(t *testing.T, data []byte) {
		ek.NewRoots().AddPEM(data)
		if r, err := ek.ParseBundle(data); err == nil {
			if _, err := ek.ParseBundle(ek.FormatBundle(r, now)); err != nil {
				t.Error(err)
			}
		}
	})
}
