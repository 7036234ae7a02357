// Package packet moves IP packets between a TUN device and a guest link, many
// to one write. Both ends run the same pump. Neither carries anything before a
// Config is known, and then only packets from and to the one inner address.
package packet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"sekisho/guestlink"
)

const (
	// handshakeTimeout bounds the exchange of hellos.
	handshakeTimeout = 5 * time.Second
	// stallTimeout is how long the other end may leave a batch unread before
	// the link is reset.
	stallTimeout = 10 * time.Second
)

// Pump carries packets of one TUN device over one link at a time.
type Pump struct {
	dev    PacketDevice
	host   bool
	apply  func(guestlink.Config) error // guest: puts a Config in force
	status func(guestlink.Status)       // host: what the guest said

	config atomic.Pointer[guestlink.Config] // nil: carry nothing
	count  counters

	mu  sync.Mutex
	out *outbox // of the link that is up, nil when none is
}

// NewHost returns the host domain's end. Status is called with what the guest
// says of itself, which may be a lie.
func NewHost(dev PacketDevice, status func(guestlink.Status)) *Pump {
	return &Pump{dev: dev, host: true, status: status}
}

// NewGuest returns the work domain's end. Apply sets the device to a Config;
// packets flow once it has returned nil.
func NewGuest(dev PacketDevice, apply func(guestlink.Config) error) *Pump {
	return &Pump{dev: dev, apply: apply}
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

// SetConfig puts c in force at the host end and tells the guest.
func (p *Pump) SetConfig(c guestlink.Config) error {
	frame, err := guestlink.AppendConfig(nil, c)
	if err != nil {
		return err
	}
	if old := p.config.Swap(&c); old != nil && old.Equal(c) {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.out != nil && !p.out.putControl(frame) {
		p.out.close() // a guest that reads nothing is reset, and gets it then
	}
	return nil
}

// Run reads the device until ctx is done or the device fails, and closes it. A
// packet that finds no link is dropped, so that nothing stale waits for one.
func (p *Pump) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { p.dev.Close() })
	defer stop()
	defer p.dev.Close()
	buf := make([]byte, guestlink.MaxPacket)
	for {
		n, err := p.dev.Read(buf)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			return fmt.Errorf("read tun device: %w", err)
		}
		if drop, ok := p.check(buf[:n], !p.host); !ok {
			p.count.dropped[drop].Add(1)
			continue
		}
		p.mu.Lock()
		out := p.out
		p.mu.Unlock()
		if out == nil || !out.put(buf[:n]) {
			p.count.dropped[DropNoLink].Add(1)
			continue
		}
		p.count.toLink.add(n)
	}
}

// check says whether a packet may be carried. It is the same at both ends:
// what leaves the guest has its inner address as source, what enters it has it
// as destination.
func (p *Pump) check(packet []byte, fromGuest bool) (Drop, bool) {
	c := p.config.Load()
	if c == nil {
		return DropNoConfig, false
	}
	src, dst, err := guestlink.ParseIP(packet)
	switch {
	case err != nil:
		return DropMalformed, false
	case fromGuest && src != c.Address.Addr():
		return DropSource, false
	case !fromGuest && dst != c.Address.Addr():
		return DropDestination, false
	}
	return 0, true
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

	frames := guestlink.NewReader(conn)
	if err := handshake(conn, frames); err != nil {
		return fmt.Errorf("handshake: %w", err)
	}
	p.count.links.Add(1)

	out, err := p.attach()
	if err != nil {
		return err
	}
	up()
	written := make(chan error, 1)
	go func() {
		written <- write(conn, out)
		conn.Close() // ends the reader below
	}()
	err = p.read(frames, out)
	conn.Close()
	p.detach(out)
	if werr := <-written; werr != nil && guestlink.ReasonOf(err) == guestlink.ReasonNone {
		err = werr
	}
	return err
}

// attach makes the outbox of a new link and queues what the other end must
// know first.
func (p *Pump) attach() (*outbox, error) {
	out := newOutbox()
	p.mu.Lock()
	defer p.mu.Unlock()
	var frame []byte
	var err error
	if c := p.config.Load(); !p.host {
		frame, err = guestlink.AppendStatus(nil, guestlink.Status{})
	} else if c != nil {
		frame, err = guestlink.AppendConfig(nil, *c)
	}
	if err != nil {
		return nil, err
	}
	if frame != nil {
		out.putControl(frame)
	}
	p.out = out
	return out, nil
}

func (p *Pump) detach(out *outbox) {
	out.close()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.out == out {
		p.out = nil
	}
}

func handshake(conn net.Conn, frames *guestlink.Reader) error {
	own := guestlink.Hello{Version: guestlink.Version}
	if err := conn.SetDeadline(time.Now().Add(handshakeTimeout)); err != nil {
		return err
	}
	if _, err := conn.Write(guestlink.AppendHello(nil, own)); err != nil {
		return err
	}
	f, err := frames.Next()
	if err != nil {
		return err
	}
	if f.Type != guestlink.TypeHello {
		return &guestlink.FrameError{Reason: guestlink.ReasonOrder, Type: f.Type, Length: len(f.Payload)}
	}
	other, err := guestlink.ParseHello(f.Payload)
	if err != nil {
		return err
	}
	if _, err := guestlink.Agree(own, other); err != nil {
		return err
	}
	return conn.SetDeadline(time.Time{})
}

// write sends batches until the outbox is closed or the other end stalls.
func write(conn net.Conn, out *outbox) error {
	defer out.close()
	spare := make([]byte, 0, guestlink.MaxBatch)
	for {
		batch := out.take(spare)
		if batch == nil {
			return nil
		}
		if err := conn.SetWriteDeadline(time.Now().Add(stallTimeout)); err != nil {
			return err
		}
		if _, err := conn.Write(batch); err != nil {
			return fmt.Errorf("write to link: %w", err)
		}
		spare = batch
	}
}

// read takes frames until the link ends or a frame breaks the protocol.
func (p *Pump) read(frames *guestlink.Reader, out *outbox) error {
	for {
		f, err := frames.Next()
		if err != nil {
			return err
		}
		switch {
		case f.Type == guestlink.TypePacket:
			if err := p.deliver(f.Payload); err != nil {
				return err
			}
		case f.Type == guestlink.TypeConfig && !p.host:
			c, err := guestlink.ParseConfig(f.Payload)
			if err != nil {
				return err
			}
			if err := p.configure(c, out); err != nil {
				return err
			}
		case f.Type == guestlink.TypeStatus && p.host:
			s, err := guestlink.ParseStatus(f.Payload)
			if err != nil {
				return err
			}
			p.status(s)
		default:
			return &guestlink.FrameError{Reason: guestlink.ReasonOrder, Type: f.Type, Length: len(f.Payload)}
		}
	}
}

// deliver gives a packet to the device. A packet that the device refuses is
// lost, as on any network; a device that is gone is an error.
func (p *Pump) deliver(packet []byte) error {
	if drop, ok := p.check(packet, p.host); !ok {
		p.count.dropped[drop].Add(1)
		return nil
	}
	if _, err := p.dev.Write(packet); err != nil {
		if errors.Is(err, os.ErrClosed) {
			return fmt.Errorf("write tun device: %w", err)
		}
		p.count.dropped[DropDevice].Add(1)
		return nil
	}
	p.count.fromLink.add(len(packet))
	return nil
}

// configure applies c at the guest end and reports how it went.
func (p *Pump) configure(c guestlink.Config, out *outbox) error {
	s := guestlink.Status{State: guestlink.StateConfigured, Detail: c.Address.String()}
	p.config.Store(nil) // nothing is carried while the device changes
	if err := p.apply(c); err != nil {
		s = guestlink.Status{State: guestlink.StateFailed, Detail: err.Error()}
	} else {
		p.config.Store(&c)
	}
	frame, err := guestlink.AppendStatus(nil, s)
	if err != nil {
		return err
	}
	if !out.putControl(frame) {
		return errors.New("host does not read its status frames")
	}
	return nil
}
