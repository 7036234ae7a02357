package debian

import (
	"context"
	"os"
	"testing"
	"time"
)

func TestFetch(t *testing.T) {
	if os.Getenv("SEKISHO_TEST") != "all" {
		t.Skip("needs a Debian mirror; SEKISHO_TEST=all runs it")
	}
	c := Config{Cache: os.Getenv("XC"), Progress: func(w string, d, n int64) { t.Log(w, d, n) }}
	if c.Cache == "" {
		c.Cache = t.TempDir()
	}
	start := time.Now()
	s, err := Fetch(context.Background(), c, "linux-image-amd64", "qemu-system-x86", "ovmf", "seabios", "systemd-boot-efi")
	if err != nil {
		t.Fatal(err)
	}
	t.Log(time.Since(start), len(s.Packages), len(s.entries))
	for _, p := range []string{"/usr/bin/qemu-system-x86_64", "/lib64/ld-linux-x86-64.so.2", "/lib/x86_64-linux-gnu/libc.so.6", "/usr/lib/systemd/boot/efi/linuxx64.efi.stub", "/usr/share/qemu/bios-256k.bin", "/usr/share/OVMF/OVMF_CODE_4M.fd"} {
		t.Log(s.Lookup(p))
	}
}
