package store

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"
)

func blank(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "host")
	if err := os.WriteFile(path, make([]byte, Size), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestPowerCut: a write that stops at any byte leaves the record before it, or
// the new one.
func TestPowerCut(t *testing.T) {
	path := blank(t)
	r := Record{path, SlotsPlace}
	if _, err := r.Load(); !errors.Is(err, ErrNone) {
		t.Fatalf("blank: %v", err)
	}
	for _, v := range []string{"one", "two"} {
		if err := r.Store([]byte(v)); err != nil {
			t.Fatal(err)
		}
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Store([]byte("three")); err != nil {
		t.Fatal(err)
	}
	after, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	whole := 0
	for n := range headSize + 6 {
		at := SlotsPlace // "three" goes where "one" was
		torn := bytes.Clone(before)
		copy(torn[at:at+n], after[at:])
		if err := os.WriteFile(path, torn, 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := r.Load()
		if err != nil || string(got) != "two" && string(got) != "three" {
			t.Fatalf("after %d bytes: %q, %v", n, got, err)
		}
		if string(got) == "three" {
			whole++
		}
	}
	if whole == 0 {
		t.Error("the whole record was never read")
	}
	if _, err := (Record{path, VolumePlace}).Load(); !errors.Is(err, ErrNone) {
		t.Errorf("the other record: %v", err)
	}
	if err := r.Store(make([]byte, MaxData+1)); err == nil {
		t.Error("stored a record that is too large")
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(encode(3, []byte("data")))
	f.Add([]byte(magic))
	f.Fuzz(func(t *testing.T, b []byte) {
		if seq, data, ok := decode(b); ok && !bytes.HasPrefix(b, encode(seq, data)) {
			t.Errorf("%x is not the encoding of what it decodes to", b)
		}
	})
}

// TestNothingIsLeft: two short records leave nothing of a long one before them.
func TestNothingIsLeft(t *testing.T) {
	path := blank(t)
	r := Record{path, VolumePlace}
	long := append(bytes.Repeat([]byte{'.'}, 4096), "its end"...)
	for _, data := range [][]byte{long, long, []byte("short"), []byte("short")} {
		if err := r.Store(data); err != nil {
			t.Fatal(err)
		}
	}
	if all, err := os.ReadFile(path); err != nil || bytes.Contains(all, []byte("its end")) {
		t.Errorf("the end of the long record is still there, %v", err)
	}
}
