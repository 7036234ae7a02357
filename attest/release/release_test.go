package release

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/attest/policy"
)

func manifest() *Manifest {
	one := attest.Digest{1}
	return &Manifest{Profile: Profile, Organization: "city", Image: "host", Version: "2", Epoch: 17, SHA256: one, Size: 1 << 20,
		PCRs: map[int]attest.Digest{4: one, 7: one, 9: one, 11: one}, Expires: 2000}
}

func key(t testing.TB) *ecdsa.PrivateKey {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// TestOpen: two of three keys must have signed this very content, as a release,
// of this organisation, and in time.
func TestOpen(t *testing.T) {
	a, b, c, stranger := key(t), key(t), key(t), key(t)
	ring, err := policy.NewKeyring(2, &a.PublicKey, &b.PublicKey, &c.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	sign := func(m *Manifest, keys ...*ecdsa.PrivateKey) (data []byte) {
		for _, k := range keys {
			if data, err = Sign(m, data, k); err != nil {
				t.Fatal(err)
			}
		}
		return data
	}
	good := sign(manifest(), a, c)
	m, err := Open(ring, "city", good, time.Unix(1999, 0))
	if err != nil || m.Version != "2" || m.PCRs[11] != (attest.Digest{1}) {
		t.Fatalf("%+v, %v", m, err)
	}
	if _, err := Sign(nil, good, a); err == nil {
		t.Error("signed twice by one key")
	}
	payload, err := json.Marshal(manifest())
	if err != nil {
		t.Fatal(err)
	}
	other := policy.Kind{Name: "other", ContentType: Kind().ContentType, External: "sekisho/policy/1", Max: MaxManifest}
	wrong, err := other.Sign(payload, nil, a)
	if err != nil {
		t.Fatal(err)
	}
	if wrong, err = other.Sign(nil, wrong, b); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		data         []byte
		organization string
		at           int64
		words        string
	}{
		"one key":              {sign(manifest(), a), "city", 1, "by enough"},
		"a stranger's":         {sign(manifest(), a, stranger), "city", 1, "by enough"},
		"changed":              {bytes.Replace(good, []byte(`"epoch":17`), []byte(`"epoch":16`), 1), "city", 1, "signature of key"},
		"of another":           {good, "town", 1, "of \"city\""},
		"expired":              {good, "city", 2000, "expired"},
		"signed as a policy":   {wrong, "city", 1, "signature of key"},
		"nothing":              {nil, "city", 1, ""},
		"over the least bytes": {make([]byte, MaxManifest+1), "city", 1, "at most"},
	} {
		if _, err := Open(ring, c.organization, c.data, time.Unix(c.at, 0)); err == nil || !strings.Contains(err.Error(), c.words) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Open(ring, "city", make([]byte, MaxManifest+1), time.Unix(1, 0)); !errors.Is(err, attest.ErrTooLarge) {
		t.Errorf("too large: %v", err)
	}
}

func TestValidate(t *testing.T) {
	for name, change := range map[string]func(*Manifest){
		"profile": func(m *Manifest) { m.Profile = "" }, "version": func(m *Manifest) { m.Version = "" },
		"size": func(m *Manifest) { m.Size = MaxImage + 1 }, "sha256": func(m *Manifest) { m.SHA256 = attest.Digest{} },
		"PCR 11": func(m *Manifest) { delete(m.PCRs, 11) }, "epoch": func(m *Manifest) { m.Epoch = 0 },
		"expires": func(m *Manifest) { m.Expires = 0 }, "minimum_from": func(m *Manifest) { m.MinimumFrom = strings.Repeat("1", 65) },
	} {
		m := manifest()
		change(m)
		if err := m.Validate(); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestRing: about as many devices in each ring, and a device stays in its own.
func TestRing(t *testing.T) {
	count := 0
	for i := range 10000 {
		d := attest.Digest{byte(i), byte(i >> 8)}
		if Ring(d) != Ring(d) || Ring(d) < 0 || Ring(d) > 99 {
			t.Fatal(d)
		}
		if Ring(d) < 10 {
			count++
		}
	}
	if count < 900 || count > 1100 {
		t.Errorf("%d of 10000 devices in the first 10 %%", count)
	}
}

func FuzzRead(f *testing.F) {
	k := key(f)
	data, err := Sign(manifest(), nil, k)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Fuzz(func(t *testing.T, data []byte) {
		if m, err := Read(data); err == nil && m.Validate() != nil {
			t.Error("an invalid manifest was read")
		}
	})
}
