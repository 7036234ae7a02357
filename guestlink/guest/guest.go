// Package guest is the work domain's end of the guest link: it dials the host
// domain, again and again, and sets the TUN device to what the host says.
package guest

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"net"
	"time"

	"sekisho/guestlink/packet"
)

// Back-off between attempts to reach the host domain. The host's end is on the
// same machine, so the longest wait is short.
const (
	firstWait   = 100 * time.Millisecond
	longestWait = 5 * time.Second
	stableRun   = 10 * time.Second // a link that lasted this long resets the wait
)

// Agent dials and serves until its context is done.
type Agent struct {
	Dial func(context.Context) (net.Conn, error)
	Pump *packet.Pump
	Log  *slog.Logger
	// State is told "waiting" and "linked" at every change.
	State func(string)
}

// Run serves the link and returns when ctx is done or the device fails.
func (a *Agent) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	device := make(chan struct{})
	go func() {
		defer close(device)
		cancel(a.Pump.Run(ctx))
	}()
	for wait := firstWait; ctx.Err() == nil; {
		a.State("waiting")
		began := time.Now()
		conn, err := a.Dial(ctx)
		if err == nil {
			err = a.Pump.Serve(ctx, conn, func() { a.State("linked") })
		}
		if ctx.Err() != nil {
			break
		}
		if time.Since(began) > stableRun {
			wait = firstWait
		}
		a.Log.Warn("no link", "cause", err, "next_attempt_in", wait)
		select {
		case <-ctx.Done():
		case <-time.After(wait + rand.N(wait/4)):
		}
		wait = min(2*wait, longestWait)
	}
	cancel(nil)
	<-device
	return context.Cause(ctx)
}
