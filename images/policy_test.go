package images

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sekisho/attest"
	"sekisho/attest/seal"
	"sekisho/images/uki"
)

// TestPolicy signs an image's policies, builds them in, and finds that what
// they cover has not changed by it.
func TestPolicy(t *testing.T) {
	b := hostImage(t)
	from := filepath.Join(b.Out, HostImage)
	want := reference(t, b)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	sign := func(name string, r *attest.ReferenceValues) string {
		release, err := seal.SignPolicy(key, r, seal.FirstEpoch)
		if err != nil {
			t.Fatal(err)
		}
		data, err := release.Encode()
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	other := *want
	other.PCRs = map[int]attest.Digest{7: want.PCRs[7], 11: {1}}
	if _, err := b.Policy(from, sign("other", &other)); err == nil || !strings.Contains(err.Error(), "PCR 11") {
		t.Errorf("policies of another image: %v", err)
	}
	policy := sign("own", want)
	for range 2 { // a second time replaces them
		if _, err := b.Policy(from, policy); err != nil {
			t.Fatal(err)
		}
	}
	got := reference(t, b)
	if got.PCRs[7] != want.PCRs[7] || got.PCRs[11] != want.PCRs[11] || got.PCRs[4] == want.PCRs[4] {
		t.Error("PCR 7 or 11 differs from what was signed, or PCR 4 does not differ")
	}
	if got.Image != want.Image || got.Version != want.Version {
		t.Errorf("now called %s %s", got.Image, got.Version)
	}
	image, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	parts, err := uki.Split(image)
	if err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(policy); err != nil || string(parts.Policy) != string(data) {
		t.Errorf("other policies are in the image (%v)", err)
	}
}
