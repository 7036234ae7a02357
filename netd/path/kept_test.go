package path

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestKept(t *testing.T) {
	k := Kept{filepath.Join(t.TempDir(), "time")}
	if _, err := k.Load(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("none: %v", err)
	}
	at := time.Date(2026, 11, 22, 5, 0, 0, 0, time.UTC)
	for range 2 {
		if err := k.Store(at); err != nil {
			t.Fatal(err)
		}
		if got, err := k.Load(); err != nil || !got.Equal(at) {
			t.Errorf("got %s, %v", got, err)
		}
		at = at.Add(time.Hour)
	}
	for _, bad := range []string{"", "\n", "2026", "2026-11-22T05:00:00Z", "2026-11-22T05:00:00Z\n\n", "2026-13-22T05:00:00Z\n"} {
		if err := os.WriteFile(k.Path, []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := k.Load(); err == nil {
			t.Errorf("%q is %s", bad, got)
		}
	}
}

func FuzzKept(f *testing.F) {
	f.Add([]byte("2026-11-22T05:00:00Z\n"))
	f.Fuzz(func(t *testing.T, line []byte) {
		if at, err := parseKept(line); err == nil && at.Year() > 9999 {
			t.Errorf("%q is %s", line, at)
		}
	})
}
