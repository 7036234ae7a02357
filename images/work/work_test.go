package work

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// event is a struct input_event.
func event(typ, code uint16, value uint32) []byte {
	b := make([]byte, 16, inputEventSize)
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = binary.NativeEndian.AppendUint16(b, code)
	return binary.NativeEndian.AppendUint32(b, value)
}

func TestReadPowerKey(t *testing.T) {
	press, release, sync, other := event(evKey, keyPower, 1), event(evKey, keyPower, 0), event(0, 0, 0), event(evKey, 30, 1)
	for name, c := range map[string]struct {
		in   []byte
		want bool
	}{
		"nothing":   {nil, false},
		"pressed":   {press, true},
		"later":     {bytes.Join([][]byte{sync, other, release, press}, nil), true},
		"released":  {release, false},
		"other key": {other, false},
		"cut short": {press[:23], false},
	} {
		if err := readPowerKey(bytes.NewReader(c.in)); (err == nil) != c.want {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzReadPowerKey(f *testing.F) {
	f.Add(event(evKey, keyPower, 1))
	f.Fuzz(func(t *testing.T, in []byte) {
		if readPowerKey(bytes.NewReader(in)) == nil && len(in) < inputEventSize {
			t.Error("a key in less than one event")
		}
	})
}

func TestFindPowerButton(t *testing.T) {
	dir := t.TempDir()
	if _, err := findPowerButton(dir); err == nil {
		t.Error("found one in an empty directory")
	}
	for name, content := range map[string]string{"event0": "AT keyboard\n", "event1": "Power Button\n"} {
		d := filepath.Join(dir, name, "device")
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(d, "name"), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := findPowerButton(dir); err != nil || got != "/dev/input/event1" {
		t.Errorf("got %q, %v", got, err)
	}
}

func TestBackOff(t *testing.T) {
	now := time.Unix(1000, 0)
	v := &service{started: now}
	var got []time.Duration
	for range 7 {
		v.ended(now)
		got = append(got, v.delay)
	}
	want := []time.Duration{500e6, 1e9, 2e9, 4e9, 8e9, 10e9, 10e9}
	for i := range want {
		if got[i] != want[i] {
			t.Fatalf("got %v, want %v", got, want)
		}
	}
	if v.ended(now.Add(maxDelay)); v.delay != minDelay {
		t.Errorf("after a long run: %v", v.delay)
	}
}

// TestSupervisor runs real processes: one that ends at once and must be
// started again, one that must end by SIGTERM.
func TestSupervisor(t *testing.T) {
	dir := t.TempDir()
	marks := filepath.Join(dir, "marks")
	childEnded := make(chan os.Signal, 1)
	signal.Notify(childEnded, unix.SIGCHLD)
	defer signal.Stop(childEnded)
	s := supervisor{
		log: slog.New(slog.NewTextHandler(io.Discard, nil)),
		services: []*service{
			{args: []string{"/bin/sh", "-c", "echo x >> " + marks + "; if [ $(wc -l < " + marks + ") -ge 2 ]; then kill -USR1 " + "$PPID; fi"}},
			{args: []string{"/bin/sh", "-c", "while :; do read x < /dev/zero; done"}},
			{args: []string{filepath.Join(dir, "absent")}},
		},
		childEnded: childEnded, now: time.Now,
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGUSR1) // the second start tells
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second) // seen: 0.6 s
	defer cancel()
	s.run(ctx)
	if err := context.Cause(ctx); err == context.DeadlineExceeded {
		t.Error("the service was not started a second time")
	}
	data, err := os.ReadFile(marks)
	if err != nil || strings.Count(string(data), "x") < 2 {
		t.Errorf("starts: %q, %v", data, err)
	}
	if s.running() {
		t.Error("a service is left running")
	}
}
