package boot

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"
)

// childWord as first argument makes the test binary a service under test.
const childWord = "service-under-test"

func TestMain(m *testing.M) {
	switch {
	case len(os.Args) > 1 && os.Args[0] == "init" && os.Args[1] == "exec":
		fmt.Fprintln(os.Stderr, Exec(os.Args[2:]))
		os.Exit(ExecFailed)
	case len(os.Args) > 2 && os.Args[1] == childWord:
		child(os.Args[2])
	case len(os.Args) > 2 && os.Args[1] == pid1Word:
		pid1(os.Args[2])
	default:
		os.Exit(m.Run())
	}
}

// child is what the services of these tests do.
func child(mode string) {
	notify := func(s string) { daemon.SdNotify(false, s) }
	switch mode {
	case "crash":
		fmt.Println("about to crash")
		os.Exit(7)
	case "env":
		fmt.Println(strings.Join(os.Environ(), "\n"))
		fmt.Println("end of environment")
	case "mute":
		notify("READY=1")
	case "deaf":
		signal.Ignore(syscall.SIGTERM)
		notify("READY=1\nSTATUS=ready \x1b[31mto resist")
	case "serve":
		ls, err := activation.Listeners()
		if err != nil || len(ls) != 1 {
			fmt.Println("no socket", err)
			os.Exit(1)
		}
		go http.Serve(ls[0], http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			json.NewEncoder(w).Encode(self())
		}))
		notify("READY=1\nSTATUS=serving")
		every, _ := daemon.SdWatchdogEnabled(false)
		for range time.Tick(max(every/2, time.Millisecond)) {
			notify("WATCHDOG=1")
		}
	}
	for { // an empty select would be a deadlock to the runtime
		syscall.Pause()
	}
}

// about is what a service says of itself.
type about struct {
	PID    int
	UID    int
	Groups []int
	Net    string // network namespace
	Status string // /proc/self/status
}

func self() about {
	a := about{PID: os.Getpid(), UID: os.Getuid()}
	a.Groups, _ = os.Getgroups()
	a.Net, _ = os.Readlink("/proc/self/ns/net")
	b, _ := os.ReadFile("/proc/self/status")
	a.Status = string(b)
	return a
}

// lockedBuffer is a console that a test can read while others write.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// newTestSupervisor runs a supervisor with its reaper and notify socket in dir.
func newTestSupervisor(dir string, console *lockedBuffer) (v *supervisor, stop func(), err error) {
	group := os.Getgid()
	if os.Getuid() == 0 { // services run as their own users
		id, _ := lookup(notifyGroup)
		group = int(id)
	}
	notify, err := listenNotify(filepath.Join(dir, "notify"), group)
	if err != nil {
		return nil, nil, err
	}
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return nil, nil, err
	}
	v = &supervisor{children: newChildren(), self: exe, notify: filepath.Join(dir, "notify"), console: newConsole(console), now: time.Now}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { v.children.run(ctx) })
	wg.Go(func() { receiveNotify(notify, v.deliver) })
	return v, func() {
		v.stopAll()
		notify.Close()
		cancel()
		wg.Wait()
	}, nil
}

func testSupervisor(t *testing.T) (*supervisor, string, *lockedBuffer) {
	t.Helper()
	dir, console := t.TempDir(), &lockedBuffer{}
	v, stop, err := newTestSupervisor(dir, console)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	return v, dir, console
}

func testService(v *supervisor, dir, mode string) Service {
	return Service{Name: mode, Args: []string{v.self, childWord, mode}, Log: filepath.Join(dir, mode+".log")}
}

// until waits for a condition; the test's own time limit is the last resort.
func until(t *testing.T, what string, f func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	limit := time.After(20 * time.Second)
	for !f() {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

func (s *supervised) now() ServiceStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.status
}

func get(socket string) (about, error) {
	var a about
	c := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		}}}
	resp, err := c.Get("http://x/")
	if err != nil {
		return a, err
	}
	defer resp.Body.Close()
	return a, json.NewDecoder(resp.Body).Decode(&a)
}

func TestCrashIsRestartedWithBackOff(t *testing.T) {
	v, dir, console := testSupervisor(t)
	svc := testService(v, dir, "crash")
	var starts atomic.Int32
	svc.Started = func() { starts.Add(1) }
	s, err := v.add(t.Context(), svc)
	if err != nil {
		t.Fatal(err)
	}
	until(t, "two restarts", func() bool { return s.now().Restarts >= 2 })
	until(t, "three starts told", func() bool { return starts.Load() >= 3 })
	for _, want := range []string{"crash: failed (exit status 7), restart in 100ms\n", "crash: failed (exit status 7), restart in 200ms\n"} {
		if !strings.Contains(console.String(), want) {
			t.Errorf("console lacks %q:\n%s", want, console)
		}
	}
	if b, _ := os.ReadFile(filepath.Join(dir, "crash.log")); !bytes.HasPrefix(b, []byte("about to crash\n")) {
		t.Errorf("log: %q", b)
	}
}

func TestActivationSurvivesKill(t *testing.T) {
	v, dir, console := testSupervisor(t)
	svc := testService(v, dir, "serve")
	svc.Socket, svc.Notify, svc.Watchdog = filepath.Join(dir, "api"), true, 5*time.Second
	s, err := v.add(t.Context(), svc)
	if err != nil {
		t.Fatal(err)
	}
	a, err := get(svc.Socket) // at once: the socket is there before the service
	if err != nil {
		t.Fatal(err)
	}
	until(t, "running", func() bool { return s.now().State == Running && s.now().Status == "serving" })
	if a.PID != s.now().PID {
		t.Errorf("pid %d answers, %d is supervised", a.PID, s.now().PID)
	}
	if !strings.Contains(a.Status, "NoNewPrivs:\t1") {
		t.Error("service may gain privileges")
	}
	if fi, err := os.Stat(svc.Socket); err != nil || fi.Mode().Perm() != 0o660 {
		t.Errorf("socket: %v, %v", fi.Mode(), err)
	}
	syscall.Kill(a.PID, syscall.SIGKILL)
	b, err := get(svc.Socket) // waits in the queue of the socket that stayed
	for err != nil {          // a connection that the killed process had accepted
		b, err = get(svc.Socket)
	}
	if b.PID == a.PID || s.now().Restarts != 1 {
		t.Errorf("after kill -9: pid %d then %d, %d restarts", a.PID, b.PID, s.now().Restarts)
	}
	if !strings.Contains(console.String(), "serve: failed (signal killed), restart in 100ms") {
		t.Errorf("console:\n%s", console)
	}
}

func TestWatchdogKills(t *testing.T) {
	v, dir, _ := testSupervisor(t)
	svc := testService(v, dir, "mute")
	// Long enough for the service's runtime to be up: before that, SIGABRT leaves no trace.
	svc.Notify, svc.Watchdog = true, 2*time.Second
	s, err := v.add(t.Context(), svc)
	if err != nil {
		t.Fatal(err)
	}
	until(t, "restart by watchdog", func() bool { return s.now().Restarts >= 1 })
	if got := s.now().LastExit; !strings.HasPrefix(got, "watchdog, ") {
		t.Errorf("last exit %q", got)
	}
	until(t, "the hung service's trace in its log", func() bool {
		b, _ := os.ReadFile(svc.Log)
		return bytes.Contains(b, []byte("SIGABRT"))
	})
}

func TestServiceDeafToSIGTERMIsKilledAtStop(t *testing.T) {
	v, dir, console := testSupervisor(t)
	svc := testService(v, dir, "deaf")
	svc.Notify = true
	s, err := v.add(t.Context(), svc)
	if err != nil {
		t.Fatal(err)
	}
	until(t, "ready", func() bool { return s.now().State == Running })
	s.stop()
	<-s.done
	if got := s.now(); got.State != Stopped || got.LastExit != "told to stop, signal killed" {
		t.Errorf("%+v", got)
	}
	if !strings.Contains(console.String(), "deaf: ready  [31mto resist\n") {
		t.Errorf("console:\n%s", console)
	}
}

func TestMissingProgramAndForeignMessages(t *testing.T) {
	v, dir, _ := testSupervisor(t)
	s, err := v.add(t.Context(), Service{Name: "none", Args: []string{filepath.Join(dir, "none")}, Notify: true, Log: filepath.Join(dir, "log")})
	if err != nil {
		t.Fatal(err)
	}
	until(t, "restart", func() bool { return s.now().Restarts >= 1 })
	if got := s.now().LastExit; got != "program could not be executed" {
		t.Errorf("last exit %q", got)
	}
	m, err := v.add(t.Context(), func() Service { s := testService(v, dir, "hold"); s.Notify = true; return s }())
	if err != nil {
		t.Fatal(err)
	}
	until(t, "started", func() bool { return m.now().PID != 0 })
	c, err := net.Dial("unixgram", v.notify)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for range 200 { // from this process, which is no service
		c.Write([]byte("READY=1\nSTATUS=forged"))
	}
	until(t, "messages read", func() bool { _, err := c.Write([]byte("X=1")); return err == nil })
	if got := m.now(); got.State != Starting || got.Status != "" {
		t.Errorf("a foreign message was believed: %+v", got)
	}
}

// TestWhoMayNotify: the socket is for one group, and a service that does not
// speak the protocol is not told where it is.
func TestWhoMayNotify(t *testing.T) {
	v, dir, _ := testSupervisor(t)
	fi, err := os.Stat(v.notify)
	if err != nil {
		t.Fatal(err)
	}
	want := os.Getgid()
	if os.Getuid() == 0 {
		id, _ := lookup(notifyGroup)
		want = int(id)
	}
	if fi.Mode().Perm() != 0o660 || int(fi.Sys().(*syscall.Stat_t).Gid) != want {
		t.Errorf("notify socket: %v of group %d, want 0660 of %d", fi.Mode(), fi.Sys().(*syscall.Stat_t).Gid, want)
	}
	for _, speaks := range []bool{false, true} {
		svc := testService(v, dir, "env")
		svc.Notify, svc.Log = speaks, filepath.Join(dir, fmt.Sprint(speaks))
		s, err := v.add(t.Context(), svc)
		if err != nil {
			t.Fatal(err)
		}
		until(t, "its environment", func() bool {
			b, _ := os.ReadFile(svc.Log)
			return bytes.Contains(b, []byte("end of environment"))
		})
		b, _ := os.ReadFile(svc.Log)
		if bytes.Contains(b, []byte("NOTIFY_SOCKET=")) != speaks {
			t.Errorf("notify %v: %s", speaks, b)
		}
		s.stop()
	}
	for _, u := range Users() {
		if in := strings.Contains(strings.Join(u.Groups, " "), notifyGroup); in != slices.Contains([]string{"attestd", "netd", "linkd", "logind"}, u.Name) {
			t.Errorf("%s: in the group %s: %v", u.Name, notifyGroup, in)
		}
	}
}
