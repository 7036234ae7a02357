package fprint

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"sekisho/hostos/login/fprint/fprinttest"
)

// need skips t unless it runs as root with SEKISHO_TEST=all; then the programs
// must be there.
func need(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 || os.Getenv("SEKISHO_TEST") != "all" {
		t.Skip("starts a bus and fprintd of its own: runs only as root with SEKISHO_TEST=all")
	}
	for _, p := range []string{busProgram, readerProgram} {
		if _, err := exec.LookPath(p); err != nil {
			t.Fatal(err)
		}
	}
}

// desk is a reader, and somebody who puts fingers on it.
type desk struct {
	*Reader
	t      *testing.T
	socket string
	told   chan Feedback
	took   []time.Duration // from each picture to its verdict
}

func newDesk(t *testing.T, prints map[string][]byte) *desk {
	t.Helper()
	dir := t.TempDir()
	socket := filepath.Join(dir, "reader")
	r, err := Start(t.Context(), Config{Dir: filepath.Join(dir, "run"), Env: []string{"FP_VIRTUAL_IMAGE=" + socket}}, prints)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Log(err)
		}
	})
	return &desk{Reader: r, t: t, socket: socket, told: make(chan Feedback, 64)}
}

func (d *desk) tell(f Feedback) { d.told <- f }

// press puts a picture on the reader.
func (d *desk) press(do func(net.Conn) error) {
	d.t.Helper()
	conn, err := net.Dial("unix", d.socket)
	if err != nil {
		d.t.Fatal(err)
	}
	defer conn.Close()
	if err := do(conn); err != nil {
		d.t.Fatal(err)
	}
}

// await waits until the person is told want.
func (d *desk) await(ctx context.Context, want Feedback) {
	d.t.Helper()
	for {
		select {
		case f := <-d.told:
			if f == want {
				return
			}
		case <-ctx.Done():
			d.t.Fatalf("was never told %d", want)
		}
	}
}

func (d *desk) finger(f fprinttest.Finger, touch uint64) {
	d.press(func(c net.Conn) error { return fprinttest.Put(c, f.Picture(touch)) })
}

// enrol goes through all stages of an enrolment.
func (d *desk) enrol(ctx context.Context, user, name string, f fprinttest.Finger) {
	d.t.Helper()
	done := make(chan error, 1)
	go func() { done <- d.Enrol(ctx, user, name, d.tell) }()
	d.await(ctx, Touch)
	for touch := uint64(1); ; touch++ {
		d.finger(f, touch)
		for {
			select {
			case err := <-done:
				if err != nil {
					d.t.Fatal(err)
				}
				return
			case got := <-d.told:
				if got != Stage && got != Again {
					continue
				}
			case <-ctx.Done():
				d.t.Fatal("enrolment did not end")
			}
			break
		}
	}
}

func (d *desk) verify(ctx context.Context, user string, f fprinttest.Finger, touch uint64) error {
	d.t.Helper()
	done := make(chan error, 1)
	go func() { done <- d.Verify(ctx, user, d.tell) }()
	d.await(ctx, Touch)
	begin := time.Now()
	d.finger(f, touch)
	err := <-done
	d.took = append(d.took, time.Since(begin))
	return err
}

// A real fprintd on a private bus, with libfprint's virtual reader: fingers are
// enrolled, told apart, kept over a restart, deleted.
func TestFprintd(t *testing.T) {
	need(t)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	d := newDesk(t, nil)
	const taro, hanako = 1, 2
	if err := d.Verify(ctx, "taro", d.tell); !errors.Is(err, ErrNoPrints) {
		t.Errorf("verify without a finger: %v", err)
	}
	d.enrol(ctx, "taro", "right-index-finger", taro)
	for touch := range uint64(5) {
		if err := d.verify(ctx, "taro", taro, 100+touch); err != nil {
			t.Errorf("touch %d of the enrolled finger: %v", touch, err)
		}
		if err := d.verify(ctx, "taro", hanako+fprinttest.Finger(touch), 200+touch); !errors.Is(err, ErrNoMatch) {
			t.Errorf("touch %d of another finger: %v", touch, err)
		}
	}
	slices.Sort(d.took)
	t.Logf("from picture to verdict, %d touches: median %v, at most %v", len(d.took), d.took[len(d.took)/2], d.took[len(d.took)-1])
	d.enrol(ctx, "taro", "left-index-finger", hanako)
	if list, err := d.Fingers(ctx, "taro"); err != nil || len(list) != 2 {
		t.Errorf("fingers %v, %v", list, err)
	}
	prints, err := d.Prints()
	if err != nil || len(prints) != 2 {
		t.Fatalf("%d templates, %v", len(prints), err)
	}
	size := 0
	for _, p := range prints {
		size += len(p)
	}
	t.Logf("two templates: %d bytes", size)
	again := newDesk(t, prints)
	for _, f := range []fprinttest.Finger{taro, hanako} {
		if err := again.verify(ctx, "taro", f, 300); err != nil {
			t.Errorf("after a restart, finger %d: %v", f, err)
		}
	}
	if err := again.Delete(ctx, "taro", "left-index-finger"); err != nil {
		t.Error(err)
	}
	if err := again.verify(ctx, "taro", hanako, 301); !errors.Is(err, ErrNoMatch) {
		t.Errorf("a deleted finger: %v", err)
	}
}

// A picture that is no good is told and asks for another; one that nobody
// touches ends with its context, and the reader is free again.
func TestFeedback(t *testing.T) {
	need(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	d := newDesk(t, nil)
	d.enrol(ctx, "taro", "right-index-finger", 1)
	done := make(chan error, 1)
	go func() { done <- d.Verify(ctx, "taro", d.tell) }()
	d.await(ctx, Touch)
	d.press(fprinttest.Retry)
	d.await(ctx, Again)
	d.finger(1, 9)
	if err := <-done; err != nil {
		t.Errorf("after a second touch: %v", err)
	}
	short, stop := context.WithCancel(ctx)
	go func() { done <- d.Verify(short, "taro", d.tell) }()
	d.await(ctx, Touch)
	stop()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("nobody touched: %v", err)
	}
	if err := d.verify(ctx, "taro", 1, 10); err != nil {
		t.Errorf("the next touch: %v", err)
	}
}
