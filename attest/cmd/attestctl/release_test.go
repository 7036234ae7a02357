package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"io"
	"os"
	"strings"
	"testing"

	"sekisho/attest/attester"
	"sekisho/attest/eventlog/logtest"
	"sekisho/attest/seal"
	"sekisho/attest/tpm/faketpm"
)

// TestReleaseLife is the life of a release as the security team and one laptop
// see it: manifest, two signatures, policy first, roll-out by percentage, and
// the image over TLS, from the place where a download broke.
func TestReleaseLife(t *testing.T) {
	o := newOrganisation(t, setup{})
	now, next := logtest.Image{Kernel: "1", Initramfs: "1", Cmdline: "quiet"}, logtest.Image{Kernel: "2", Initramfs: "2", Cmdline: "quiet"}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	sealed := func(i logtest.Image, version string, epoch uint64) []byte {
		refs := i.Reference("sekisho", version)
		r, err := seal.SignPolicy(key, &refs, epoch)
		if err != nil {
			t.Fatal(err)
		}
		data, err := r.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(o.file("sealed-"+version), data, 0o600); err != nil {
			t.Fatal(err)
		}
		return data
	}
	running := sealed(now, "1", 17)
	sealed(next, "2", 18)
	efi := make([]byte, 3<<20)
	rand.Read(efi)
	for name, data := range map[string][]byte{"host.efi": efi, "other.efi": efi[1:]} {
		if err := os.WriteFile(o.file(name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	policy := func(file string, words ...string) {
		o.ctl(0, append([]string{"policy", "draft", o.file("p.json")}, words...)...)
		o.ctl(0, "policy", "sign", o.file("p.json"), "-key", o.file("a.key"), "-out", o.file(file))
		o.ctl(0, "policy", "sign", o.file(file), "-key", o.file("b.key"))
		o.ctl(0, "policy", "publish", o.file(file))
	}
	policy("p1.cose", "-organization", "Test City", "-references", o.reference(now, "1"))

	dev, boot := faketpm.New(), now.Boot()
	dev.PCRs = boot.PCRs()
	if err := dev.Certify(o.maker, o.key, nil); err != nil {
		t.Fatal(err)
	}
	ticket := strings.Fields(o.ctl(0, "enroll", "create"))[0]
	laptop := o.laptop(boot, ticket, func() (attester.Hardware, error) { return dev, nil })
	o.until("the laptop affirmed", func(s string) bool { return strings.Contains(s, " sekisho 1\n") }, "device", "list")
	offered := func() string {
		t.Helper()
		// A renewal may be under way: the credential lives for seconds here.
		var m string
		o.until("an answer", func(string) bool {
			r, err := laptop.NextRelease(t.Context(), running)
			if r != nil {
				m = r.Version
			}
			return err == nil
		}, "release", "list")
		return m
	}
	if v := offered(); v != "" {
		t.Errorf("offered %q, nothing was published", v)
	}

	create := []string{"release", "create", o.file("m.json"), "-organization", "Test City", "-image", o.file("host.efi"), "-references", o.reference(next, "2"), "-release", o.file("sealed-2")}
	o.ctl(0, create...)
	if s := o.ctl(2, append(create, "-release", o.file("sealed-1"))...); !strings.Contains(s, "of another image") {
		t.Error(s)
	}
	o.ctl(0, "release", "sign", o.file("m.json"), "-key", o.file("a.key"), "-out", o.file("m.cose"))
	publish := []string{"release", "publish", o.file("m.cose"), "-image", o.file("host.efi"), "-percent", "0"}
	if s := o.ctl(1, publish...); !strings.Contains(s, "by enough") {
		t.Error(s)
	}
	o.ctl(0, "release", "sign", o.file("m.cose"), "-key", o.file("c.key"))
	if s := o.ctl(1, publish...); !strings.Contains(s, "does not accept this image") {
		t.Error(s)
	}
	policy("p2.cose", "-supersedes", o.file("p1.cose"), "-references", o.reference(next, "2"))
	if s := o.ctl(2, append(publish[:3:3], "-image", o.file("other.efi"))...); !strings.Contains(s, "not the image") {
		t.Error(s)
	}
	o.ctl(0, publish...)
	if s := o.ctl(1, publish...); !strings.Contains(s, "published already") {
		t.Error(s)
	}
	if v := offered(); v != "" {
		t.Errorf("offered %q to 0 %%", v)
	}
	o.ctl(0, "release", "percent", "2", "-percent", "100")
	if s := o.ctl(0, "release", "list"); !strings.Contains(s, "100 %") || !strings.Contains(s, "true") {
		t.Error(s)
	}
	if v := offered(); v != "2" {
		t.Fatalf("offered %q", v)
	}
	for _, at := range []int64{0, 2<<20 + 5} {
		body, err := laptop.Image(t.Context(), at)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(body)
		body.Close()
		if err != nil || !bytes.Equal(got, efi[at:]) {
			t.Errorf("image from %d: %d bytes, %v", at, len(got), err)
		}
	}
	if _, err := laptop.Image(t.Context(), int64(len(efi))); err == nil {
		t.Error("more than the whole image")
	}
	// Whoever runs it is offered nothing; an older epoch than ours is refused.
	running = sealed(next, "2", 18)
	if v := offered(); v != "" {
		t.Errorf("offered %q to a laptop that runs it", v)
	}
	ahead := sealed(now, "1", 19)
	o.until("a refusal", func(string) bool {
		_, err := laptop.NextRelease(t.Context(), ahead)
		return err != nil && strings.Contains(err.Error(), "epoch")
	}, "release", "list")
}
