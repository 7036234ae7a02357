package initramfs

import (
	"debug/buildinfo"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestBusybox compiles a command of ours, whose import path has no dot, beside
// one of u-root's, and looks at what the busybox says of itself.
func TestBusybox(t *testing.T) {
	b := busybox{dir: filepath.Join("..", ".."), scratch: filepath.Join(t.TempDir(), "bb"), tags: tags(false),
		commands: []string{"sekisho/images/work/cmd/workinit", uroot + "echo"}}
	var err error
	if b.dir, err = filepath.Abs(b.dir); err != nil {
		t.Fatal(err)
	}
	data, err := b.build(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(t.TempDir(), "bb")
	if err := os.WriteFile(bin, data, 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(bin, "echo", "hello").CombinedOutput(); err != nil || string(out) != "hello\n" {
		t.Errorf("echo: %q, %v", out, err)
	}
	if out, err := exec.Command(bin, "workinit").CombinedOutput(); err == nil || !strings.Contains(string(out), "not PID 1") {
		t.Errorf("workinit: %q, %v", out, err)
	}
	info, err := buildinfo.ReadFile(bin)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range info.Settings {
		if s.Key == "DefaultGODEBUG" {
			t.Errorf("built with the defaults of an older Go: %s", s.Value)
		}
	}
	if strings.Contains(string(data), b.scratch) {
		t.Error("the scratch directory's path is in the binary")
	}
}
