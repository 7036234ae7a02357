package packet

import (
	"context"
	"net"
	"time"
)

const (
	// connectBurst is how many connections in a row a guest may make at once,
	// and connectPause what each further one costs it: every one is a line in
	// the log and a change of status.
	connectBurst = 8
	connectPause = time.Second
	// handoverLimit is how long the end of a link that was told to end may take.
	handoverLimit = 30 * time.Second
)

// pacer bounds the connections of a guest that connects again and again: a
// leaky bucket of connectBurst. The zero value is full.
type pacer struct{ due time.Time }

// next takes note of a connection at now and returns how long the next one has
// to wait.
func (p *pacer) next(now time.Time) time.Duration {
	if early := now.Add(-connectBurst * connectPause); p.due.Before(early) {
		p.due = early
	}
	p.due = p.due.Add(connectPause)
	return max(0, p.due.Sub(now))
}

// Hangs reports whether Listen waits for a link that does not end.
func (p *Pump) Hangs() bool {
	since := p.handover.Load()
	return since != nil && p.Now().Sub(*since) > handoverLimit
}

// Listen serves the connections of l, one at a time: a new connection ends the
// one before it, because the guest opens one only when it has lost the last.
// A guest that connects in a loop has to wait. It returns when l fails or ctx is
// done, and closes l. Changed is called with
// true when a link is up and with false and the cause when a connection ends.
func (p *Pump) Listen(ctx context.Context, l net.Listener, changed func(up bool, cause error)) error {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	defer l.Close()
	end := func() {}
	defer func() { end() }()
	var pace pacer
	for {
		conn, err := l.Accept()
		if ctx.Err() != nil {
			if conn != nil {
				conn.Close()
			}
			return ctx.Err()
		}
		if err != nil {
			return err
		}
		end()
		linkCtx, cancel := context.WithCancel(ctx)
		done := make(chan struct{})
		end = func() {
			now := p.Now()
			p.handover.Store(&now)
			defer p.handover.Store(nil)
			cancel()
			<-done
		}
		go func() {
			defer close(done)
			changed(false, p.Serve(linkCtx, conn, func() { changed(true, nil) }))
		}()
		select {
		case <-ctx.Done(): // seen above, once the listener is closed
		case <-time.After(pace.next(time.Now())):
		}
	}
}
