package fleet

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"log/slog"

	"sekisho/attest"
	"sekisho/attest/release"
)

// TestOffer: a device is offered the newest release that is for its ring, not
// expired, newer than what it runs, and allowed from there.
func TestOffer(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	one := attest.Digest{1}
	put := func(version, from string, percent int, expires int64) published {
		data, err := release.Sign(&release.Manifest{Profile: release.Profile, Organization: "city", Image: "host", Version: version, Epoch: 16,
			SHA256: one, Size: 1, PCRs: map[int]attest.Digest{4: one, 7: one, 11: one}, MinimumFrom: from, Expires: expires}, nil, key)
		if err != nil {
			t.Fatal(err)
		}
		return published{Manifest: data, Percent: percent}
	}
	list := []published{put("1", "", 100, 1000), put("2", "", 100, 1000), put("3", "2", 50, 1000), put("4", "", 10, 1000), put("5", "", 100, 10)}
	for _, c := range []struct {
		running string
		ring    int
		at      int64
		want    string
	}{
		{"0", 99, 100, "2"}, {"0", 5, 100, "4"}, {"0", 30, 100, "2"}, {"1", 30, 100, "2"}, {"2", 30, 100, "3"}, {"3", 30, 100, ""},
		{"2", 99, 100, ""}, {"4", 5, 100, ""}, {"0", 99, 5, "5"}, {"5", 0, 100, ""}, {"0", 0, 1000, ""},
	} {
		got := ""
		if p := offer(list, c.running, c.ring, time.Unix(c.at, 0)); p != nil {
			m, err := release.Read(p.Manifest)
			if err != nil {
				t.Fatal(err)
			}
			got = m.Version
		}
		if got != c.want {
			t.Errorf("%s in ring %d at %d: offered %q, want %q", c.running, c.ring, c.at, got, c.want)
		}
	}
}

// TestImage: an image is kept under the SHA-256 that it has, and goes to whoever
// has a token for it that has not expired.
func TestImage(t *testing.T) {
	b := newBench(t)
	b.service.Images = t.TempDir()
	image := "an image"
	d := attest.Digest(sha256.Sum256([]byte(image)))
	if err := b.service.PutImage(attest.Digest{1}, strings.NewReader(image)); err == nil {
		t.Error("stored under another name")
	}
	if err := b.service.PutImage(d, strings.NewReader(image)); err != nil {
		t.Fatal(err)
	}
	if files, err := os.ReadDir(b.service.Images); err != nil || len(files) != 1 {
		t.Errorf("%v, %v", files, err)
	}
	h := Handler(b.service, slog.New(slog.DiscardHandler))
	good := b.service.imageToken(d, b.now.Add(time.Minute).Unix())
	for name, c := range map[string]struct {
		path, token, span string
		code              int
		body              string
	}{
		"whole":       {d.String(), good, "", http.StatusOK, image},
		"rest":        {d.String(), good, "bytes=3-", http.StatusPartialContent, image[3:]},
		"beyond":      {d.String(), good, "bytes=99-", http.StatusRequestedRangeNotSatisfiable, ""},
		"no token":    {d.String(), "", "", http.StatusForbidden, ""},
		"lapsed":      {d.String(), b.service.imageToken(d, b.now.Unix()), "", http.StatusForbidden, ""},
		"made longer": {d.String(), "9" + good, "", http.StatusForbidden, ""},
		"of another":  {attest.Digest{2}.String(), good, "", http.StatusForbidden, ""},
		"not here":    {attest.Digest{2}.String(), b.service.imageToken(attest.Digest{2}, b.now.Add(time.Minute).Unix()), "", http.StatusNotFound, ""},
		"a path":      {"..%2fstore", good, "", http.StatusForbidden, ""},
	} {
		r := httptest.NewRequest(http.MethodGet, attest.PathImage+"/"+c.path, nil)
		if c.token != "" {
			r.Header.Set("Authorization", "Bearer "+c.token)
		}
		if c.span != "" {
			r.Header.Set("Range", c.span)
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != c.code || c.body != "" && w.Body.String() != c.body {
			t.Errorf("%s: %d %q", name, w.Code, w.Body)
		}
	}
}
