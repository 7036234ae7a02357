//go:build lab

package boot

import (
	"os"
	"path/filepath"
	"testing"
)

func TestLabService(t *testing.T) {
	all := Services("")
	if s := all[len(all)-1]; s.Name != "labhook" || s.Netns != "" || s.User != "" {
		t.Errorf("the last service of a lab image is %+v", s)
	}
}

func TestLinkPort(t *testing.T) {
	sys, dir := t.TempDir(), filepath.Join(t.TempDir(), "virtio-ports")
	for port, name := range map[string]string{"vport1p1": "other\n", "vport1p2": "org.sekisho.lab\n"} {
		if err := os.Mkdir(filepath.Join(sys, port), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(sys, port, "name"), []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 { // again is no fault
		if err := linkPort(sys, dir, "/dev", "org.sekisho.lab"); err != nil {
			t.Fatal(err)
		}
	}
	if got, _ := os.Readlink(filepath.Join(dir, "org.sekisho.lab")); got != "/dev/vport1p2" {
		t.Errorf("link to %q", got)
	}
	if err := linkPort(sys, dir, "/dev", "none"); err == nil {
		t.Error("a port that is not there was linked")
	}
}
