// Package tpmtest starts software TPMs (swtpm) for tests: each with its own
// state, an EK certificate, and a CA of its own that no configuration but the
// test's trusts.
package tpmtest

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// Emulator is a running swtpm.
type Emulator struct {
	Socket string // unix socket for tpm.Open
	Roots  string // PEM file: the CA of its EK certificate

	t     testing.TB
	state string    // directory
	cmd   *exec.Cmd // running swtpm
}

// Restart is a power cut: the TPM gets no warning, and comes back reset.
func (e *Emulator) Restart() {
	e.t.Helper()
	e.stop()
	if err := os.Remove(e.Socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		e.t.Fatal(err)
	}
	e.start()
}

func (e *Emulator) start() {
	e.t.Helper()
	e.cmd = exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+e.state,
		"--server", "type=unixio,path="+e.Socket, "--flags", "not-need-init,startup-clear")
	if err := e.cmd.Start(); err != nil {
		e.t.Fatalf("swtpm: %v", err)
	}
	wait(e.t, e.Socket)
}

func (e *Emulator) stop() {
	if e.cmd != nil && e.cmd.Process != nil {
		e.cmd.Process.Kill()
		e.cmd.Wait()
	}
}

// Need skips t unless it runs as root with SEKISHO_TEST=all; then swtpm must
// be there.
func Need(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 || os.Getenv("SEKISHO_TEST") != "all" {
		t.Skip("needs swtpm: runs only as root with SEKISHO_TEST=all")
	}
	for _, tool := range []string{"swtpm", "swtpm_setup", "swtpm_localca"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatalf("%s is missing; install swtpm and swtpm-tools: %v", tool, err)
		}
	}
}

// Start manufactures a TPM and starts it. It ends with the test.
func Start(t testing.TB) *Emulator {
	t.Helper()
	Need(t)
	dir := t.TempDir() // absolute, as swtpm wants it
	ca, state := filepath.Join(dir, "ca"), filepath.Join(dir, "state")
	for _, d := range []string{ca, state} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	write := func(name, format string, a ...any) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, fmt.Appendf(nil, format, a...), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	localca := write("localca.conf", "statedir = %[1]s\nsigningkey = %[1]s/signkey.pem\nissuercert = %[1]s/issuercert.pem\ncertserial = %[1]s/certserial\n", ca)
	options := write("localca.options", "--platform-manufacturer Sekisho\n--platform-version 1\n--platform-model Test\n")
	setup := write("setup.conf", "create_certs_tool = /usr/bin/swtpm_localca\ncreate_certs_tool_config = %s\ncreate_certs_tool_options = %s\nactive_pcr_banks = sha256\n", localca, options)
	out, err := exec.CommandContext(t.Context(), "swtpm_setup", "--tpm2", "--tpmstate", state, "--create-ek-cert", "--lock-nvram", "--config", setup).CombinedOutput()
	if err != nil {
		t.Fatalf("swtpm_setup: %v\n%s", err, out)
	}

	// Socket paths are limited to 107 bytes; test directories can be longer.
	short, err := os.MkdirTemp("", "tpm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(short) })
	e := &Emulator{Socket: filepath.Join(short, "tpm"), Roots: filepath.Join(ca, "issuercert.pem")}
	e.t, e.state = t, state
	t.Cleanup(func() { e.stop() })
	e.start()
	return e
}

// wait returns once something accepts on socket.
func wait(t testing.TB, socket string) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		if c, err := net.Dial("unix", socket); err == nil {
			c.Close()
			return
		}
		select {
		case <-deadline:
			t.Fatalf("swtpm does not listen on %s", socket)
		case <-tick.C:
		}
	}
}
