package boot

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pid1Word as first argument makes the test binary PID 1 of new namespaces;
// the second argument is its working directory.
const pid1Word = "pid-1"

// verdict is what PID 1 found out.
type verdict struct {
	Error    string
	About    about // what the service says
	Outside  string
	Inside   string
	Orphan   bool // an orphan was reaped
	Killed   int  // restarts after kill -9
	Autoconf string
}

// needRoot skips a test that needs privileges, unless they were promised.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Getenv("SEKISHO_TEST") != "all" {
		t.Skip("needs root and makes namespaces: run as root with SEKISHO_TEST=all")
	}
	if os.Getuid() != 0 {
		t.Fatal("SEKISHO_TEST=all, but not root")
	}
}

func TestAsPID1(t *testing.T) {
	needRoot(t)
	dir, err := os.MkdirTemp("", "sekisho-pid1")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	os.Chmod(dir, 0o755)
	exe := filepath.Join(dir, "bb") // where every user can execute it
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(exe, self, 0o755); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, exe, pid1Word, dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS | syscall.CLONE_NEWNET}
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var v verdict
	if err := json.Unmarshal(out, &v); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if v.Error != "" {
		t.Fatal(v.Error)
	}
	if v.About.UID != 102 || fmt.Sprint(v.About.Groups) != "[101 103 105 110]" {
		t.Errorf("uid %d, groups %v, want netd's", v.About.UID, v.About.Groups)
	}
	if v.About.Net != v.Inside || v.Inside == v.Outside {
		t.Errorf("service in %s; inside is %s, outside %s", v.About.Net, v.Inside, v.Outside)
	}
	const netAdmin = "0000000000001000" // 1 << CAP_NET_ADMIN
	for _, set := range []string{"CapEff", "CapPrm", "CapAmb"} {
		if !strings.Contains(v.About.Status, set+":\t"+netAdmin) {
			t.Errorf("%s is not CAP_NET_ADMIN alone:\n%s", set, v.About.Status)
		}
	}
	if !v.Orphan {
		t.Error("an orphan was not reaped")
	}
	if v.Killed != 1 {
		t.Errorf("%d restarts after kill -9, want 1", v.Killed)
	}
	if v.Autoconf != "0" {
		t.Errorf("accept_ra of future interfaces inside is %q, want 0", v.Autoconf)
	}
}

// pid1 runs in its own namespaces and prints its verdict.
func pid1(dir string) {
	v, err := asPID1(dir)
	if err != nil {
		v.Error = err.Error()
	}
	json.NewEncoder(os.Stdout).Encode(v)
}

func asPID1(dir string) (v verdict, err error) {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return v, err
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return v, err
	}
	inside := filepath.Join(dir, "netns", "inside")
	if err := makeNetns(inside); err != nil {
		return v, err
	}
	if err := inNetns(inside, func() (err error) {
		if err := noIPv6Autoconfiguration(); err != nil {
			return err
		}
		b, err := os.ReadFile("/proc/sys/net/ipv6/conf/default/accept_ra")
		v.Autoconf = strings.TrimSpace(string(b))
		if err != nil {
			return err
		}
		v.Inside, err = os.Readlink("/proc/thread-self/ns/net")
		return err
	}); err != nil {
		return v, err
	}
	if v.Outside, err = os.Readlink("/proc/self/ns/net"); err != nil {
		return v, err
	}
	sup, stop, err := newTestSupervisor(dir, &lockedBuffer{})
	if err != nil {
		return v, err
	}
	defer stop()
	svc := testService(sup, dir, "serve")
	svc.User, svc.Caps, svc.Netns = "netd", []uintptr{unix.CAP_NET_ADMIN}, inside
	svc.Socket, svc.Notify, svc.Watchdog = filepath.Join(dir, "api"), true, 5*time.Second
	s, err := sup.add(context.Background(), svc)
	if err != nil {
		return v, err
	}
	if v.About, err = get(svc.Socket); err != nil {
		return v, fmt.Errorf("%w; %+v", err, s.now())
	}
	v.Orphan, err = orphanReaped(sup)
	if err != nil {
		return v, err
	}
	sup.children.signal(s.now().PID, syscall.SIGKILL)
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
		if a, err := get(svc.Socket); err == nil && a.PID != v.About.PID {
			break
		}
	}
	v.Killed = s.now().Restarts
	return v, nil
}

// orphanReaped has a shell leave a grandchild behind and reports whether the
// grandchild is gone after it has ended.
func orphanReaped(sup *supervisor) (bool, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return false, err
	}
	defer r.Close()
	_, exited, err := sup.children.start("/bin/sh", []string{"sh", "-c", "setsid sh -c 'echo $$; sleep 0.2' & sleep 0.1"},
		&syscall.ProcAttr{Env: os.Environ(), Files: []uintptr{0, w.Fd(), 2}}, "")
	w.Close()
	if err != nil {
		return false, err
	}
	var pid int
	if _, err := fmt.Fscan(r, &pid); err != nil {
		return false, err
	}
	<-exited
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
		if err := syscall.Kill(pid, 0); err == syscall.ESRCH {
			return true, nil
		}
	}
	return false, nil
}
