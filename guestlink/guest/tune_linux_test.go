package guest

import (
	"os"
	"path/filepath"
	"testing"
)

// TestLongSegments: settings that the kernel has are set; one that it has not is
// no error; one that cannot be written is.
func TestLongSegments(t *testing.T) {
	dir := t.TempDir()
	ipv4 := filepath.Join(dir, "net", "ipv4")
	if err := os.MkdirAll(ipv4, 0o755); err != nil {
		t.Fatal(err)
	}
	least := filepath.Join(ipv4, "tcp_min_tso_segs")
	if err := os.WriteFile(least, []byte("2"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := LongSegments(dir); err != nil {
		t.Errorf("a kernel without tcp_tso_rtt_log: %v", err)
	}
	if b, err := os.ReadFile(least); err != nil || string(b) != "44" {
		t.Errorf("tcp_min_tso_segs: %q, %v", b, err)
	}
	if err := os.Mkdir(filepath.Join(ipv4, "tcp_tso_rtt_log"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := LongSegments(dir); err == nil {
		t.Error("no error for a setting that cannot be written")
	}
}
