package office

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"sekisho/netd/tunnel"
)

// Device is one end of a Pipe: a tunnel.Device.
type Device interface {
	Read() (tunnel.Frame, error)
	WriteFrame(tunnel.Frame) error
	Close() error
}

// lookEvery is how long an answer of an opening's still holds while packets
// pass. In less, no cable is moved from one LAN into another.
const lookEvery = 5 * time.Millisecond

// Pipe is the work domain's way to an office's LAN: two packet devices, one in
// each namespace, between which this process carries packets while it is open.
// It closes by itself: with the process, which the devices do not outlive, with
// the proof, on time and without anybody's help, and with the cable through
// which the proof came, even if this process stood still when that was pulled.
type Pipe struct {
	inner, outer Device
	opening      atomic.Pointer[opening]
}

// opening is until when packets pass, and whether the LAN is still the same.
type opening struct {
	until time.Time
	still func() bool
}

// NewPipe returns a closed Pipe.
func NewPipe(inner, outer Device) *Pipe { return &Pipe{inner: inner, outer: outer} }

// Open lets packets pass until a moment, as long as still says that the link is
// the one that was proven; the zero time closes.
func (p *Pipe) Open(until time.Time, still func() bool) { p.opening.Store(&opening{until, still}) }

// Run carries packets until ctx is done or a device fails, and closes both.
func (p *Pipe) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := context.AfterFunc(ctx, func() { p.inner.Close(); p.outer.Close() })
	defer stop()
	var both sync.WaitGroup
	both.Go(func() { cancel(p.carry(p.inner, p.outer)) })
	both.Go(func() { cancel(p.carry(p.outer, p.inner)) })
	<-ctx.Done()
	both.Wait()
	return context.Cause(ctx)
}

func (p *Pipe) carry(from, to Device) error {
	var seen *opening
	var looked time.Time
	for {
		f, err := from.Read()
		if err != nil {
			return err
		}
		o, now := p.opening.Load(), time.Now()
		if o == nil || Over(o.until, now) {
			continue
		}
		if o != seen || now.Sub(looked) >= lookEvery {
			if seen = nil; !o.still() {
				continue
			}
			seen, looked = o, now
		}
		_ = to.WriteFrame(f) // a device that is down loses them, as a cable would
	}
}
