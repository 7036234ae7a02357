package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"sekisho/images/lab/hook"
)

// certificateLife is short, so that a lapse can be waited for.
const certificateLife = 60 * time.Second

// stepTime bounds each wait for a condition: software emulation is slow.
const stepTime = 6 * time.Minute

// testLog shows progress while the test runs.
type testLog struct{ t *testing.T }

func (w testLog) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimRight(string(p), "\n"))
	return len(p), nil
}

// bench is the lab under test with what its scenarios share.
type bench struct {
	*Lab
	leaked int // frames leaked so far
	tokens int
}

// realLab builds what is missing and takes the lab down at the end.
func realLab(t *testing.T, options ...func(*Lab)) *bench {
	t.Helper()
	if os.Getenv("SEKISHO_TEST") != "all" {
		t.Skip("boots a virtual laptop, which takes minutes and root: set SEKISHO_TEST=all")
	}
	if os.Geteuid() != 0 {
		t.Fatal("SEKISHO_TEST=all: run as root")
	}
	l, err := New(".", testLog{t})
	if err != nil {
		t.Fatal(err)
	}
	for _, set := range options {
		set(l)
	}
	build := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-o", l.out("..", "bin")+"/",
		"./images/lab/cmd/lab", "./attest/cmd/verifier", "./attest/cmd/attestctl", "./netd/cmd/gateway", "./netd/cmd/beacon")
	build.Dir, build.Env = l.Root, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	unlock, err := l.Lock()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(unlock)
	if err := l.Build(t.Context()); err != nil {
		t.Fatal(err)
	}
	b := &bench{Lab: l}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
		defer cancel()
		if t.Failed() {
			b.evidence(ctx, t)
		}
		if err := l.Down(ctx); err != nil {
			t.Errorf("down: %v", err)
		}
	})
	return b
}

// evidence keeps what helps to understand a failure.
func (b *bench) evidence(ctx context.Context, t *testing.T) {
	if console, err := os.ReadFile(b.run("console.log")); err == nil {
		lines := strings.Split(strings.TrimSpace(string(console)), "\n")
		t.Logf("the end of the console:\n%s", strings.Join(lines[max(0, len(lines)-25):], "\n"))
	}
	if s, err := b.Status(ctx); err == nil {
		t.Logf("status:\n%s", s)
	}
	if a, err := b.Exec(ctx, hook.Host, "tail", "-n", "40", "/run/sekisho/work-console.log"); err == nil {
		t.Logf("the end of the work domain's console:\n%s", a.Stdout)
	}
	keep := b.out("failed", strings.ReplaceAll(t.Name(), "/", "-"))
	if err := os.MkdirAll(keep, 0o755); err == nil {
		for _, pattern := range []string{b.run("*"), b.lab("*.log"), b.lab("*.json")} {
			files, _ := filepath.Glob(pattern)
			for _, f := range files {
				// A folder's name in front: lab and run have files of the same name.
				_ = copySparse(filepath.Join(keep, filepath.Base(filepath.Dir(f))+"-"+filepath.Base(f)), f)
			}
		}
		t.Logf("logs and capture are in %s", keep)
	}
}

// until waits for a condition.
func (b *bench) until(t *testing.T, what string, holds func(context.Context) bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), stepTime)
	defer cancel()
	if err := waitFor(ctx, what, func() (bool, error) {
		if _, err := b.find("qemu"); err != nil {
			return false, err
		}
		return holds(ctx), nil
	}); err != nil {
		t.Fatal(err)
	}
}

// untilState waits until a daemon is in a state, with a reason if one is given.
func (b *bench) untilState(t *testing.T, daemon, state, reason string) DaemonStatus {
	t.Helper()
	var d DaemonStatus
	b.until(t, fmt.Sprintf("%s to be %s %s", daemon, state, reason), func(ctx context.Context) bool {
		var err error
		d, err = b.Daemon(ctx, daemon)
		return err == nil && d.State == state && (reason == "" || d.Reason == reason)
	})
	if d.State != "Tunnel" && d.State != "affirming" && d.State != "linked" && (d.Since.IsZero() || d.Reason == "" && reason != "") {
		t.Errorf("%s: %s does not say why or since when: %+v", daemon, state, d)
	}
	return d
}

// untilPage waits until the work domain can read the page.
func (b *bench) untilPage(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), stepTime)
	defer cancel()
	if _, err := b.readPage(ctx); err != nil {
		t.Fatal(err)
	}
}

// untilWork waits until the work domain answers.
func (b *bench) untilWork(t *testing.T) {
	t.Helper()
	b.until(t, "the work domain", func(ctx context.Context) bool {
		a, err := b.Exec(ctx, hook.Work, "uname")
		return err == nil && a.Exit == 0
	})
}

// noPage fails the test if the work domain can read the page.
func (b *bench) noPage(t *testing.T) {
	t.Helper()
	a, err := b.Exec(t.Context(), hook.Work, "fetch", "-timeout", "2s", PageURL)
	if err != nil {
		t.Fatal(err)
	}
	if a.Exit == 0 {
		t.Errorf("the page can be read: %.100q", a.Stdout)
	}
}

// probe is traffic that the work domain sends all through a scenario: to LGWAN
// and to places that it must never reach.
type probe struct {
	token string
	pid   string
}

func (b *bench) startProbe(t *testing.T) probe {
	t.Helper()
	b.tokens++
	p := probe{token: fmt.Sprintf("probe%d", b.tokens)}
	a, err := b.Call(t.Context(), hook.Request{Target: hook.Work, Detach: true, Argv: []string{"labguest", "probe", "-n", "1000000", "-every", "20ms",
		"-o", "/tmp/" + p.token, p.token, probeAddress.String(), "192.168.50.1:7007", "203.0.113.10:7007", "8.8.8.8:53"}})
	if err != nil {
		t.Fatal(err)
	}
	p.pid = strings.TrimSpace(string(a.Stdout))
	return p
}

// stop ends the traffic and returns how much was sent and arrived.
func (b *bench) stop(t *testing.T, p probe) (sent, delivered int) {
	t.Helper()
	if a, err := b.Exec(t.Context(), hook.Work, "kill", "-15", p.pid); err != nil || a.Exit != 0 {
		t.Fatalf("stop the probe %s: exit %d: %s, %v", p.pid, a.Exit, a.Stderr, err)
	}
	b.until(t, "the probe's count", func(ctx context.Context) bool {
		a, err := b.Exec(ctx, hook.Work, "cat", "/tmp/"+p.token)
		if err != nil || a.Exit != 0 {
			return false
		}
		sent, err = strconv.Atoi(strings.TrimSpace(string(a.Stdout)))
		return err == nil
	})
	return sent, b.delivered(t, p.token)
}

// delivered asks the page's server in LGWAN.
func (b *bench) delivered(t *testing.T, token string) int {
	t.Helper()
	var counts map[string]int
	err := inNamespace("sekisho-lgwan", func() error {
		c, err := exec.Command(b.bin("lab"), "helper", "probes").Output()
		if err != nil {
			return err
		}
		return json.Unmarshal(c, &counts)
	})
	if err != nil {
		t.Fatalf("probes: %v", err)
	}
	return counts[token]
}

// scenario runs one line of the fault table: traffic flows all the time, and at
// the end the whole capture is judged and the page can be read again.
func (b *bench) scenario(t *testing.T, name string, do func(t *testing.T)) {
	t.Run(name, func(t *testing.T) {
		t.Cleanup(func() {
			if t.Failed() {
				b.evidence(context.WithoutCancel(t.Context()), t)
			}
		})
		p := b.startProbe(t)
		do(t)
		b.untilPage(t)
		b.until(t, "a packet of the probe to arrive", func(context.Context) bool { return b.delivered(t, p.token) > 0 })
		sent, delivered := b.stop(t, p)
		r, err := b.CheckUplink()
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("SCENARIO %-40s sent %d, delivered %d, leaked %d", name, sent, delivered, r.Leaked-b.leaked)
		if r.Leaked > b.leaked {
			t.Errorf("%d frames leaked, such as %v", r.Leaked-b.leaked, r.Leaks[min(b.leaked, len(r.Leaks)-1):])
		}
		b.leaked = r.Leaked
	})
}

// cleanUplink judges the capture, and whether the gateway has opened a session.
// Connections to it are no sign: a closed laptop asks it, as it asks the
// verifier, whether the path is the organisation's (netd/path).
func (b *bench) cleanUplink(t *testing.T, tunnel bool) {
	t.Helper()
	r, err := b.CheckUplink()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("SCENARIO %-40s leaked %d (%s)", t.Name(), r.Leaked, &r)
	if r.Leaked > 0 {
		t.Errorf("leaks: %v", r.Leaks)
	}
	log, err := os.ReadFile(b.lab("gateway.log"))
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	if n := bytes.Count(log, []byte(`msg="session open"`)); (n > 0) != tunnel {
		t.Errorf("%d sessions at the gateway", n)
	}
	for suite, n := range r.Suites {
		if suite != "TLS_AES_256_GCM_SHA384" {
			t.Errorf("%d connections with %s", n, suite)
		}
	}
}
