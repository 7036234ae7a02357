// Package packet moves IP packets between a TUN device and a guest link, many
// to one write. Both ends run the same pump. Neither carries anything before a
// Config is known, and then only packets from and to the one inner address.
package packet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"sekisho/guestlink"
)

const (
	// handshakeTimeout bounds the exchange of hellos.
	handshakeTimeout = 5 * time.Second
	// stallTimeout is how long the other end may leave a batch unread, or a
	// frame unfinished, before the link is reset.
	stallTimeout = 10 * time.Second
	// probeEvery is the time between questions whether the other end runs, and
	// silentTimeout how long it may leave them unanswered.
	probeEvery    = 5 * time.Second
	silentTimeout = 30 * time.Second
	// timeEvery is the number of probes from one time frame to the next.
	timeEvery = 6
)

// Pump carries packets of one TUN device over one link at a time. Fields may be
// set before Run and Serve.
type Pump struct {
	// Policy is applied to packets of both directions.
	Policy guestlink.Policy
	// SetTime takes the host's time at the guest end; nil: not offered.
	SetTime func(time.Time) error
	// Power does what the host asks at the guest end; nil: not offered.
	Power func(guestlink.Action) error
	// PowerAnswer is told the guest's answers at the host end.
	PowerAnswer func(guestlink.Power)
	// Now is the clock that the host end tells the guest.
	Now func() time.Time

	dev     PacketDevice
	batch   BatchDevice   // dev, if it is one
	offload OffloadDevice // likewise
	host    bool
	apply   func(guestlink.Config) error // guest: puts a Config in force
	status  func(guestlink.Status)       // host: what the guest said
	offer   guestlink.Hello
	every   time.Duration // probeEvery
	silent  time.Duration // silentTimeout
	stall   time.Duration // stallTimeout

	config  atomic.Pointer[guestlink.Config] // nil: carry nothing
	count   counters
	pool    pool
	rtt     atomic.Int64 // nanoseconds, of the last probe
	powerID atomic.Uint32
	// powerAsked is the last question that waits for its answer, 0: none.
	powerAsked atomic.Uint32

	handover atomic.Pointer[time.Time] // since when Listen waits for a link to end

	mu   sync.Mutex
	link *link // the one that is up, nil when none is
}

// link is one connection after its handshake.
type link struct {
	*queue
	agreed guestlink.Hello
}

func (l *link) has(c guestlink.Capabilities) bool { return l.agreed.Capabilities.Has(c) }

func newPump(dev PacketDevice) *Pump {
	p := &Pump{dev: dev, every: probeEvery, silent: silentTimeout, stall: stallTimeout, Now: time.Now}
	p.batch, _ = dev.(BatchDevice)
	p.offload, _ = dev.(OffloadDevice)
	p.offer = guestlink.Hello{
		Version: guestlink.Version, Batch: guestlink.MaxBatch, Queues: 1, Capabilities: guestlink.CapProbe | guestlink.CapAddress6,
	}
	if p.offload != nil {
		p.offer.Capabilities |= guestlink.CapOffload
	}
	return p
}

// NewHost returns the host domain's end. Status is called with what the guest
// says of itself, which may be a lie.
func NewHost(dev PacketDevice, status func(guestlink.Status)) *Pump {
	p := newPump(dev)
	p.host, p.status, p.Policy = true, status, guestlink.DefaultPolicy()
	p.offer.Capabilities |= guestlink.CapTime | guestlink.CapPower
	return p
}

// NewGuest returns the work domain's end. Apply sets the device to a Config;
// packets flow once it has returned nil. What is unusual is left to the host's
// policy.
func NewGuest(dev PacketDevice, apply func(guestlink.Config) error) *Pump {
	p := newPump(dev)
	p.apply, p.Policy = apply, guestlink.Policy{Fragments: true, Options: true, Extensions: true}
	return p
}

// Counters returns what p has done so far.
func (p *Pump) Counters() Counters { return p.count.snapshot() }

// Config returns the Config in force and false when there is none.
func (p *Pump) Config() (guestlink.Config, bool) {
	c := p.config.Load()
	if c == nil {
		return guestlink.Config{}, false
	}
	return *c, true
}

// Link returns what is in force on the link and the round-trip time of the last
// probe, and false when no link is up.
func (p *Pump) Link() (agreed guestlink.Hello, rtt time.Duration, up bool) {
	l := p.current()
	if l == nil {
		return guestlink.Hello{}, 0, false
	}
	return l.agreed, time.Duration(p.rtt.Load()), true
}

func (p *Pump) current() *link {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.link
}

// SetConfig puts c in force at the host end and tells the guest.
func (p *Pump) SetConfig(c guestlink.Config) error {
	if err := c.Validate(); err != nil {
		return err
	}
	if old := p.config.Swap(&c); old != nil && old.Equal(c) {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.link == nil {
		return nil
	}
	frame, err := p.link.config(nil, c)
	if err != nil {
		return err
	}
	if !p.link.putControl(frame) {
		p.link.close() // a guest that reads nothing is reset, and gets it then
	}
	return nil
}

// config appends a config frame with what the guest understands of c.
func (l *link) config(dst []byte, c guestlink.Config) ([]byte, error) {
	if !l.has(guestlink.CapAddress6) {
		c.Address6 = netip.Prefix{}
	}
	return guestlink.AppendConfig(dst, c)
}

// ErrNoPower is a guest that is not linked, or does not take power requests.
var ErrNoPower = errors.New("the work domain takes no power requests now")

// RequestPower asks the guest for an action. Its answer goes to PowerAnswer.
func (p *Pump) RequestPower(a guestlink.Action) (id uint32, err error) {
	l := p.current()
	if l == nil || !l.has(guestlink.CapPower) {
		return 0, ErrNoPower
	}
	id = p.powerID.Add(1)
	frame, err := guestlink.AppendPower(nil, guestlink.Power{ID: id, Action: a})
	if err != nil {
		return 0, err
	}
	p.powerAsked.Store(id)
	if !l.putControl(frame) {
		return 0, ErrNoPower
	}
	return id, nil
}

// Serve runs the link over conn until it ends, ctx is done or the other end
// breaks the protocol, and closes conn. It never returns nil. Up is called once
// the hellos agree. One link at a time: the caller waits for one Serve before
// the next.
func (p *Pump) Serve(ctx context.Context, conn net.Conn, up func()) (err error) {
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	defer func() {
		if r := guestlink.ReasonOf(err); r != guestlink.ReasonNone {
			p.count.bad[r].Add(1)
		}
		if ctx.Err() != nil {
			err = ctx.Err()
		}
	}()

	watched := &watchedConn{Conn: conn}
	frames := guestlink.NewReader(watched)
	watched.frames = frames
	agreed, err := p.handshake(conn, frames)
	if err != nil {
		return fmt.Errorf("handshake: %w", err)
	}
	p.count.links.Add(1)

	l, err := p.attach(agreed, newDirectWriter(conn))
	if err != nil {
		return err
	}
	up()
	var wg sync.WaitGroup
	var mu sync.Mutex
	var cause error // the first end that is not the reader's
	run := func(f func() error) {
		wg.Go(func() {
			err := f()
			mu.Lock()
			if cause == nil {
				cause = err
			}
			mu.Unlock()
			conn.Close() // ends the reader below
		})
	}
	reader := &reader{p: p, l: l, frames: frames, conn: watched}
	keepCtx, cancel := context.WithCancel(ctx)
	run(func() error { return p.write(conn, l) })
	run(func() error { return p.keep(keepCtx, l, reader) })
	err = reader.run()
	conn.Close()
	cancel()
	p.detach(l)
	wg.Wait()
	if cause != nil && guestlink.ReasonOf(err) == guestlink.ReasonNone {
		err = cause
	}
	return err
}

// attach makes the queue of a new link and puts there what the other end must
// know first.
func (p *Pump) attach(agreed guestlink.Hello, direct *directWriter) (*link, error) {
	l := &link{agreed: agreed, queue: newQueue(&p.pool, direct, int(agreed.Batch),
		func(int) { p.count.dropInto[DropQueue].Add(1) }, p.count.toLink.add)}
	p.rtt.Store(0)
	p.mu.Lock()
	defer p.mu.Unlock()
	var frames []byte
	var err error
	if c := p.config.Load(); !p.host {
		frames, err = guestlink.AppendStatus(nil, guestlink.Status{})
	} else if c != nil {
		frames, err = l.config(nil, *c)
	}
	if err == nil && p.host && l.has(guestlink.CapTime) {
		frames, err = guestlink.AppendTime(frames, p.Now())
	}
	if err != nil {
		return nil, err
	}
	if len(frames) > 0 {
		l.putControl(frames)
	}
	p.link = l
	return l, nil
}

func (p *Pump) detach(l *link) {
	l.close()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.link == l {
		p.link = nil
	}
}

func (p *Pump) handshake(conn net.Conn, frames *guestlink.Reader) (guestlink.Hello, error) {
	own := p.offer
	if p.SetTime != nil {
		own.Capabilities |= guestlink.CapTime
	}
	if p.Power != nil {
		own.Capabilities |= guestlink.CapPower
	}
	if err := conn.SetDeadline(time.Now().Add(handshakeTimeout)); err != nil {
		return guestlink.Hello{}, err
	}
	if _, err := conn.Write(guestlink.AppendHello(nil, own)); err != nil {
		return guestlink.Hello{}, err
	}
	f, err := frames.Next()
	if err != nil {
		return guestlink.Hello{}, err
	}
	if f.Type != guestlink.TypeHello {
		return guestlink.Hello{}, &guestlink.FrameError{Reason: guestlink.ReasonOrder, Type: f.Type, Length: len(f.Payload)}
	}
	other, err := guestlink.ParseHello(f.Payload)
	if err != nil {
		return guestlink.Hello{}, err
	}
	agreed, err := guestlink.Agree(own, other)
	if err != nil {
		return guestlink.Hello{}, err
	}
	return agreed, conn.SetDeadline(time.Time{})
}

// write sends batches until the queue is closed or the other end stalls.
func (p *Pump) write(conn net.Conn, l *link) error {
	defer l.close()
	buffer := make([]byte, 0, guestlink.MaxBatch)
	for {
		batch, own := l.take(buffer)
		if batch == nil {
			return nil
		}
		err := conn.SetWriteDeadline(time.Now().Add(p.stall))
		if err == nil {
			_, err = conn.Write(batch)
		}
		if own != nil {
			p.pool.put(own)
		}
		l.written()
		if err != nil {
			return fmt.Errorf("write to link: %w", err)
		}
	}
}

// Ends of a link whose other end is connected and does not go on.
var (
	errSilent = fmt.Errorf("probes are not answered: %w", os.ErrDeadlineExceeded)
	errHalf   = fmt.Errorf("a frame has begun and does not end: %w", os.ErrDeadlineExceeded)
)

// keep sends probes, and the time from the host's end, and ends with errSilent
// when the other end leaves them unanswered, or with errHalf when a frame does
// not end.
func (p *Pump) keep(ctx context.Context, l *link, r *reader) error {
	stalls := time.NewTicker(p.stall / 4)
	defer stalls.Stop()
	var probes <-chan time.Time
	if l.has(guestlink.CapProbe) {
		t := time.NewTicker(p.every)
		defer t.Stop()
		probes = t.C
		if err := p.ask(l, r, 1); err != nil {
			return err
		}
		r.answered.Store(l.now())
	}
	var moved int64 // when the frames were last seen to move
	var reads uint64
	for token := uint64(2); ; {
		select {
		case <-ctx.Done():
			return nil
		case <-stalls.C:
			n := r.conn.reads.Load()
			if !r.conn.partial.Load() || n != reads || moved == 0 {
				reads, moved = n, l.now()
			} else if l.now()-moved >= int64(p.stall) {
				return errHalf
			}
		case <-probes:
			if l.now()-r.answered.Load() > int64(p.silent) {
				return errSilent
			}
			if err := p.ask(l, r, token); err != nil {
				return err
			}
			token++
		}
	}
}

// ask sends a probe, and the host's time with every sixth.
func (p *Pump) ask(l *link, r *reader, token uint64) (err error) {
	frame := guestlink.AppendProbe(nil, guestlink.Probe{Token: token})
	if p.host && l.has(guestlink.CapTime) && token%timeEvery == 0 {
		if frame, err = guestlink.AppendTime(frame, p.Now()); err != nil {
			return err
		}
	}
	r.asked.Store(l.now())
	r.token.Store(token)
	l.putControl(frame) // full: the other end reads nothing, and write ends
	return nil
}
