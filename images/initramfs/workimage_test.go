package initramfs

import (
	"bytes"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestWorkImage builds the stand-in for Windows twice, in different places: the
// images must be equal. Then it boots one, and presses the power button.
func TestWorkImage(t *testing.T) {
	o := realOptions(t)
	work, err := Work(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	checkManifest(t, work)
	for _, f := range work.Manifest.Files {
		if strings.Contains(f.Path, "/drivers/net/") && !strings.HasSuffix(f.Path, "/tun.ko") && f.Mode[0] == '-' {
			t.Errorf("network driver %s in the work domain's image", f.Path)
		}
	}
	// Elsewhere, but with the same packages.
	cache, err := filepath.Abs(o.Cache)
	if err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(cache)
	if err != nil {
		t.Fatal(err)
	}
	o.Cache = t.TempDir()
	for _, e := range entries {
		if err := os.Symlink(filepath.Join(cache, e.Name()), filepath.Join(o.Cache, e.Name())); err != nil {
			t.Fatal(err)
		}
	}
	again, err := Work(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(work.Initrd, again.Initrd) {
		for i, f := range again.Manifest.Files {
			if f != work.Manifest.Files[i] {
				t.Errorf("differs: %+v, first %+v", f, work.Manifest.Files[i])
			}
		}
		t.Error("two builds differ")
	}

	dir := t.TempDir()
	kernel, initrd, monitor := filepath.Join(dir, "kernel"), filepath.Join(dir, "initrd"), filepath.Join(dir, "monitor")
	for name, data := range map[string][]byte{kernel: work.Kernel, initrd: work.Initrd} {
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out := startOutput(t, exec.Command("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-machine", "q35", "-cpu", "EPYC", "-m", "512", "-smp", "2",
		"-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot", "-monitor", "unix:"+monitor+",server=on,wait=off",
		"-kernel", kernel, "-initrd", initrd, "-append", "console=ttyS0 panic=-1 quiet"))
	out.wait("work domain up", 30*time.Second) // seen: 4 s
	out.wait("no link", 30*time.Second)        // guestagent runs; QEMU has no vsock here
	c, err := net.Dial("unix", monitor)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("system_powerdown\n")); err != nil {
		t.Fatal(err)
	}
	out.wait("power button pressed", 30*time.Second)
	out.wait("Power down", 30*time.Second)
	out.wait("", 30*time.Second)
}
