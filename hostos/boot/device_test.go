package boot

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/diskfs/go-diskfs/partition/gpt"

	"sekisho/hostos/update"
)

// TestLateDevices has three devices missing after the boot's wait: each is
// handed to its owner when it appears, the status follows, and the wait ends
// with the last one, or when the machine goes off.
func TestLateDevices(t *testing.T) {
	dir := t.TempDir()
	var mu sync.Mutex
	given := map[string]string{}
	d := &devices{
		missing: []node{{path: "tpm", user: "attestd", needed: "no TPM"}, {path: "work", user: "vmm", needed: "no disk"}, {path: "never", needed: "no third"}},
		find:    func() {},
		give: func(n node) error {
			if _, err := os.Stat(filepath.Join(dir, n.path)); err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			given[n.path] = n.user
			return nil
		},
	}
	var console lockedBuffer
	h := &host{console: newConsole(&console), off: make(chan struct{})}
	soon, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
	defer cancel()
	d.await(soon, time.Millisecond, func(came []node) { t.Errorf("%v appeared out of nothing", came) })
	h.lack(d.missing)
	h.set("running", deviceMissing, d.missing[0].needed)

	ctx, done := context.WithCancel(t.Context())
	var late sync.WaitGroup
	late.Go(func() {
		d.await(ctx, time.Millisecond, func(came []node) { h.appeared(came, d.missing) })
	})
	appear := func(path string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, path), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		until(t, path, func() bool {
			h.mu.Lock()
			defer h.mu.Unlock()
			return !slices.ContainsFunc(h.missing, func(n node) bool { return n.path == path })
		})
	}
	appear("tpm")
	h.mu.Lock()
	if h.state.Reason != deviceMissing || h.state.Detail != "no disk" {
		t.Errorf("after the TPM: %+v", h.state)
	}
	if !slices.ContainsFunc(h.missing, node.forWork) {
		t.Error("the work domain's disk is not missing")
	}
	h.mu.Unlock()
	appear("work")
	appear("never")
	late.Wait() // without done: nothing is missing any more
	done()
	if h.state.Reason != "" || h.state.Detail != allDone {
		t.Errorf("in the end: %+v", h.state)
	}
	if given["tpm"] != "attestd" || given["work"] != "vmm" || len(given) != 3 {
		t.Errorf("given: %v", given)
	}

	d.missing = []node{{path: "not there"}}
	h.late.Go(func() { h.awaitLate(t.Context(), nil, d) })
	h.powerOff()
	h.late.Wait()
}

func TestSysRqIsOff(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sysrq")
	if err := noSysRq(path); err != nil {
		t.Errorf("a kernel without SysRq: %v", err)
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Error("the file was made")
	}
	if err := os.WriteFile(path, []byte("438"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := noSysRq(path); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(path); b[0] != '0' {
		t.Errorf("sysrq is %q", b)
	}
}

// TestFindSlot: a slot's place is read from the table of the disk that its
// partition is on; without partition, table or number there is none.
func TestFindSlot(t *testing.T) {
	root := t.TempDir()
	dev, links, class := filepath.Join(root, "dev"), filepath.Join(root, "links"), filepath.Join(root, "class")
	folder := filepath.Join(root, "devices", "vda", "vda2")
	write := func(path string, data []byte) {
		t.Helper()
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, data, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	write(filepath.Join(folder, "partition"), []byte("2\n"))
	write(filepath.Join(folder, "..", "queue", "logical_block_size"), []byte("512\n"))
	table := gptOf(t)
	write(filepath.Join(dev, "vda"), table)
	for _, dir := range []string{links, class} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Symlink(folder, filepath.Join(class, "vda2")), os.Symlink(filepath.Join(dev, "vda2"), filepath.Join(links, "esp-b"))); err != nil {
		t.Fatal(err)
	}
	p, block, err := findSlot(class, links, update.SlotB)
	if err != nil || p.Number != 2 || p.Start != 4096 || p.Size != 2048 || block != 512 {
		t.Errorf("%+v, %d, %v", p, block, err)
	}
	if _, _, err := findSlot(class, links, update.SlotA); err == nil {
		t.Error("a slot without partition")
	}
	write(filepath.Join(folder, "partition"), []byte("two"))
	if _, _, err := findSlot(class, links, update.SlotB); err == nil {
		t.Error("a partition without number")
	}
	write(filepath.Join(folder, "partition"), []byte("2"))
	write(filepath.Join(dev, "vda"), table[:700])
	if _, _, err := findSlot(class, links, update.SlotB); err == nil {
		t.Error("a disk without table")
	}
}

// gptOf is the begin of a disk whose second partition has 2048 blocks from 4096
// on.
func gptOf(t *testing.T) []byte {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const size = 8 << 20
	table := &gpt.Table{LogicalSectorSize: 512, PhysicalSectorSize: 512, ProtectiveMBR: true, Partitions: []*gpt.Partition{
		{Index: 1, Type: gpt.EFISystemPartition, Start: 2048, End: 4095, Size: 1 << 20},
		{Index: 2, Type: gpt.EFISystemPartition, Start: 4096, End: 6143, Size: 1 << 20},
	}}
	if err := errors.Join(f.Truncate(size), table.Write(f, size)); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// TestAttempts counts what the firmware tried, and 0 where nothing says so.
func TestAttempts(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	if n := attempts(log); n != 0 {
		t.Errorf("%d attempts without a log", n)
	}
	if err := os.WriteFile(log, []byte("..."+attemptAction+"...Returning from..."+attemptAction), 0o600); err != nil {
		t.Fatal(err)
	}
	if n := attempts(log); n != 2 {
		t.Errorf("%d attempts, want 2", n)
	}
}
