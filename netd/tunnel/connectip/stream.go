package connectip

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"sekisho/netd"
)

const (
	// probeEvery is how long a client is silent, or hears nothing, before it
	// asks for a sign of life.
	probeEvery = 3 * time.Second
	// DeadAfter is how long a stream may bring nothing at all, or block a
	// write, before it is given up. A peer whose client probes is never silent
	// for that long.
	DeadAfter = 9 * time.Second
	// lingering is how long a stream that was replaced may still bring packets.
	lingering = 2 * time.Second
	// queueLimit bounds the bytes that wait for the peer; packets beyond are
	// dropped, which tells the inner TCP to slow down.
	queueLimit = 256 << 10
	// batchLimit bounds the packets handed over at once.
	batchLimit = 128
)

var (
	// ErrDead is returned by Run when the peer was silent or stuck for DeadAfter.
	ErrDead = errors.New("peer is silent")
	// ErrExpired is returned by Run when the certificate's life is over.
	ErrExpired = errors.New("certificate has lapsed")
	// errReplaced ends the lingering of a retired stream.
	errReplaced = errors.New("replaced by a newer session")
)

// Stream carries capsules over one TLS connection; both ends use it. Packets
// are queued by Send and written in as few TLS records as they fit.
type Stream struct {
	conn *tls.Conn
	scan *scanner

	// OnPackets is called with received packets, valid until it returns. It
	// returns how many of them it refused.
	OnPackets func(packets [][]byte) (refused int)
	// OnAssign and OnRequest are called for ADDRESS_ASSIGN and ADDRESS_REQUEST
	// capsules; an error ends the stream. Either may be nil.
	OnAssign  func(netip.Prefix) error
	OnRequest func(ids []uint64) error
	// Probe makes this end ask for signs of life: the client's part.
	Probe bool

	out outbox

	sentPackets, sentBytes, receivedPackets, receivedBytes, dropped atomic.Uint64
	heard, said                                                     atomic.Int64 // time of the last read and write, nanoseconds since start
	start                                                           time.Time
	retired                                                         atomic.Bool
	flushed                                                         chan struct{} // closed when a retired stream has sent its last
}

// NewStream returns a stream over conn. buffered holds what was read from conn
// beyond the HTTP upgrade. Set the callbacks, then call Run.
func NewStream(conn *tls.Conn, buffered []byte) *Stream {
	return &Stream{conn: conn, scan: newScanner(buffered), out: outbox{wake: make(chan struct{}, 1)}, start: time.Now(), flushed: make(chan struct{})}
}

// Send queues packets for the peer and never blocks. What does not fit in the
// queue is dropped and counted.
func (s *Stream) Send(packets ...[]byte) {
	n, bytes := s.out.packets(packets)
	s.sentPackets.Add(uint64(n))
	s.sentBytes.Add(uint64(bytes))
	s.dropped.Add(uint64(len(packets) - n))
}

// Assign queues an ADDRESS_ASSIGN capsule that gives inner, in answer to each
// of ids (RFC 9484, section 4.7.2); 0 answers nobody.
func (s *Stream) Assign(inner netip.Addr, ids ...uint64) {
	var list []address
	for _, id := range ids {
		list = append(list, address{id, netip.PrefixFrom(inner, inner.BitLen())})
	}
	s.out.control(appendAddresses(nil, capsuleAddressAssign, list...))
}

// AdvertiseEverything queues a ROUTE_ADVERTISEMENT capsule for all of IPv4.
func (s *Stream) AdvertiseEverything() { s.out.control(appendEveryRoute(nil)) }

// Retire tells the stream that another has taken its place: what is queued is
// still sent, what the peer sent is still received, then it ends.
func (s *Stream) Retire() {
	s.retired.Store(true)
	s.out.close()
}

// Counters returns what the stream has carried.
func (s *Stream) Counters() netd.Counters {
	return netd.Counters{
		SentPackets: s.sentPackets.Load(), SentBytes: s.sentBytes.Load(),
		ReceivedPackets: s.receivedPackets.Load(), ReceivedBytes: s.receivedBytes.Load(),
		Dropped: s.dropped.Load(),
	}
}

// Run carries capsules until ctx is done, until comes, or either end fails,
// and closes the connection. It always returns an error.
func (s *Stream) Run(ctx context.Context, until time.Time) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var parts sync.WaitGroup
	parts.Go(func() { cancel(s.receive(ctx)) })
	parts.Go(func() {
		if err := s.transmit(ctx, until); err != nil {
			cancel(err)
		}
	})
	<-ctx.Done()
	s.conn.NetConn().Close() // not tls.Conn.Close, which waits for a stuck write
	parts.Wait()
	return context.Cause(ctx)
}

func (s *Stream) receive(ctx context.Context) error {
	var batch [][]byte
	for first := true; ; first = false {
		if !first { // the scanner may hold whole capsules already
			s.conn.SetReadDeadline(time.Now().Add(DeadAfter))
			n, err := s.conn.Read(s.scan.free())
			if errors.Is(err, os.ErrDeadlineExceeded) {
				return fmt.Errorf("%w: nothing received for %v", ErrDead, DeadAfter)
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
			s.heard.Store(int64(time.Since(s.start)))
		}
		batch = batch[:0]
		for {
			kind, v, ok, err := s.scan.next()
			if err != nil {
				return fmt.Errorf("receive: %w", err)
			}
			if !ok {
				break
			}
			if kind == capsuleDatagram {
				context, n := varint(v)
				if n == 0 || context != 0 || len(v) == n {
					s.dropped.Add(1) // another context is not ours to understand (RFC 9484, section 6)
					continue
				}
				if batch = append(batch, v[n:]); len(batch) == batchLimit {
					s.deliver(batch)
					batch = batch[:0]
				}
				continue
			}
			if err := s.control(kind, v); err != nil {
				return err
			}
		}
		if len(batch) > 0 {
			s.deliver(batch)
		}
	}
}

func (s *Stream) deliver(batch [][]byte) {
	var bytes int
	for _, p := range batch {
		bytes += len(p)
	}
	s.receivedPackets.Add(uint64(len(batch)))
	s.receivedBytes.Add(uint64(bytes))
	s.dropped.Add(uint64(s.OnPackets(batch)))
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
		for _, a := range list {
			if err := s.OnAssign(a.Prefix); err != nil {
				return err
			}
		}
	case kind == capsuleAddressRequest && s.OnRequest != nil:
		if len(list) == 0 {
			return errors.New("address request without an entry") // RFC 9484, section 4.7.2
		}
		var ids []uint64
		for _, a := range list {
			ids = append(ids, a.ID)
		}
		return s.OnRequest(ids)
	}
	return nil
}

// transmit writes the queue, probes, and watches the end of the certificate.
// It returns nil if the stream has been retired and its reader shall end it.
func (s *Stream) transmit(ctx context.Context, until time.Time) error {
	tick := time.NewTicker(probeEvery / 3)
	defer tick.Stop()
	expiry := time.NewTimer(time.Until(until))
	defer expiry.Stop()
	var probes uint64
	var spare []byte
	for {
		var now time.Time
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-expiry.C:
			return fmt.Errorf("%w: at %s", ErrExpired, until.UTC().Format(time.RFC3339))
		case now = <-tick.C:
			// The timer above does not see the wall clock jump or a suspended machine.
			if now.Round(0).After(until) {
				return fmt.Errorf("%w: at %s", ErrExpired, until.UTC().Format(time.RFC3339))
			}
			quiet := time.Since(s.start) - probeEvery
			if s.Probe && (quiet > time.Duration(s.heard.Load()) || quiet > time.Duration(s.said.Load())) {
				probes++
				s.out.control(appendAddresses(nil, capsuleAddressRequest, address{probes, netip.PrefixFrom(netip.IPv4Unspecified(), 32)}))
			}
		case <-s.out.wake:
		}
		data, closed := s.out.take(spare)
		if len(data) > 0 {
			s.conn.SetWriteDeadline(time.Now().Add(DeadAfter))
			if _, err := s.conn.Write(data); errors.Is(err, os.ErrDeadlineExceeded) {
				return fmt.Errorf("%w: takes nothing for %v", ErrDead, DeadAfter)
			} else if err != nil {
				return fmt.Errorf("send: %w", err)
			}
			s.said.Store(int64(time.Since(s.start)))
			spare = data
		} else {
			spare = nil // idle: thousands of streams shall not hold buffers
		}
		if closed {
			s.conn.CloseWrite()
			close(s.flushed)
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(lingering):
				return errReplaced
			}
		}
	}
}

// outbox is the queue of one stream, in the form in which it goes out.
type outbox struct {
	mu     sync.Mutex
	data   []byte
	closed bool
	wake   chan struct{}
}

// packets appends as capsules what fits, and returns how many packets and how
// many of their bytes that was.
func (o *outbox) packets(list [][]byte) (n, bytes int) {
	o.mu.Lock()
	if !o.closed {
		for _, p := range list {
			if len(p) > MaxPacket || len(o.data)+len(p)+packetOverhead > queueLimit {
				continue
			}
			o.data = appendPacket(o.data, p)
			n++
			bytes += len(p)
		}
	}
	o.mu.Unlock()
	o.signal()
	return n, bytes
}

// control appends a capsule that is not dropped: the peer's own requests bound
// them, and a peer that asks without reading is cut at twice the limit.
func (o *outbox) control(capsule []byte) {
	o.mu.Lock()
	if !o.closed && len(o.data) < 2*queueLimit {
		o.data = append(o.data, capsule...)
	}
	o.mu.Unlock()
	o.signal()
}

// take returns all that is queued and goes on with spare as the next buffer.
func (o *outbox) take(spare []byte) (data []byte, closed bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	data, o.data = o.data, spare[:0]
	return data, o.closed
}

func (o *outbox) close() {
	o.mu.Lock()
	o.closed = true
	o.mu.Unlock()
	o.signal()
}

func (o *outbox) signal() {
	select {
	case o.wake <- struct{}{}:
	default:
	}
}
