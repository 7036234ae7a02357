package office

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"sekisho/netd/tunnel"
)

// end is one end of a pipe: what is sent to in comes out of Read.
type end struct {
	in      chan tunnel.Frame
	closed  chan struct{}
	written atomic.Int64
}

func newEnd() *end { return &end{in: make(chan tunnel.Frame), closed: make(chan struct{})} }

func (e *end) Read() (tunnel.Frame, error) {
	select {
	case f := <-e.in:
		return f, nil
	case <-e.closed:
		return nil, errors.New("closed")
	}
}

func (e *end) WriteFrame(tunnel.Frame) error { e.written.Add(1); return nil }
func (e *end) Close() error                  { close(e.closed); return nil }

// TestPipe: packets pass while the proof holds and its link is the same, and
// not one does after either has ended, whatever was waiting.
func TestPipe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in, out := newEnd(), newEnd()
		p := NewPipe(in, out)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- p.Run(ctx) }()
		passes := func(want bool) {
			t.Helper()
			before := out.written.Load()
			in.in <- tunnel.Frame{}
			synctest.Wait()
			if got := out.written.Load() > before; got != want {
				t.Errorf("passes %v, want %v", got, want)
			}
		}
		same := true
		still := func() bool { return same }
		passes(false)
		p.Open(time.Now().Add(time.Second), still)
		passes(true)
		same = false
		time.Sleep(lookEvery) // of the bubble's clock
		passes(false)
		passes(false)
		same = true
		passes(true)
		time.Sleep(time.Second)
		passes(false)
		p.Open(time.Now().Add(time.Second), still)
		passes(true)
		p.Open(time.Time{}, nil)
		passes(false)
		cancel()
		<-done
	})
}
