package lab

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestOuterQEMUStarts(t *testing.T) {
	if os.Getenv("SEKISHO_TEST") != "all" {
		t.Skip("fetches Debian packages: set SEKISHO_TEST=all")
	}
	cache, err := filepath.Abs("../../out/cache")
	if err != nil {
		t.Fatal(err)
	}
	argv, err := OuterQEMU(t.Context(), cache, nil)
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), argv[0], append(argv[1:], "-version")...).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "version 10.") {
		t.Fatalf("qemu -version: %v: %s", err, out)
	}
}

func TestAbortLeap(t *testing.T) {
	code := []byte{0xe8, 1, 2, 3, 4, 0x84, 0xc0, 0x74, 0x45, 0x09, 0xab, 0xd0, 0, 0, 0}
	if i := abortLeap(code); i != 7 {
		t.Errorf("found at %d, want 7", i)
	}
	if i := abortLeap(code[:10]); i != -1 {
		t.Errorf("found at %d in code that ends before it", i)
	}
	if i := abortLeap(nil); i != -1 {
		t.Errorf("found at %d in nothing", i)
	}
}
