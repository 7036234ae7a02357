package serial

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"net"
	"path/filepath"
	"testing"
	"time"
)

// port returns the two ends of a port.
func port(t *testing.T) (a, b net.Conn) {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "port"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if a, err = net.Dial("unix", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if b, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

// TestSyncSkipsWhatIsStale puts bytes of an earlier session on the way, some of
// them beginnings of records, and wants the first byte of the new one.
func TestSyncSkipsWhatIsStale(t *testing.T) {
	for name, stale := range map[string][]byte{
		"nothing": nil, "half a frame": {2, 0, 5, 0x78, 0x45}, "flags": bytes.Repeat([]byte{0xff}, 5000),
		"half a record": record(7, 0)[:20], "an old record": record(7, 9), "magic twice": []byte(magic + magic),
		"much": bytes.Repeat([]byte("sekisho sync 1\n"), 5000),
	} {
		t.Run(name, func(t *testing.T) {
			a, b := port(t)
			go func() {
				a.Write(stale)
				c, err := Sync(t.Context(), a)
				if err != nil {
					t.Errorf("guest: %v", err)
					return
				}
				c.Write([]byte("first"))
			}()
			c, err := Sync(t.Context(), b)
			if err != nil {
				t.Fatal(err)
			}
			got := make([]byte, 5)
			c.SetReadDeadline(time.Now().Add(10 * time.Second))
			if _, err := io.ReadFull(c, got); err != nil || string(got) != "first" {
				t.Errorf("%q, %v", got, err)
			}
		})
	}
}

// TestRestartedEnd lets one end begin anew while the other thinks that
// they have met: it notices, begins anew too, and they meet.
func TestRestartedEnd(t *testing.T) {
	a, b := port(t)
	met := make(chan net.Conn, 2)
	go func() { c, _ := Sync(t.Context(), a); met <- c }()
	c, err := Sync(t.Context(), b)
	if err != nil {
		t.Fatal(err)
	}
	<-met
	again := make(chan error, 1)
	go func() { _, err := Sync(t.Context(), a); again <- err }()
	if _, err := c.Read(make([]byte, 1)); err != errRestarted {
		t.Fatalf("%v, want errRestarted", err)
	}
	if _, err := Sync(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	if err := <-again; err != nil {
		t.Fatal(err)
	}
}

func TestSyncEnds(t *testing.T) {
	t.Run("context", func(t *testing.T) {
		_, b := port(t)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := Sync(ctx, b); err == nil {
			t.Error("met nobody")
		}
	})
	t.Run("hang up", func(t *testing.T) {
		a, b := port(t)
		a.Close()
		if _, err := Sync(t.Context(), b); err == nil {
			t.Error("met nobody")
		}
	})
	t.Run("bytes without end", func(t *testing.T) {
		a, b := port(t)
		go func() {
			for junk := make([]byte, 64<<10); ; {
				if _, err := a.Write(junk); err != nil {
					return
				}
			}
		}()
		go io.Copy(io.Discard, a)
		if _, err := Sync(t.Context(), b); err == nil {
			t.Error("met nobody")
		}
	})
}

func TestListenerRefuses(t *testing.T) {
	inner, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	calls, refused := 0, 0
	l := NewListener(inner, func(net.Conn) bool { calls++; return calls > 1 }, func() { refused++ })
	defer l.Close()
	dial := func() net.Conn {
		c, err := net.Dial("unix", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	bad := dial()
	go Sync(t.Context(), dial())
	if _, err := l.Accept(); err != nil || refused != 1 {
		t.Fatalf("%v, %d refused", err, refused)
	}
	if _, err := bad.Read(make([]byte, 1)); err == nil {
		t.Error("the refused connection is open")
	}
}

func FuzzNext(f *testing.F) {
	f.Add([]byte("x"), uint64(3), uint64(4))
	f.Add([]byte(magic), uint64(1), uint64(0))
	f.Fuzz(func(t *testing.T, stale []byte, own, peer uint64) {
		if bytes.Contains(append(bytes.Clone(stale), magic...)[:len(stale)+len(magic)-1], []byte(magic)) {
			return // a record of its own
		}
		in := bufio.NewReader(bytes.NewReader(append(append(bytes.Clone(stale), record(own, peer)...), "rest"...)))
		from, to, skipped, err := next(in)
		if err != nil || from != own || to != peer || skipped != len(stale) {
			t.Fatalf("%d %d, %d skipped of %d, %v", from, to, skipped, len(stale), err)
		}
		if rest, _ := io.ReadAll(in); string(rest) != "rest" {
			t.Fatalf("%q is left", rest)
		}
	})
}
