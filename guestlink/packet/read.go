package packet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync/atomic"

	"sekisho/guestlink"
)

// Run reads the device until ctx is done or the device fails, and closes it. A
// packet that finds no link is dropped, so that nothing stale waits for one.
func (p *Pump) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { p.dev.Close() })
	defer stop()
	defer p.dev.Close()
	const at = guestlink.HeaderSize
	buf := make([]byte, largeSlot)
	idle := func() bool {
		l := p.current()
		return l != nil && l.flush()
	}
	for {
		l := p.current()
		var n int
		var err error
		switch {
		case p.offload != nil && (l == nil || l.has(guestlink.CapOffload)):
			if n, err = p.offload.ReadOffload(buf[at:], idle); err == nil {
				p.sendOffload(&buf, n)
			}
		case p.batch != nil:
			var packets [][]byte
			packets, err = p.batch.ReadBatch()
			for _, b := range packets {
				copy(buf[at:], b)
				p.send(&buf, guestlink.TypePacket, buf[at:at+len(b)], len(b), true)
			}
			idle()
		default:
			if n, err = p.dev.Read(buf[at:]); err == nil {
				p.send(&buf, guestlink.TypePacket, buf[at:at+n], n, false)
			}
		}
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, os.ErrClosed) || (err != nil && p.batch == nil):
			return fmt.Errorf("read tun device: %w", err)
		case err != nil: // a packet that the device's library cannot segment
			p.count.dropInto[DropDevice].Add(1)
		}
	}
}

// sendOffload queues a packet with its virtio-net header, n bytes together,
// that lies in buf behind the place of a frame header.
func (p *Pump) sendOffload(buf *[]byte, n int) {
	const at = guestlink.HeaderSize
	b := (*buf)[at : at+n]
	packet := b[guestlink.VirtioHeaderSize:]
	if guestlink.Plain(b) {
		copy(b, packet) // 10 bytes down: the frame of a small packet stays whole
		p.send(buf, guestlink.TypePacket, b[:len(packet)], len(packet), true)
		return
	}
	if c := p.config.Load(); c != nil {
		if _, err := guestlink.CheckOffload(b, c.MTU); err != nil {
			p.count.dropInto[DropOffload].Add(1)
			return
		}
	}
	p.send(buf, guestlink.TypeOffload, packet, n, true)
}

// send queues the frame of typ whose payload, n bytes, lies in buf behind the
// place of its header. A long frame is not copied: buf is exchanged. With more,
// the caller flushes the link soon.
func (p *Pump) send(buf *[]byte, typ guestlink.Type, packet []byte, n int, more bool) {
	if drop, ok := p.check(packet, !p.host); !ok {
		p.count.dropInto[drop].Add(1)
		return
	}
	l := p.current()
	if l == nil {
		p.count.dropInto[DropNoLink].Add(1)
		return
	}
	if typ == guestlink.TypeOffload && !l.has(guestlink.CapOffload) {
		p.count.dropInto[DropOffload].Add(1)
		return
	}
	frame := guestlink.HeaderSize + n
	s := p.pool.get(frame)
	for s == nil && l.evict() {
		s = p.pool.get(frame)
	}
	if s == nil || guestlink.PutHeader(*buf, typ, n) != nil {
		p.count.dropInto[DropQueue].Add(1)
		if s != nil {
			p.pool.put(s)
		}
		return
	}
	if len(s.buf) == largeSlot {
		s.buf, *buf = *buf, s.buf
	} else {
		copy(s.buf, (*buf)[:frame])
	}
	s.n, s.size = frame, len(packet)
	if !l.put(s, packet, more) {
		p.pool.put(s)
		p.count.dropInto[DropNoLink].Add(1)
	}
}

// check says whether a packet may be carried. It is the same at both ends:
// what leaves the guest has an inner address as source, what enters it has one
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
	case fromGuest && !c.Holds(src):
		return DropSource, false
	case !fromGuest && !c.Holds(dst):
		return DropDestination, false
	}
	switch p.Policy.Judge(packet) {
	case guestlink.VerdictCarry:
		return 0, true
	case guestlink.VerdictOptions:
		return DropOptions, false
	case guestlink.VerdictExtension:
		return DropExtension, false
	case guestlink.VerdictNeighbour:
		return DropNeighbour, false
	}
	return DropFragment, false
}

// reader takes frames off one link.
type reader struct {
	p      *Pump
	l      *link
	frames *guestlink.Reader
	conn   *watchedConn
	batch  [][]byte // packets that wait for one WriteBatch
	bytes  int      // in batch

	answered, asked atomic.Int64 // nanoseconds of the link's clock
	token           atomic.Uint64
}

// run takes frames until the link ends or a frame breaks the protocol.
func (r *reader) run() error {
	for {
		if !r.frames.Buffered() {
			if err := r.flush(); err != nil {
				return err
			}
		}
		f, err := r.frames.Next()
		if err == nil && f.Type != guestlink.TypePacket {
			err = r.flush()
		}
		if err == nil {
			r.conn.reads.Add(1)
			err = r.frame(f)
		}
		if err != nil {
			r.flush()
			return err
		}
	}
}

// watchedConn notes when a frame that has begun does not end. A deadline for
// each read would say the same, at the price of two timers for every frame.
type watchedConn struct {
	net.Conn
	frames  *guestlink.Reader
	partial atomic.Bool   // the read that waits is one for the rest of a frame
	reads   atomic.Uint64 // frames taken: while it moves, nothing stalls
}

func (c *watchedConn) Read(b []byte) (int, error) {
	if on := c.frames.Partial(); on != c.partial.Load() {
		c.partial.Store(on)
	}
	return c.Conn.Read(b)
}

func (r *reader) frame(f guestlink.Frame) error {
	p := r.p
	order := &guestlink.FrameError{Reason: guestlink.ReasonOrder, Type: f.Type, Length: len(f.Payload)}
	switch f.Type {
	case guestlink.TypePacket:
		return r.packet(f.Payload)
	case guestlink.TypeOffload:
		if !r.l.has(guestlink.CapOffload) {
			return order
		}
		return r.offload(f.Payload)
	case guestlink.TypeConfig:
		if p.host {
			return order
		}
		c, err := guestlink.ParseConfig(f.Payload)
		if err != nil {
			return err
		}
		return p.configure(c, r.l)
	case guestlink.TypeStatus:
		if !p.host {
			return order
		}
		s, err := guestlink.ParseStatus(f.Payload)
		if err != nil {
			return err
		}
		p.status(s)
		return nil
	case guestlink.TypeProbe:
		if !r.l.has(guestlink.CapProbe) {
			return order
		}
		return r.probe(f.Payload)
	case guestlink.TypeTime:
		if p.host || p.SetTime == nil || !r.l.has(guestlink.CapTime) {
			return order
		}
		t, err := guestlink.ParseTime(f.Payload)
		if err != nil {
			return err
		}
		if err := p.SetTime(t); err != nil {
			return r.answer(guestlink.AppendStatus(nil, guestlink.Status{State: guestlink.StateConfigured, Detail: "set time: " + err.Error()}))
		}
		return nil
	case guestlink.TypePower:
		if !r.l.has(guestlink.CapPower) {
			return order
		}
		return r.power(f.Payload, order)
	}
	return order
}

// packet gives a packet to the device, at once or with the others that have
// arrived. A packet that the device refuses is lost, as on any network; a
// device that is gone is an error.
func (r *reader) packet(b []byte) error {
	p := r.p
	if drop, ok := p.check(b, p.host); !ok {
		p.count.dropFrom[drop].Add(1)
		return nil
	}
	if p.batch != nil {
		r.batch = append(r.batch, b)
		r.bytes += len(b)
		return nil
	}
	_, err := p.dev.Write(b)
	return r.wrote(len(b), err)
}

func (r *reader) offload(b []byte) error {
	p := r.p
	c := p.config.Load()
	if c == nil {
		p.count.dropFrom[DropNoConfig].Add(1)
		return nil
	}
	packet, err := guestlink.CheckOffload(b, c.MTU)
	if err != nil {
		p.count.dropFrom[DropOffload].Add(1)
		return nil
	}
	if drop, ok := p.check(packet, p.host); !ok {
		p.count.dropFrom[drop].Add(1)
		return nil
	}
	_, err = p.offload.WriteOffload(b)
	return r.wrote(len(packet), err)
}

func (r *reader) wrote(n int, err error) error {
	switch {
	case err == nil:
		r.p.count.fromLink.add(n)
	case errors.Is(err, os.ErrClosed):
		return fmt.Errorf("write tun device: %w", err)
	default:
		r.p.count.dropFrom[DropDevice].Add(1)
	}
	return nil
}

// flush writes the packets that wait for the device.
func (r *reader) flush() error {
	if len(r.batch) == 0 {
		return nil
	}
	lost, err := r.p.batch.WriteBatch(r.batch)
	carried := len(r.batch) - lost
	r.p.count.fromLink.packets.Add(uint64(carried))
	if lost == 0 {
		r.p.count.fromLink.bytes.Add(uint64(r.bytes))
	} else {
		r.p.count.dropFrom[DropDevice].Add(uint64(lost))
	}
	r.batch, r.bytes = r.batch[:0], 0
	if errors.Is(err, os.ErrClosed) {
		return fmt.Errorf("write tun device: %w", err)
	}
	return nil
}

func (r *reader) probe(b []byte) error {
	probe, err := guestlink.ParseProbe(b)
	if err != nil {
		return err
	}
	if !probe.Answer {
		probe.Answer = true
		return r.answer(guestlink.AppendProbe(nil, probe), nil)
	}
	if probe.Token == r.token.Load() {
		now := r.l.now()
		r.answered.Store(now)
		r.p.rtt.Store(now - r.asked.Load())
	}
	return nil
}

func (r *reader) power(b []byte, order error) error {
	p := r.p
	m, err := guestlink.ParsePower(b)
	switch {
	case err != nil:
		return err
	case p.host == (m.Answer == "") || (!p.host && p.Power == nil):
		return order
	case p.host:
		// One answer for each question, or a guest could fill the log.
		if m.ID != 0 && p.powerAsked.CompareAndSwap(m.ID, 0) && p.PowerAnswer != nil {
			p.PowerAnswer(m)
		}
		return nil
	}
	m.Answer = guestlink.AnswerAccepted
	if err := p.Power(m.Action); err != nil {
		m.Answer, m.Detail = guestlink.AnswerRefused, err.Error()
	}
	return r.answer(guestlink.AppendPower(nil, m))
}

// answer queues a control frame.
func (r *reader) answer(frame []byte, err error) error {
	if err != nil {
		return err
	}
	if !r.l.putControl(frame) {
		return errors.New("the other end does not read its control frames")
	}
	return nil
}

// configure applies c at the guest end and reports how it went.
func (p *Pump) configure(c guestlink.Config, l *link) error {
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
	if !l.putControl(frame) {
		return errors.New("host does not read its status frames")
	}
	return nil
}
