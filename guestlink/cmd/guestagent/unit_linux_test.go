package main

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netns"

	"sekisho/guestlink"
	"sekisho/guestlink/packet"
)

// nothing is a device without packets.
type nothing struct{ closed chan struct{} }

func (d nothing) Read([]byte) (int, error)    { <-d.closed; return 0, os.ErrClosed }
func (d nothing) Write(b []byte) (int, error) { return len(b), nil }
func (d nothing) Close() error                { return nil }

// TestUnit has a real systemd run guestagent.service as it is, sandbox and all,
// in namespaces: the agent makes its TUN device, takes a config from a host end
// (address, route, resolv.conf), comes back by itself when it is killed, and
// ends when it is stopped.
func TestUnit(t *testing.T) {
	if os.Getenv("SEKISHO_TEST") != "all" {
		t.Skip("needs root, namespaces and systemd: run as root with SEKISHO_TEST=all")
	}
	dir := t.TempDir()
	agent := filepath.Join(dir, "guestagent")
	build := exec.Command("go", "build", "-trimpath", "-tags", "loopback", "-o", agent, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	world := filepath.Join(dir, "world")
	if err := os.Mkdir(world, 0o755); err != nil {
		t.Fatal(err)
	}
	const address = "127.0.0.1:1024"
	c := exec.Command("unshare", "-pmnuiC", "--fork", "--kill-child", "bash", "testdata/systemd.sh", world, agent, "guestagent.service", "tcp:"+address)
	var said strings.Builder
	c.Stdout, c.Stderr = &said, &said
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Process.Kill()
		c.Wait()
		if t.Failed() {
			t.Log(said.String())
		}
	})
	inside := func(args ...string) (string, error) {
		children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", c.Process.Pid))
		if err != nil || len(strings.Fields(string(children))) == 0 {
			return "", fmt.Errorf("systemd has not begun: %v", err)
		}
		pid := strings.Fields(string(children))[0]
		out, err := exec.Command("nsenter", append([]string{"-t", pid, "-m", "-p", "-n", "-r", "--"}, args...)...).CombinedOutput()
		return strings.TrimSpace(string(out)), err
	}
	until := func(what string, f func() (bool, string)) {
		t.Helper()
		last := ""
		for begin := time.Now(); time.Since(begin) < time.Minute; <-time.After(100 * time.Millisecond) {
			var ok bool
			if ok, last = f(); ok {
				return
			}
		}
		t.Fatalf("waited for %s; last: %s", what, last)
	}
	show := func(property string) string {
		out, _ := inside("systemctl", "show", "--value", "-p", property, "guestagent.service")
		return out
	}
	until("the unit to be active", func() (bool, string) {
		s := show("ActiveState")
		return s == "active", s
	})

	l := listenInside(t, c.Process.Pid, address)
	statuses := make(chan guestlink.Status, 64)
	host := packet.NewHost(nothing{make(chan struct{})}, func(s guestlink.Status) { statuses <- s })
	if err := host.SetConfig(guestlink.Config{Address: netip.MustParsePrefix("10.80.0.2/32"), MTU: 1400, DNS: []netip.Addr{netip.MustParseAddr("10.1.0.53")}}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); host.Listen(ctx, l, func(bool, error) {}) }()
	defer func() { cancel(); <-ended }()
	configured := func() {
		t.Helper()
		for limit := time.After(time.Minute); ; {
			select {
			case s := <-statuses:
				if s.State == guestlink.StateFailed {
					t.Fatalf("the agent says %+v", s)
				}
				if s.State == guestlink.StateConfigured {
					return
				}
			case <-limit:
				t.Fatal("the agent is not configured")
			}
		}
	}
	configured()
	if out, err := inside("ip", "-4", "route"); err != nil || !strings.Contains(out, "default dev sekisho0") {
		t.Errorf("routes: %s, %v", out, err)
	}
	if out, err := inside("cat", "/etc/resolv.conf"); err != nil || out != "nameserver 10.1.0.53" {
		t.Errorf("resolv.conf: %s, %v", out, err)
	}
	if out, err := inside("cat", "/proc/sys/net/ipv4/tcp_tso_rtt_log"); err != nil || out != "31" {
		t.Errorf("tcp_tso_rtt_log: %s, %v", out, err)
	}
	// Field 41 is the policy (proc_pid_stat(5)); 3 is SCHED_BATCH.
	if out, err := inside("bash", "-c", "cut -d' ' -f41 /proc/"+show("MainPID")+"/task/*/stat | sort -u"); err != nil || out[strings.LastIndex(out, "\n")+1:] != "3" || strings.Contains(out, "0\n") {
		t.Errorf("scheduling policies of the agent's threads: %q, %v", out, err)
	}
	old := show("MainPID")
	if out, err := inside("kill", "-KILL", old); err != nil {
		t.Fatalf("kill: %s, %v", out, err)
	}
	configured()
	if now := show("MainPID"); now == old || now == "0" {
		t.Errorf("main process %s, before %s", now, old)
	}
	if n, err := strconv.Atoi(show("MemoryCurrent")); err == nil && n > 30<<20 {
		t.Errorf("%d bytes of memory", n)
	}
	if out, err := inside("systemctl", "stop", "guestagent.service"); err != nil {
		t.Errorf("stop: %s, %v", out, err)
	}
	if s, r := show("ActiveState"), show("Result"); s != "inactive" || r != "success" {
		t.Errorf("stopped: %s, %s", s, r)
	}
}

// listenInside listens in the network namespace of the child of process pid.
func listenInside(t *testing.T, pid int, address string) net.Listener {
	t.Helper()
	type result struct {
		l   net.Listener
		err error
	}
	done := make(chan result)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread stays in the namespace and ends
		children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", pid))
		var r result
		if err == nil {
			var child int
			_, err = fmt.Sscan(string(children), &child)
			if err == nil {
				var ns netns.NsHandle
				if ns, err = netns.GetFromPid(child); err == nil {
					err = netns.Set(ns)
				}
			}
		}
		if err == nil {
			r.l, err = net.Listen("tcp4", address)
		}
		r.err = err
		done <- r
	}()
	r := <-done
	if r.err != nil {
		t.Fatal(r.err)
	}
	return r.l
}
