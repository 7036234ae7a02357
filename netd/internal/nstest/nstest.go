//go:build linux

// Package nstest gives tests real network namespaces that end with the test.
// Topologies are built with ip(8), so that what a test expects does not rest
// on the code that it tests.
package nstest

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sekisho/netd/kernel"
)

// Require skips t unless it may make namespaces: as root, asked for by
// SEKISHO_TEST=all. Each of tools must then be installed.
func Require(t testing.TB, tools ...string) {
	t.Helper()
	if os.Geteuid() != 0 || os.Getenv("SEKISHO_TEST") != "all" {
		t.Skip("needs root and network namespaces: run as root with SEKISHO_TEST=all")
	}
	for _, tool := range append(tools, "ip", "nsenter") {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatalf("%v: install it", err)
		}
	}
}

// NS is a network namespace.
type NS struct {
	Path string
	name string
	t    testing.TB
}

// New makes a namespace whose loopback device is up.
func New(t testing.TB, name string) *NS {
	t.Helper()
	ns := &NS{filepath.Join(t.TempDir(), name), name, t}
	if err := kernel.Create(ns.Path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(ns.Path, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", ns.Path, err)
		}
	})
	ns.Run("ip", "link", "set", "lo", "up")
	return ns
}

// Command returns a command that runs in the namespace.
func (ns *NS) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "nsenter", append([]string{"--net=" + ns.Path, "--", name}, args...)...)
}

// Run runs a command in the namespace and returns its output. A failure ends the test.
func (ns *NS) Run(name string, args ...string) string {
	ns.t.Helper()
	out, err := ns.Try(name, args...)
	if err != nil {
		ns.t.Fatalf("%s: %v", ns.name, err)
	}
	return out
}

// Try is Run, but leaves the error to the caller.
func (ns *NS) Try(name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, err := ns.Command(ctx, name, args...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
	}
	return string(out), err
}

// Start starts a command that is killed, and waited for, when the test ends.
func (ns *NS) Start(name string, args ...string) *exec.Cmd {
	ns.t.Helper()
	cmd := ns.Command(context.Background(), name, args...)
	var log strings.Builder
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		ns.t.Fatal(err)
	}
	ns.t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if ns.t.Failed() {
			ns.t.Logf("%s: %s said:\n%s", ns.name, name, log.String())
		}
	})
	return cmd
}

// Do runs f on a thread inside the namespace. Sockets that f opens stay there.
func (ns *NS) Do(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the runtime ends the thread
		fd, err := unix.Open(ns.Path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			err = unix.Setns(fd, unix.CLONE_NEWNET)
			unix.Close(fd)
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

// Listen listens on TCP inside the namespace.
func (ns *NS) Listen(address string) net.Listener {
	ns.t.Helper()
	var l net.Listener
	if err := ns.Do(func() (err error) { l, err = net.Listen("tcp", address); return err }); err != nil {
		ns.t.Fatal(err)
	}
	ns.t.Cleanup(func() { l.Close() })
	return l
}

// Pair joins two namespaces by a veth pair, each end up with its address
// (which may be empty).
func Pair(a *NS, aName, aAddress string, b *NS, bName, bAddress string) {
	a.t.Helper()
	a.Run("ip", "link", "add", aName, "type", "veth", "peer", "name", bName, "netns", b.Path)
	for _, end := range []struct {
		ns            *NS
		name, address string
	}{{a, aName, aAddress}, {b, bName, bAddress}} {
		if end.address != "" {
			end.ns.Run("ip", "address", "add", end.address, "dev", end.name)
		}
		end.ns.Run("ip", "link", "set", end.name, "up")
	}
}

// Eventually calls f every few milliseconds until it returns nil, and ends the
// test with its last error after limit.
func Eventually(t testing.TB, limit time.Duration, f func() error) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	deadline := time.Now().Add(limit)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %v: %v", limit, err)
		}
		<-tick.C
	}
}
