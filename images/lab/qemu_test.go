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
