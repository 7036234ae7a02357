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
