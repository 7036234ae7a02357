package uki

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/binary"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"sekisho/attest"
)

// program is the smallest PE32+ executable with one section; sections whose
// content is given follow at multiples of 512.
func program(names []string, content [][]byte) []byte {
	le := binary.LittleEndian
	b := make([]byte, 1024)
	copy(b, "MZ")
	le.PutUint32(b[0x3c:], 0x80)
	copy(b[0x80:], "PE\x00\x00")
	coff, opt := 0x84, 0x84+coffSize
	le.PutUint16(b[coff+coffSections:], uint16(len(names)))
	le.PutUint16(b[coff+coffOptSize:], 240)
	le.PutUint16(b[opt:], magicPE32Plus)
	le.PutUint32(b[opt+optSectionAlignment:], 4096)
	le.PutUint32(b[opt+optFileAlignment:], 512)
	le.PutUint32(b[opt+optSizeOfHeaders:], 1024)
	le.PutUint16(b[opt+optDLLFlags:], flagNXCompat)
	le.PutUint32(b[opt+optNumDirectories:], 16)
	address := 4096
	for i, n := range names {
		h := b[opt+240+i*sectionSize:]
		copy(h, n)
		le.PutUint32(h[8:], uint32(len(content[i])))
		le.PutUint32(h[12:], uint32(address))
		le.PutUint32(h[16:], uint32(align(len(content[i]), 512)))
		le.PutUint32(h[20:], uint32(len(b)))
		b = append(b, content[i]...)
		b = append(b, make([]byte, align(len(b), 512)-len(b))...)
		address = align(address+len(content[i]), 4096)
	}
	le.PutUint32(b[opt+optSizeOfImage:], uint32(address))
	return b
}

func testParts() Parts {
	return Parts{
		Stub:      program([]string{".text", sectionSBAT}, [][]byte{bytes.Repeat([]byte{0x90}, 700), []byte("sbat,1\n")}),
		Kernel:    program([]string{".text"}, [][]byte{bytes.Repeat([]byte{0xcc}, 5000)}),
		Initrd:    []byte("an initramfs of a length that is no multiple of four!"),
		Cmdline:   " console=ttyS0 quiet ",
		OSRelease: "ID=sekisho\n",
		Uname:     "6.12.0",
	}
}

func testKeys(t *testing.T) *Keys {
	t.Helper()
	k, err := LoadKeys(filepath.Join(t.TempDir(), "keys"), time.Date(2026, 11, 21, 10, 0, 0, 0, time.UTC))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestBuildAndSplitAreInverse(t *testing.T) {
	t.Run("without policies", func(t *testing.T) { buildAndSplit(t, testParts()) })
	with := testParts()
	with.Policy = []byte("signed policies")
	t.Run("with policies", func(t *testing.T) { buildAndSplit(t, with) })
}

// TestPolicyIsNotMeasured: PCR 11 and 7 are the same with signed policies as
// without, or nobody could sign them; PCR 4 and 9 cover them.
func TestPolicyIsNotMeasured(t *testing.T) {
	trust := testKeys(t).SecureBoot()
	var refs [2]*attest.ReferenceValues
	for i := range refs {
		p := testParts()
		if i == 1 {
			p.Policy = []byte("signed policies")
		}
		image, err := Build(p)
		if err != nil {
			t.Fatal(err)
		}
		if refs[i], err = Predict(image, trust, "host", "1"); err != nil {
			t.Fatal(err)
		}
	}
	for pcr, same := range map[int]bool{4: false, 7: true, 9: false, 11: true} {
		if (refs[0].PCRs[pcr] == refs[1].PCRs[pcr]) != same {
			t.Errorf("PCR %d: same with and without policies is %v", pcr, !same)
		}
	}
}

func buildAndSplit(t *testing.T, want Parts) {
	t.Helper()
	image, err := Build(want)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := Sign(image, testKeys(t).DB)
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{"unsigned": image, "signed": signed} {
		got, err := Split(b)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: parts differ", name)
		}
		again, err := Build(got)
		if err != nil || !bytes.Equal(again, image) {
			t.Errorf("%s: rebuilt image differs (error %v)", name, err)
		}
	}
	p, err := ParsePE(image)
	if err != nil {
		t.Fatal(err)
	}
	end := uint32(0)
	for _, s := range p.Sections() {
		if s.VirtualAddress%4096 != 0 || s.VirtualAddress < end || s.FileOffset%512 != 0 {
			t.Errorf("section %+v is not aligned or overlaps what ends at %#x", s, end)
		}
		end = s.VirtualAddress + s.VirtualSize
	}
	if size := p.u32(optSizeOfImage); size != uint32(align(int(end), 4096)) {
		t.Errorf("SizeOfImage %#x, want %#x", size, align(int(end), 4096))
	}
}

func TestBuildRefuses(t *testing.T) {
	for name, change := range map[string]func(*Parts){
		"no command line":   func(p *Parts) { p.Cmdline = "" },
		"two lines":         func(p *Parts) { p.Cmdline = "quiet\nsplash" },
		"no initramfs":      func(p *Parts) { p.Initrd = nil },
		"no os-release":     func(p *Parts) { p.OSRelease = "" },
		"kernel is no PE":   func(p *Parts) { p.Kernel = []byte("bzImage") },
		"no stub":           func(p *Parts) { p.Stub = nil },
		"stub has a kernel": func(p *Parts) { p.Stub = program([]string{sectionLinux}, [][]byte{{1}}) },
	} {
		p := testParts()
		change(&p)
		if _, err := Build(p); err == nil {
			t.Errorf("%s: an image was built", name)
		}
	}
}

func TestSignature(t *testing.T) {
	k := testKeys(t)
	image, err := Build(testParts())
	if err != nil {
		t.Fatal(err)
	}
	signed, err := Sign(image, k.DB)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Sign(signed, k.DB); err == nil {
		t.Error("a signed image was signed again")
	}
	a, err := ParsePE(image)
	if err != nil {
		t.Fatal(err)
	}
	p, err := ParsePE(signed)
	if err != nil {
		t.Fatal(err)
	}
	if a.Authenticode() != p.Authenticode() {
		t.Error("signing changes what is signed")
	}
	entry := signed[p.certs:]
	size := int(binary.LittleEndian.Uint32(entry))
	if len(entry)%8 != 0 || size > len(entry) || p.certs%8 != 0 {
		t.Fatalf("certificate entry of %d bytes in %d at %#x", size, len(entry), p.certs)
	}
	var outer contentInfo
	if _, err := asn1.Unmarshal(entry[winCertHeader:size], &outer); err != nil {
		t.Fatal(err)
	}
	var sd signedData
	if _, err := asn1.Unmarshal(outer.Content.Bytes, &sd); err != nil {
		t.Fatal(err)
	}
	var data indirectData
	if _, err := asn1.Unmarshal(sd.Content.Content.Bytes, &data); err != nil {
		t.Fatal(err)
	}
	if d := p.Authenticode(); !bytes.Equal(data.Digest.Digest, d[:]) {
		t.Errorf("signature is over %x, image is %s", data.Digest.Digest, d)
	}
	set := append([]byte{0x31}, sd.Signers[0].Attributes.FullBytes[1:]...)
	if err := k.DB.Cert.CheckSignature(x509.SHA256WithRSA, set, sd.Signers[0].Signature); err != nil {
		t.Error(err)
	}
}

func TestKeysAreMadeOnce(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	now := time.Date(2026, 11, 21, 10, 0, 0, 0, time.UTC)
	first, err := LoadKeys(dir, now)
	if err != nil {
		t.Fatal(err)
	}
	second, err := LoadKeys(dir, now.Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	public, err := LoadCertificates(dir)
	if err != nil {
		t.Fatal(err)
	}
	serials := map[string]bool{}
	for role, c := range map[string][3]*x509.Certificate{
		rolePK:  {first.PK.Cert, second.PK.Cert, public.PK},
		roleKEK: {first.KEK.Cert, second.KEK.Cert, public.KEK},
		roleDB:  {first.DB.Cert, second.DB.Cert, public.DB},
	} {
		if !c[0].Equal(c[1]) || !c[0].Equal(c[2]) {
			t.Errorf("%s: changed between uses", role)
		}
		serials[c[0].SerialNumber.String()] = true
		st, err := os.Stat(filepath.Join(dir, role+".pem"))
		if err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s.pem: mode %v, error %v; want 0600", role, st.Mode(), err)
		}
		if err := c[0].CheckSignature(c[0].SignatureAlgorithm, c[0].RawTBSCertificate, c[0].Signature); err != nil {
			t.Errorf("%s: not self-signed: %v", role, err)
		}
	}
	if len(serials) != 3 {
		t.Error("certificates share a serial number")
	}
	if err := os.WriteFile(filepath.Join(dir, "db.pem"), []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadKeys(dir, now); err == nil {
		t.Error("a damaged key was accepted or replaced")
	}
}

// blankVariables is a variable file as edk2 builds it.
func blankVariables() []byte {
	b := bytes.Repeat([]byte{0xff}, 64<<10)
	nv, store := guidNVData(), guidVariableStore()
	clear(b[:100])
	copy(b[fvGUID:], nv[:])
	binary.LittleEndian.PutUint16(b[fvHeaderLength:], 72)
	copy(b[72:], store[:])
	binary.LittleEndian.PutUint32(b[72+storeSize:], 32<<10)
	b[72+storeFormat], b[72+storeState] = formatted, healthy
	return b
}

func TestVariables(t *testing.T) {
	s := testKeys(t).SecureBoot()
	blank := blankVariables()
	out, err := s.Variables(blank)
	if err != nil {
		t.Fatal(err)
	}
	if len(out) != len(blank) || !bytes.Equal(out[:100], blank[:100]) || !bytes.Equal(out[72+32<<10:], blank[72+32<<10:]) {
		t.Error("something outside the variables changed")
	}
	for _, v := range s.variables() {
		if n := bytes.Count(out, v.marshal()); n != 1 {
			t.Errorf("variable %s occurs %d times", v.name, n)
		}
	}
	if _, err := s.Variables(out); err == nil {
		t.Error("a store that is not blank was accepted")
	}
	for _, n := range []int{0, 50, 90} {
		if _, err := s.Variables(blank[:n]); err == nil {
			t.Errorf("a file of %d bytes was accepted", n)
		}
	}
}

// One changed part changes the digest of its own component, which is how a
// verifier names it.
func TestPredictionNamesTheChangedPart(t *testing.T) {
	trust := testKeys(t).SecureBoot()
	predict := func(p Parts) *attest.ReferenceValues {
		image, err := Build(p)
		if err != nil {
			t.Fatal(err)
		}
		r, err := Predict(image, trust, "host", "1")
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	want := predict(testParts())
	for pcr, zero := range map[int]bool{4: false, 7: false, 9: false, 11: false, 12: true, 14: true, 15: true} {
		if d, ok := want.PCRs[pcr]; !ok || (d == attest.Digest{}) != zero {
			t.Errorf("PCR %d: %s, present %v", pcr, d, ok)
		}
	}
	for component, change := range map[string]func(*Parts){
		"cmdline":    func(p *Parts) { p.Cmdline += "x" },
		"kernel":     func(p *Parts) { p.Kernel = append(p.Kernel, 0) },
		"initramfs":  func(p *Parts) { p.Initrd = append(p.Initrd, 'x') },
		"os-release": func(p *Parts) { p.OSRelease += "X=1\n" },
		"uname":      func(p *Parts) { p.Uname += "x" },
		"stub":       func(p *Parts) { p.Stub = bytes.Replace(p.Stub, []byte("sbat,1"), []byte("sbat,2"), 1) },
	} {
		p := testParts()
		change(&p)
		got := predict(p)
		if len(got.Components) != len(want.Components) {
			t.Fatalf("%s: %d components, want %d", component, len(got.Components), len(want.Components))
		}
		for i, c := range got.Components {
			// .extra/os-release travels with the initramfs in PCR 9.
			may := c.Name == component || c.Name == "uki" || component == "os-release" && c.PCR == 9
			if changed := c.Digest != want.Components[i].Digest; changed && !may || !changed && c.Name == component && c.PCR == 11 {
				t.Errorf("%s changed: component %s (PCR %d) changed %v", component, c.Name, c.PCR, changed)
			}
		}
		if got.PCRs[7] != want.PCRs[7] || got.PCRs[4] == want.PCRs[4] || got.PCRs[11] == want.PCRs[11] {
			t.Errorf("%s changed: PCR 4, 7 or 11 says otherwise", component)
		}
	}
}

func TestLoadOptions(t *testing.T) {
	for in, want := range map[string]string{
		"quiet":          "quiet",
		" a  b\t c \x7f": "a  b  c",
		"":               "",
	} {
		if got := loadOptions(in); got != want {
			t.Errorf("loadOptions(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestMemoryBeyondTheFileIsNotData(t *testing.T) {
	parts := testParts()
	image, err := Build(parts)
	if err != nil {
		t.Fatal(err)
	}
	p, err := ParsePE(image)
	if err != nil {
		t.Fatal(err)
	}
	// The second section is .sbat, which is measured.
	binary.LittleEndian.PutUint32(image[p.table+sectionSize+8:], 100_000)
	if _, err := Predict(image, testKeys(t).SecureBoot(), "host", "1"); err == nil {
		t.Error("an image with a zero-filled .sbat was predicted")
	}
}

func FuzzParsePE(f *testing.F) {
	image, err := Build(testParts())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(image)
	f.Add(testParts().Kernel)
	f.Add([]byte("MZ"))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := ParsePE(data)
		if err != nil {
			return
		}
		d := p.Authenticode()
		if d != p.Authenticode() || d == sha256.Sum256(nil) {
			t.Error("digest is not one")
		}
		for _, s := range p.Sections() {
			if b, _ := p.Section(s.Name); len(b) > len(data) {
				t.Errorf("section %q: %d bytes in a file of %d", s.Name, len(b), len(data))
			}
		}
		if parts, err := Split(data); err == nil {
			if _, err := Build(parts); err == nil && len(parts.Kernel) == 0 {
				t.Error("an image without a kernel was built")
			}
		}
	})
}
