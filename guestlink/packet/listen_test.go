package packet

import (
	"context"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"sekisho/guestlink"
)

// restless is a listener whose guest connects, hangs up, and connects again at
// once.
type restless struct {
	count  int
	closed chan struct{}
}

func (r *restless) Accept() (net.Conn, error) {
	select {
	case <-r.closed:
		return nil, net.ErrClosed
	default:
	}
	r.count++
	ours, theirs := net.Pipe()
	theirs.Close()
	return ours, nil
}

func (r *restless) Close() error {
	select {
	case <-r.closed:
	default:
		close(r.closed)
	}
	return nil
}

func (r *restless) Addr() net.Addr { return nil }

func TestReconnectingGuestIsSlowedDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := NewHost(newMemDevice(), func(guestlink.Status) {})
		l := &restless{closed: make(chan struct{})}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute+time.Millisecond)
		defer cancel()
		changes := 0
		if err := p.Listen(ctx, l, func(bool, error) { changes++ }); err != context.DeadlineExceeded {
			t.Error(err)
		}
		want := connectBurst + int(time.Minute/connectPause)
		// At the deadline one more may be accepted, and closed before it counts.
		if l.count < want || l.count > want+2 || changes < want || changes > l.count {
			t.Errorf("%d connections and %d changes in a minute, want %d", l.count, changes, want)
		}
	})
}

func TestPacerForgives(t *testing.T) {
	var p pacer
	now := time.Now()
	for i := range 3 * connectBurst { // one now and then waits for nothing
		if d := p.next(now.Add(time.Duration(i) * connectPause)); d != 0 {
			t.Fatalf("connection %d waits %v", i, d)
		}
	}
	now = now.Add(time.Hour)
	for range connectBurst {
		if d := p.next(now); d != 0 {
			t.Fatalf("a burst waits %v", d)
		}
	}
	if d := p.next(now); d != connectPause {
		t.Errorf("beyond the burst: %v, want %v", d, connectPause)
	}
}

// TestLinkThatDoesNotEnd has a first link whose end never comes.
func TestLinkThatDoesNotEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := NewHost(newMemDevice(), func(guestlink.Status) {})
		ctx, cancel := context.WithCancel(t.Context())
		stuck, done := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(done)
			p.Listen(ctx, &restless{closed: make(chan struct{})}, func(bool, error) { <-stuck })
		}()
		synctest.Wait()
		if p.Hangs() {
			t.Error("hangs at once")
		}
		<-time.After(handoverLimit + time.Second) // of the bubble's clock
		if !p.Hangs() {
			t.Error("not noticed")
		}
		cancel()
		close(stuck)
		<-done
		if p.Hangs() {
			t.Error("hangs after its end")
		}
	})
}
