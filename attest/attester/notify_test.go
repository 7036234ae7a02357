package attester_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/attest/attester"
	"sekisho/attest/gate"
)

// manager is a service manager's end of the notify socket.
type manager struct {
	t    *testing.T
	conn *net.UnixConn
}

func newManager(t *testing.T) *manager {
	t.Helper()
	dir, err := os.MkdirTemp("", "notify") // a short path (unix(7))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "sock")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	t.Setenv("WATCHDOG_USEC", "20000")
	t.Setenv("WATCHDOG_PID", strconv.Itoa(os.Getpid()))
	return &manager{t, c}
}

// next returns the next message, or "" if none comes within d.
func (m *manager) next(d time.Duration) string {
	m.t.Helper()
	m.conn.SetReadDeadline(time.Now().Add(d))
	buf := make([]byte, 4096)
	n, err := m.conn.Read(buf)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return ""
	}
	if err != nil {
		m.t.Fatal(err)
	}
	return string(buf[:n])
}

// TestHungTPM has a TPM whose first command never returns: attestd is ready,
// answers, lives for as long as a slow TPM may take, and then gives no sign of
// life any more.
func TestHungTPM(t *testing.T) {
	m := newManager(t)
	s := newSite(t, writeFile(t, newCA(t, "some vendor").pem()), time.Minute)
	var late atomic.Int64
	asked, release := make(chan struct{}, 1), make(chan struct{})
	a, err := attester.New(attester.Config{
		Organization: s.organization(), State: newState(t, attest.Ticket{}),
		OpenTPM: func() (attester.Hardware, error) {
			select {
			case asked <- struct{}{}:
			default: // asked again at the test's end
			}
			<-release
			return nil, errors.New("the end of the test")
		},
		Now: func() time.Time { return time.Now().Add(time.Duration(late.Load())) }, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer close(release)
	defer cancel()
	wg.Go(func() { a.Run(ctx) })
	<-asked
	wg.Go(func() { a.Notify(ctx) })
	if got := m.next(10 * time.Second); !strings.HasPrefix(got, "READY=1\nSTATUS=") {
		t.Fatalf("first message %q", got)
	}
	if st := a.Status(); st.State != gate.StateAttesting {
		t.Errorf("status %+v", st)
	}
	late.Store(int64(time.Minute))
	for range 3 {
		if got := m.next(10 * time.Second); got != "WATCHDOG=1" {
			t.Fatalf("while the TPM is slow: %q", got)
		}
	}
	late.Store(int64(time.Hour))
	// What was sent before may still be there; then half a second of silence,
	// 25 times the watchdog.
	for n := 0; m.next(500*time.Millisecond) != ""; n++ {
		if n == 100 {
			t.Fatal("a hung attester goes on to say that it lives")
		}
	}
}

// TestTPMWithoutPermission has a TPM that is root's.
func TestTPMWithoutPermission(t *testing.T) {
	s := newSite(t, writeFile(t, newCA(t, "some vendor").pem()), time.Minute)
	open := func() (attester.Hardware, error) { return nil, fmt.Errorf("tpm: %w", fs.ErrPermission) }
	p := newLaptop(t, s, machine{boot: image.Boot(), open: open}, newState(t, attest.Ticket{}))
	st, _ := p.until(func(st gate.Status) bool { return st.Reason != "" })
	if st.Reason != attest.ReasonTPMFault.String() || !strings.HasPrefix(st.Detail, "No permission to open the TPM") || !strings.Contains(st.Detail, "権限がありません") {
		t.Errorf("status: %+v", st)
	}
}
