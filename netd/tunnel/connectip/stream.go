package connectip

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"sekisho/netd"
	"sekisho/netd/tunnel"
)

const (
	// probeBusy and probeIdle are how long a client hears nothing before it asks
	// for a sign of life: while packets went either way lately, and otherwise.
	probeBusy = time.Second
	probeIdle = 10 * time.Second
	busyFor   = 30 * time.Second
	// SuspectAfter is how long a client's question may stay without an answer,
	// and nothing else be heard, before the path is suspected: 2.5 s at most
	// after the last packet of a path in use.
	SuspectAfter = 1250 * time.Millisecond
	// DeadAfter is how long a question may stay unanswered, or a write be
	// stuck, before the session is given up.
	DeadAfter = 9 * time.Second
	// gatewayDead is how long a gateway hears nothing before it gives up: a
	// client in order is never silent for that long.
	gatewayDead = probeIdle + DeadAfter
	// Beat is how often Tick wants to be called.
	Beat = 250 * time.Millisecond
	// lingering is how long a stream that was replaced may still bring packets.
	lingering = 2 * time.Second
	// longestPacket is more than any QUIC packet on an Ethernet path, in bytes.
	longestPacket = 1500
	// batchLimit bounds the packets handed over at once.
	batchLimit = 128
)

var (
	// ErrDead is returned by Run when the peer was silent or stuck.
	ErrDead = errors.New("peer is silent")
	// ErrExpired is returned by Run when the certificate's life is over.
	ErrExpired = errors.New("certificate has lapsed")
	// errReplaced ends the lingering of a retired stream.
	errReplaced = errors.New("ended in order, or replaced by a newer session")
)

// carriage is what carries a stream's capsules: TLS on TCP, or HTTP/3.
type carriage interface {
	// Read reads from the stream of capsules; wait returns when it would not
	// wait. Read may call idle, on its own goroutine, before it waits all the same.
	Read(b []byte) (int, error)
	wait() error
	setIdle(idle func())
	// datagrams calls deliver with packets that came beside the stream, until
	// there will be no more. It returns nil if there never are any.
	datagrams(ctx context.Context, deliver func([][]byte)) error
	// send sends whole capsules. What it cannot send is lost; how many packets
	// that were, it returns. most is how many bytes the path takes in queueTime.
	send(capsules []byte, most int) (lost int, err error)
	// finish says that nothing more is sent, where that lets the peer end too.
	finish()
	// close ends everything at once.
	close()
	// sample measures the path.
	sample() Sample
	// lanes is how many goroutines may send at once: 2 if packets by themselves
	// can pass what is on the stream.
	lanes() int
}

// Stream carries capsules over one connection; both ends use it. Packets are
// queued by Send and written in as few TLS records, or QUIC packets, as they fit.
type Stream struct {
	by   carriage
	scan *scanner

	// OnPackets is called with received packets, valid until it returns. It
	// returns how many of them it refused. It may be called from two goroutines.
	OnPackets func(packets [][]byte) (refused int)
	// OnTrain is called with a received train, likewise. Its Check is the
	// callee's. Nil refuses trains.
	OnTrain func(tunnel.Frame) error
	// OnAssign and OnRequest are called for ADDRESS_ASSIGN and ADDRESS_REQUEST
	// capsules; an error ends the stream. Either may be nil.
	OnAssign  func([]netip.Prefix) error
	OnRequest func([]Request) error
	// Probe makes this end ask for signs of life: the client's part.
	Probe bool
	// Trains says that the peer takes trains.
	Trains bool

	out     outbox
	quick   *outbox // packets that go by themselves; nil where all go one way
	until   time.Time
	start   time.Time
	cancel  atomic.Pointer[context.CancelCauseFunc]
	probes  uint64      // sent; Tick's
	suspect atomic.Bool // a question is unanswered for SuspectAfter

	sentPackets, sentBytes, receivedPackets, receivedBytes, dropped atomic.Uint64

	// pad makes questions and answers as long as packets get: by HTTP/3 short ones
	// would pass where long ones are swallowed.
	pad bool

	// Times since start, in nanoseconds: of the last bytes heard (by a client: on
	// the stream), of the last packet either way, of the question that is
	// unanswered (or 0), and of the last long write on an HTTP/3 stream that the
	// peer's acknowledgements made room for.
	heard, active, asked, moved atomic.Int64

	retired atomic.Bool
	flushed chan struct{} // closed when a retired stream has sent its last
}

// Request is one entry of an ADDRESS_REQUEST capsule.
type Request = address

// scanBuffers are shared by all streams of the process.
var scanBuffers sync.Pool

// newStream returns a stream over by that ends at until. buffered holds what
// was read beyond the HTTP upgrade. Set the callbacks, then call Run.
func newStream(by carriage, buffered []byte, until time.Time) *Stream {
	s := &Stream{
		by: by, scan: newScanner(&scanBuffers, buffered), until: until, start: time.Now(),
		out: outbox{most: queueFirst}, flushed: make(chan struct{}),
	}
	if by.lanes() > 1 {
		s.quick = &outbox{most: queueFirst}
	}
	return s
}

func (s *Stream) now() int64 { return int64(time.Since(s.start)) }

// Send queues a frame for the peer and never blocks. What does not fit in the
// queue is dropped and counted. It returns false if the stream has been retired.
func (s *Stream) Send(f tunnel.Frame) bool {
	out := &s.out
	if s.quick != nil && !f.TCP() && !carriesTCP(f.Packet()) {
		out = s.quick
	}
	taken, bytes, dropped, open := out.frame(f, s.Trains)
	if !open {
		return false
	}
	s.active.Store(s.now())
	s.sentPackets.Add(uint64(taken))
	s.sentBytes.Add(uint64(bytes))
	s.dropped.Add(uint64(dropped))
	return true
}

// Assign queues an ADDRESS_ASSIGN capsule that gives all of inner, in answer to
// the requests (RFC 9484, section 4.7.2).
func (s *Stream) Assign(inner []netip.Addr, answers ...Request) {
	var list []address
	for _, a := range inner {
		entry := address{Prefix: netip.PrefixFrom(a, a.BitLen())}
		for _, r := range answers {
			if r.Prefix.Addr().Is4() == a.Is4() {
				entry.ID = r.ID
				list = append(list, entry)
			}
		}
		if entry.ID == 0 {
			list = append(list, entry)
		}
	}
	s.out.control(appendAddresses(s.padding(), capsuleAddressAssign, list...))
}

// AdvertiseEverything queues a ROUTE_ADVERTISEMENT capsule for all of the
// families that inner has.
func (s *Stream) AdvertiseEverything(inner []netip.Addr) {
	var v4, v6 bool
	for _, a := range inner {
		v4, v6 = v4 || a.Is4(), v6 || a.Is6()
	}
	s.out.control(appendEveryRoute(nil, v4, v6))
}

// Retire tells the stream that another has taken its place: what is queued is
// still sent, what the peer sent is still received, then it ends.
func (s *Stream) Retire() {
	s.retired.Store(true)
	if s.quick != nil {
		s.quick.close()
	}
	s.out.close()
}

// End closes the stream at once; Run returns why.
func (s *Stream) End(why error) {
	if cancel := s.cancel.Load(); cancel != nil {
		(*cancel)(why)
	}
}

// Close closes a stream that does not Run.
func (s *Stream) Close() { s.by.close() }

// Suspect reports whether the peer leaves a question unanswered for
// SuspectAfter and nothing else is heard of it.
func (s *Stream) Suspect() bool { return s.suspect.Load() }

// Sample measures the path.
func (s *Stream) Sample() Sample {
	p := s.by.sample()
	p.Carried = s.sentBytes.Load() + s.receivedBytes.Load()
	p.Dropped = s.dropped.Load()
	return p
}

// Counters returns what the stream has carried.
func (s *Stream) Counters() netd.Counters {
	return netd.Counters{
		SentPackets: s.sentPackets.Load(), SentBytes: s.sentBytes.Load(),
		ReceivedPackets: s.receivedPackets.Load(), ReceivedBytes: s.receivedBytes.Load(),
		Dropped: s.dropped.Load(),
	}
}

// Run carries capsules until ctx is done, Tick or End ends it, or either end
// fails, and closes the connection. It always returns an error.
func (s *Stream) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s.cancel.Store(&cancel)
	var parts sync.WaitGroup
	defer parts.Wait()
	parts.Add(1)
	context.AfterFunc(ctx, func() { s.by.close(); parts.Done() }) // which ends what waits for the peer
	parts.Go(func() {
		if err := s.by.datagrams(ctx, func(packets [][]byte) {
			if !s.Probe { // a client goes by the stream, where a lost packet shows
				s.heard.Store(s.now())
			}
			s.deliver(packets)
		}); err != nil {
			cancel(fmt.Errorf("receive: %w", err))
		}
	})
	for _, out := range []*outbox{&s.out, s.quick} {
		if out == nil {
			continue
		}
		out.run(func() {
			parts.Go(func() {
				if err := s.transmit(ctx, out); err != nil {
					cancel(err)
				}
			})
		})
		defer out.stop()
	}
	cancel(s.receive(ctx))
	return context.Cause(ctx)
}

// Tick judges signs of life and the end of the certificate. Its owner calls it
// every Beat, on one goroutine.
func (s *Stream) Tick() {
	if s.cancel.Load() == nil {
		return // not running yet
	}
	if now := time.Now().Round(0); now.After(s.until) { // the wall clock, which jumps and goes on in suspend
		s.End(fmt.Errorf("%w: at %s", ErrExpired, s.until.UTC().Format(time.RFC3339)))
		return
	}
	now, heard, asked := s.now(), s.heard.Load(), s.asked.Load()
	if !s.Probe {
		if silent := time.Duration(now - heard); silent > gatewayDead {
			s.End(fmt.Errorf("%w: nothing received for %v", ErrDead, silent.Round(time.Second)))
		}
		return
	}
	if asked != 0 && heard >= asked {
		asked = 0
		s.asked.Store(0)
		s.suspect.Store(false)
	}
	every := probeBusy
	if s.idle() {
		every = probeIdle
	}
	switch waited := time.Duration(now - asked); {
	case asked == 0:
		if time.Duration(now-heard) >= every {
			s.ask()
			s.asked.Store(now)
		}
	case waited > DeadAfter:
		s.End(fmt.Errorf("%w: no answer for %v", ErrDead, waited.Round(time.Second)))
	case waited > SuspectAfter && time.Duration(now-s.moved.Load()) > SuspectAfter: // or it waits behind bulk on a slow path
		s.suspect.Store(true)
		s.ask() // the first question may have been lost
	}
}

// ask queues a question that every conforming proxy must answer (RFC 9484,
// section 4.7.2).
func (s *Stream) ask() {
	s.probes++
	s.out.control(appendAddresses(s.padding(), capsuleAddressRequest, address{s.probes, netip.PrefixFrom(netip.IPv4Unspecified(), 32)}))
}

// padding is what stands before a question or an answer: capsules that fill a
// packet, where that tells something and somebody uses the tunnel.
func (s *Stream) padding() []byte {
	if !s.pad || s.idle() {
		return nil
	}
	return appendCapsule(nil, capsulePadding, make([]byte, longestPacket))
}

// idle reports whether nobody has used the tunnel for busyFor.
func (s *Stream) idle() bool { return s.now()-s.active.Load() >= int64(busyFor) }

func (s *Stream) receive(ctx context.Context) error {
	var packets [][]byte
	var failed error
	// take hands on every whole capsule that was read.
	take := func() {
		packets = packets[:0]
		for failed == nil {
			kind, v, ok, err := s.scan.next()
			if err != nil {
				failed = fmt.Errorf("receive: %w", err)
			}
			if err != nil || !ok {
				break
			}
			switch kind {
			case capsuleDatagram:
				context, n := varint(v)
				if n == 0 || context != 0 || len(v) == n {
					s.dropped.Add(1) // another context is not ours to understand (RFC 9484, section 6)
					continue
				}
				if packets = append(packets, v[n:]); len(packets) < batchLimit {
					continue
				}
			case capsuleTrain:
				s.deliver(packets) // in order
				s.train(v)
				packets = packets[:0]
				continue
			default:
				failed = s.control(kind, v)
				continue
			}
			s.deliver(packets)
			packets = packets[:0]
		}
		s.deliver(packets)
		packets = packets[:0]
	}
	s.by.setIdle(take)
	for {
		take()
		if failed != nil {
			return failed
		}
		s.scan.rest()
		var n int
		err := s.by.wait()
		if err == nil {
			n, err = s.by.Read(s.scan.free())
		}
		if errors.Is(err, io.EOF) {
			s.Retire() // the peer is through, and still takes what is queued for it
		}
		if err != nil {
			if s.retired.Load() {
				select {
				case <-s.flushed:
				case <-ctx.Done():
				}
				return errReplaced
			}
			return fmt.Errorf("receive: %w", err)
		}
		s.scan.fed(n)
		s.heard.Store(s.now())
	}
}

func (s *Stream) deliver(batch [][]byte) {
	if len(batch) == 0 {
		return
	}
	var bytes int
	for _, p := range batch {
		bytes += len(p)
	}
	s.active.Store(s.now())
	s.receivedPackets.Add(uint64(len(batch)))
	s.receivedBytes.Add(uint64(bytes))
	s.dropped.Add(uint64(s.OnPackets(batch)))
}

func (s *Stream) train(f tunnel.Frame) {
	if s.OnTrain == nil || len(f) <= tunnel.FrameHeader {
		s.dropped.Add(1)
		return
	}
	s.active.Store(s.now())
	s.receivedPackets.Add(1)
	s.receivedBytes.Add(uint64(len(f.Packet())))
	if s.OnTrain(f) != nil {
		s.dropped.Add(1)
	}
}

func (s *Stream) control(kind uint64, v []byte) error {
	if kind == capsuleRouteAdvertisement {
		return nil // the route inside is the plan's: everything, or nothing
	}
	list, err := parseAddresses(v)
	if err != nil {
		return err
	}
	switch {
	case kind == capsuleAddressAssign && s.OnAssign != nil:
		if len(list) == 0 {
			return errors.New("gateway took the inner address back")
		}
		var inner []netip.Prefix
		for _, a := range list {
			inner = append(inner, a.Prefix)
		}
		return s.OnAssign(inner)
	case kind == capsuleAddressRequest && s.OnRequest != nil:
		if len(list) == 0 {
			return errors.New("address request without an entry") // RFC 9484, section 4.7.2
		}
		return s.OnRequest(list)
	}
	return nil
}

// transmit writes a queue. It returns nil when nothing is queued, and an error
// when the stream has been retired for long enough.
func (s *Stream) transmit(ctx context.Context, out *outbox) error {
	for {
		data, most, closed := out.take()
		if data != nil {
			from := time.Now()
			n := len(*data)
			lost, err := s.by.send(*data, most)
			*data = (*data)[:0]
			outBuffers.Put(data)
			if err != nil {
				return fmt.Errorf("send: %w", err)
			}
			s.dropped.Add(uint64(lost))
			out.took(n, time.Since(from))
		}
		if closed && out == &s.out {
			s.by.finish()
			close(s.flushed)
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(lingering):
				return errReplaced
			}
		}
		if data == nil {
			return nil
		}
	}
}
