package boot

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"sekisho/hostos/store"
)

// TestSignedTime: what netd has heard is there after power-off, it never goes
// back, and nothing that netd could leave in its place does harm.
func TestSignedTime(t *testing.T) {
	dir := t.TempDir()
	disk := filepath.Join(dir, "host")
	if err := os.WriteFile(disk, make([]byte, store.Size), 0o600); err != nil {
		t.Fatal(err)
	}
	power := func() *signedTime { // a boot: memory is empty
		run := filepath.Join(dir, "run")
		if err := os.RemoveAll(run); err != nil {
			t.Fatal(err)
		}
		s := &signedTime{record: store.Record{Path: disk, Place: store.TimePlace}, file: filepath.Join(run, "netd", "time"), uid: os.Getuid(), say: t.Errorf}
		s.recall()
		return s
	}
	says := func(s *signedTime, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(s.file), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(s.file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		s.keep(timeStep)
	}
	hears := func(s *signedTime, want string) {
		t.Helper()
		if got, _ := os.ReadFile(s.file); string(got) != want {
			t.Errorf("netd hears %q, want %q", got, want)
		}
	}
	s := power()
	hears(s, "")
	says(s, "2026-11-22T05:00:00Z\n")
	s = power()
	hears(s, "2026-11-22T05:00:00Z\n")
	for _, bad := range []string{"", "2027", "2020-01-01T00:00:00Z\n", "2026-11-22T05:30:00Z\n", "2030-01-01T00:00:00Z\n\n"} {
		says(s, bad) // older, nonsense, or too little to be worth a write
		hears(power(), "2026-11-22T05:00:00Z\n")
	}
	says(s, "2026-11-22T05:30:00Z\n")
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // power-off
	s.watch(ctx)
	s = power()
	hears(s, "2026-11-22T05:30:00Z\n")
	if err := os.Remove(s.file); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(s.file, 0o600); err != nil {
		t.Fatal(err)
	}
	s.keep(0)
	hears(power(), "2026-11-22T05:30:00Z\n")
}
