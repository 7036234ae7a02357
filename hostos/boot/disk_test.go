package boot

import (
	"context"
	"errors"
	"strings"
	"sync"
	"syscall"
	"testing"

	"sekisho/attest/gate"
	"sekisho/hostos/disk"
)

// TestTool: a program gets its input over a pipe, its failure says what it
// said, and it ends with its context.
func TestTool(t *testing.T) {
	h := &host{console: newConsole(&lockedBuffer{}), children: newChildren()}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { h.children.run(ctx) })
	defer wg.Wait()
	defer cancel()
	if err := h.tool(t.Context(), []byte("key"), "/bin/sh", "-c", `test "$(cat)" = key`); err != nil {
		t.Error(err)
	}
	err := h.tool(t.Context(), make([]byte, 1<<20), "/bin/sh", "-c", "echo no such device >&2; exit 4")
	if err == nil || !strings.Contains(err.Error(), "no such device") || !strings.Contains(err.Error(), "4") {
		t.Errorf("failure: %v", err)
	}
	if err := h.tool(t.Context(), nil, "/absent", "x"); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("absent: %v", err)
	}
	short, stop := context.WithCancel(t.Context())
	stop()
	if err := h.tool(short, nil, "/bin/sh", "-c", "exec sleep 1000"); !errors.Is(err, context.Canceled) {
		t.Errorf("ended: %v", err)
	}
}

func TestAskRecovery(t *testing.T) {
	var console lockedBuffer
	h := &host{console: newConsole(&console)}
	var tried []string
	h.askRecovery(strings.NewReader("\n wrong \n"+strings.Repeat("noise ", maxTyped)+"\nright\nnever\n"), func(typed string) error {
		tried = append(tried, typed)
		if typed == "right" {
			return nil
		}
		return &disk.Fault{Codes: []string{gate.CodeRecovery}, Cause: errors.New("x")}
	})
	if len(tried) != 2 || tried[1] != "right" {
		t.Errorf("tried %q", tried)
	}
	if s := console.String(); strings.Contains(s, "wrong") || !strings.Contains(s, "回復キー") || !strings.Contains(s, "type it again") {
		t.Errorf("console %q", s)
	}
}
