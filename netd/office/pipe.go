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

// Pipe is the work domain's way to an office's LAN: two packet devices, one in
// each namespace, between which this process carries packets while it is open.
// It closes by itself: with the process, which the devices do not outlive, and
// with the proof, on time and without anybody's help.
type Pipe struct {
	inner, outer Device
	until        atomic.Pointer[time.Time]
}

// NewPipe returns a closed Pipe.
func NewPipe(inner, outer Device) *Pipe { return &Pipe{inner: inner, outer: outer} }

// Open lets packets pass until a moment; the zero time closes.
func (p *Pipe) Open(until time.Time) { p.until.Store(&until) }

func (p *Pipe) open() bool {
	until := p.until.Load()
	return until != nil && !Over(*until, time.Now())
}

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
	for {
		f, err := from.Read()
		if err != nil {
			return err
		}
		if p.open() {
			_ = to.WriteFrame(f) // a device that is down loses them, as a cable would
		}
	}
}
