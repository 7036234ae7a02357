package vmm

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// follow runs a Machine and returns it with the channel of its changes.
func follow(t *testing.T, path string) (*Machine, chan Status) {
	t.Helper()
	changes := make(chan Status, 64)
	m := NewMachine(path, time.Now, func(s Status) { changes <- s })
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { m.Run(ctx) })
	t.Cleanup(func() { cancel(); wg.Wait() })
	return m, changes
}

func expect(t *testing.T, changes chan Status, want State) {
	t.Helper()
	select {
	case s := <-changes:
		if s.State != want {
			t.Fatalf("state %s (%s), want %s", s.State, s.Detail, want)
		}
	case <-time.After(30 * time.Second):
		t.Fatalf("no change to %s", want)
	}
}

// fakeQEMU answers each command with the next of lines, then sends the rest.
func fakeQEMU(t *testing.T, lines ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "qmp")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		fmt.Fprintln(c, `{"QMP": {"version": {}, "capabilities": []}}`)
		in := bufio.NewScanner(c)
		for i := 0; i < 2 && in.Scan(); i++ { // qmp_capabilities, query-status
			status := `{}`
			if strings.Contains(in.Text(), "query-status") {
				status = `{"status": "running"}`
			}
			fmt.Fprintf(c, `{"return": %s, "id": %d}`+"\n", status, i+1)
		}
		for _, line := range lines {
			fmt.Fprintln(c, line)
		}
		in.Scan() // until the client goes
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return path
}

func TestEvents(t *testing.T) {
	for name, c := range map[string]struct {
		lines []string
		want  []State
	}{
		"guest switches off": {[]string{`{"event":"SHUTDOWN","data":{"guest":true,"reason":"guest-shutdown"}}`}, []State{Running, Shutdown}},
		"guest panics": {[]string{`{"event":"GUEST_PANICKED","data":{"action":"shutdown"}}`,
			`{"event":"SHUTDOWN","data":{"guest":true,"reason":"guest-panic"}}`, `{"event":"RESUME"}`}, []State{Running, Panicked, Running}},
		"sleeps":           {[]string{`{"event":"SUSPEND"}`, `{"event":"WAKEUP"}`}, []State{Running, Suspended, Running}},
		"told to quit":     {[]string{`{"event":"SHUTDOWN","data":{"guest":false,"reason":"host-signal"}}`}, []State{Running, Absent}},
		"paused":           {[]string{`{"event":"STOP"}`, `{"event":"RESUME"}`}, []State{Running, Paused, Running}},
		"nonsense":         {[]string{`not json`}, []State{Running, Absent}},
		"a line too long":  {[]string{`{"event":"` + strings.Repeat("x", maxQMPLine) + `"}`}, []State{Running, Absent}},
		"unknown event":    {[]string{`{"event":"NEW_THING"}`, `{"event":"STOP"}`}, []State{Running, Paused}},
		"answer to no one": {[]string{`{"return":{},"id":99}`, `{"event":"STOP"}`}, []State{Running, Paused}},
	} {
		t.Run(name, func(t *testing.T) {
			_, changes := follow(t, fakeQEMU(t, c.lines...))
			for _, want := range c.want {
				expect(t, changes, want)
			}
		})
	}
}

func FuzzQMP(f *testing.F) {
	f.Add([]byte(`{"event":"SHUTDOWN","data":{"guest":true}}` + "\n" + `{"return":{},"id":1}` + "\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		client, server := net.Pipe()
		m := NewMachine("", time.Now, func(Status) {})
		q := &qmp{conn: client, lines: bufio.NewScanner(client), events: m.event, pending: map[uint64]func(qmpMessage){}, done: make(chan struct{})}
		q.lines.Buffer(nil, maxQMPLine)
		go q.read()
		server.Write(b)
		server.Close()
		<-q.done
	})
}

// TestQEMU runs the real QEMU without a disk to boot from: it comes up, is
// killed, comes up again, and ends when told to.
func TestQEMU(t *testing.T) {
	if os.Getenv("SEKISHO_TEST") != "all" {
		t.Skip("starts qemu-system-x86_64 with software emulation: run with SEKISHO_TEST=all")
	}
	for _, p := range []string{Binary, FirmwareCode, FirmwareVars} {
		if _, err := os.Stat(p); err != nil {
			t.Fatalf("%v: install qemu-system-x86 and ovmf", err)
		}
	}
	dir := t.TempDir()
	disk := filepath.Join(dir, "disk")
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := Prepare(Config{MemoryMiB: 128, VCPUs: 1, Disk: disk, Code: FirmwareCode, GuestCID: 3, Accel: TCG},
		filepath.Join(dir, "vmm"), FirmwareVars, os.Getuid())
	if err != nil {
		t.Fatal(err)
	}
	args := Args(c)
	// This machine may have no vhost-vsock; the device is left out here alone.
	i := slices.IndexFunc(args, func(a string) bool { return strings.HasPrefix(a, "vhost-vsock-pci") })
	args = slices.Delete(args, i-1, i+1)
	for i, a := range args {
		args[i] = strings.ReplaceAll(a, "direct=on", "direct=off") // a temporary directory may be tmpfs
	}
	m, changes := follow(t, c.QMP)
	start := func() *exec.Cmd {
		cmd := exec.Command(Binary, args...)
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return cmd
	}
	first := start()
	expect(t, changes, Running)
	first.Process.Kill()
	first.Wait()
	expect(t, changes, Absent)
	if err := m.PowerDown(t.Context()); err == nil {
		t.Error("power button of a dead QEMU was pressed")
	}
	second := start()
	expect(t, changes, Running)
	if err := m.PowerDown(t.Context()); err != nil {
		t.Error(err)
	}
	second.Process.Signal(os.Interrupt)
	second.Wait()
	expect(t, changes, Absent)
}
