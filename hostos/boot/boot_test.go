package boot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sekisho/attest"
)

func TestServicesAreTheContract(t *testing.T) {
	doc, err := os.ReadFile("../../docs/host-domain.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range slices.Concat(Services(""), Services(attest.LinkSerial), []Service{LogonService()}) {
		if s.Name == "labhook" {
			continue
		}
		if line := "`" + strings.TrimPrefix(strings.Join(s.Args, " "), "/bbin/") + "`"; !strings.Contains(string(doc), line) {
			t.Errorf("docs/host-domain.md lacks %s", line)
		}
		if !strings.Contains(string(doc), "`"+s.Socket+"`") {
			t.Errorf("docs/host-domain.md lacks %s", s.Socket)
		}
		if id, _ := lookup(s.User); id == 0 {
			t.Errorf("%s runs as root", s.Name)
		}
		if s.Name != "wpa" && (!s.Notify || s.Watchdog == 0) { // Debian's program does not speak the protocol
			t.Errorf("%s is not watched", s.Name)
		}
	}
	if _, groups := lookup("netd"); !slices.Equal(groups, []uint32{101, 103, 110, 105}) {
		t.Errorf("netd's groups: %v", groups)
	}
	for _, n := range nodes() {
		lookup(n.user) // panics on a user that is not there
	}
}

func TestNoNICBeforeTheRuleset(t *testing.T) {
	nics := NICModules()
	for _, m := range BaseModules() {
		if slices.ContainsFunc(nics, func(n Module) bool { return n.Name == m.Name }) {
			t.Errorf("%s is loaded before the ruleset is closed", m.Name)
		}
		if strings.Contains(m.Name, "net") || strings.HasPrefix(m.Name, "e1000") || strings.HasPrefix(m.Name, "cdc_") {
			t.Errorf("%s looks like a network driver", m.Name)
		}
	}
}

func TestNextWait(t *testing.T) {
	var waits []time.Duration
	for wait := time.Duration(0); len(waits) < 9; waits = append(waits, wait) {
		wait = nextWait(wait, time.Second)
	}
	want := []time.Duration{100, 200, 400, 800, 1600, 3200, 6400, 10000, 10000}
	for i := range want {
		if waits[i] != want[i]*time.Millisecond {
			t.Errorf("wait %d: %v, want %v", i, waits[i], want[i]*time.Millisecond)
		}
	}
	if got := nextWait(longestWait, stableRun); got != firstWait {
		t.Errorf("after a stable run: %v", got)
	}
}

func TestConsoleFormat(t *testing.T) {
	var b lockedBuffer
	c := &console{w: &b, since: func() time.Duration { return 12345 * time.Millisecond }}
	c.line("init", "started")
	c.line("netd", "Linked eth0\nsekisho [    0.000] init: forged\x00")
	want := "sekisho [   12.345] init: started\nsekisho [   12.345] netd: Linked eth0 sekisho [    0.000] init: forged \n"
	if b.String() != want {
		t.Errorf("got  %q\nwant %q", b.String(), want)
	}
	if got := printable(strings.Repeat("閉", 500)); len(got) > maxLine || !strings.HasPrefix(strings.Repeat("閉", 500), got) {
		t.Errorf("cut to %d bytes", len(got))
	}
}

// TestStoppedConsoleDoesNotStopInit writes to a console that takes nothing, as
// one does after Ctrl-S, and then to the same console taking lines again.
func TestStoppedConsoleDoesNotStopInit(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	c := newConsole(w)
	for range 2000 { // more than a pipe holds (64 KiB, pipe(7))
		c.line("netd", "%s", strings.Repeat("x", 60))
		if c.stuck {
			break
		}
	}
	if !c.stuck {
		t.Fatal("the pipe took everything")
	}
	c.line("netd", "lost")
	got := make(chan string, 1)
	go func() {
		b := make([]byte, 0, 1<<20)
		for !strings.Contains(string(b), "again") {
			n, err := r.Read(b[len(b):cap(b)])
			if err != nil {
				break
			}
			b = b[:len(b)+n]
		}
		got <- string(b)
	}()
	for c.stuck = true; c.stuck; {
		c.line("netd", "again")
	}
	if s := <-got; strings.Contains(s, "lost") {
		t.Error("a line that was given up was written later")
	}
}

func FuzzNotification(f *testing.F) {
	f.Add([]byte("READY=1\nSTATUS=Linked eth0\nWATCHDOG=1"))
	f.Fuzz(func(t *testing.T, b []byte) {
		n := parseNotification(b)
		if len(n.status) > maxLine || strings.ContainsFunc(n.status, func(r rune) bool { return r < ' ' || r == 0x7f }) {
			t.Fatalf("status %q", n.status)
		}
	})
}

func TestLogIsBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	l, err := openLog(path)
	if err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 1000)
	for range 3000 {
		l.Write(line)
	}
	l.Close()
	var total int64
	for _, p := range []string{path, path + ".1"} {
		fi, err := os.Stat(p)
		if err != nil {
			t.Fatal(err)
		}
		total += fi.Size()
	}
	if total > maxLog || total < maxLog/2-1000 {
		t.Errorf("%d bytes kept, at most %d", total, maxLog)
	}
}

// modules is a prober of an image that holds what is true.
type modules map[string]error

func (m modules) Probe(name, _ string) error {
	if err, ok := m[name]; ok {
		return err
	}
	return fs.ErrNotExist
}

func TestLoader(t *testing.T) {
	var b lockedBuffer
	l := &loader{
		console: newConsole(&b), cpu: "AuthenticAMD",
		prober:  modules{"tun": nil, "kvm_amd": unix.EOPNOTSUPP, "veth": nil},
		present: func(name string) bool { return name == "tpm_tis" },
	}
	broken := l.load(BaseModules())
	for _, want := range []string{ServesRuleset, ServesWorkDomain} {
		if !slices.Contains(broken, want) {
			t.Errorf("%s is not reported broken: %v", want, broken)
		}
	}
	got := map[string]string{}
	for _, m := range l.results() {
		got[m.Name] = m.State
	}
	for name, want := range map[string]string{"nf_tables": "absent", "tun": "loaded", "tpm_tis": "loaded", "kvm_amd": "failed", "kvm_intel": ""} {
		if got[name] != want {
			t.Errorf("%s: %q, want %q", name, got[name], want)
		}
	}
}

func TestLinkPartitions(t *testing.T) {
	sys, links := t.TempDir(), t.TempDir()
	add := func(name, label string) {
		os.MkdirAll(filepath.Join(sys, name), 0o755)
		os.WriteFile(filepath.Join(sys, name, "uevent"), []byte("MAJOR=254\nDEVNAME="+name+"\nDEVTYPE=partition\nPARTN=1\nPARTNAME="+label+"\n"), 0o644)
	}
	add("vda1", "esp-a")
	add("vda2", StatePart)
	add("vda3", WorkPart)
	add("sda1", "../../../etc/passwd")
	add("sda2", "backup")
	if err := linkPartitions(sys, links, "/dev"); err != nil {
		t.Fatal(err)
	}
	for label, want := range map[string]string{"esp-a": "/dev/vda1", StatePart: "/dev/vda2", WorkPart: "/dev/vda3"} {
		if got, _ := os.Readlink(filepath.Join(links, label)); got != want {
			t.Errorf("%s: %q, want %q", label, got, want)
		}
	}
	if entries, _ := os.ReadDir(links); len(entries) != 3 {
		t.Errorf("%d links, want 3", len(entries))
	}
	add("sdb1", WorkPart) // a second disk claims to be the work domain's
	if err := linkPartitions(sys, links, "/dev"); err == nil {
		t.Error("no error for a label on two disks")
	}
	if got, err := os.Readlink(filepath.Join(links, WorkPart)); err == nil {
		t.Errorf("ambiguous label leads to %s", got)
	}
}

func TestAPI(t *testing.T) {
	path := filepath.Join(t.TempDir(), "init.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	offs, asks, again, staged := 0, 0, 0, ""
	srv := newServer(handler(actions{status: func() Status { return Status{State: "running"} }, powerOff: func() { offs++ },
		restart: func() { again++ }, ask: func() error { asks++; return nil },
		update: func(_ context.Context, image io.Reader, size int64) error {
			data, err := io.ReadAll(image)
			if staged = string(data); int64(len(data)) != size {
				return fmt.Errorf("%d bytes of %d", len(data), size)
			}
			return err
		},
		wake: func(context.Context) error { return errors.New("it does not sleep") }}))
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(l) }()
	defer func() { srv.Close(); <-done }()
	c := NewClient(path)
	s, raw, err := c.Status(context.Background())
	if os.Getuid() != 0 {
		if err == nil {
			t.Fatal("a user who is not root got an answer")
		}
		return
	}
	if err != nil || s.State != "running" || !json.Valid(raw) {
		t.Fatalf("%+v, %v", s, err)
	}
	if err := c.PowerOff(context.Background()); err != nil || offs != 1 {
		t.Fatalf("%v, %d power-offs", err, offs)
	}
	if err := errors.Join(c.Restart(context.Background()), c.AskUpdate(context.Background()), c.Update(context.Background(), strings.NewReader("image"), 5)); err != nil || again != 1 || asks != 1 || staged != "image" {
		t.Errorf("%v: %d restarts, %d questions, staged %q", err, again, asks, staged)
	}
	if err := c.Wake(context.Background()); err == nil || !strings.Contains(err.Error(), "does not sleep") {
		t.Errorf("wake: %v, want what init says", err)
	}
}

func TestAPIRefusesUnknownPeer(t *testing.T) {
	srv := newServer(handler(actions{status: func() Status { return Status{} }, powerOff: func() { t.Error("switched off") }}))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	resp, err := http.Post("http://"+l.Addr().String()+"/v1/poweroff", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusForbidden {
		t.Errorf("status %d, want 403", resp.StatusCode)
	}
	srv.Close()
	if err := <-done; !errors.Is(err, http.ErrServerClosed) {
		t.Error(err)
	}
}
