package connectip

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"sekisho/netd/tunnel"
)

// streamChunk is how much of the stream is read at once while little comes
// there, in bytes: an idle session holds no more.
const streamChunk = 512

// quic-go holds 32 datagrams for a stream's reader and drops the next without a
// word (streamDatagramQueueLen, quic-go's http3), so that bursts of many lose
// packets on a perfect path, and more of them on a busy machine. What goes as
// datagrams therefore keeps below that: burst of them at once and then
// perSecond, which is a video call. Inner TCP goes so only in small batches. The
// rest goes on the request's stream, as capsules: there nothing is dropped, and
// long runs of packets are encrypted and sent together.
const (
	burst     = 16
	perSecond = 1000
	// smallBatch bounds a small batch in bytes.
	smallBatch = 12 << 10
	// longWrite is about how much goes on the stream in one write, in bytes.
	longWrite = 16 << 10 // a train is one write, however long
)

// heldDatagrams bounds the packets that wait for the TUN device.
const heldDatagrams = 1024

// QUICConfig is that of both ends.
func QUICConfig() *quic.Config {
	return &quic.Config{
		EnableDatagrams:      true,
		HandshakeIdleTimeout: openTimeout / 2,
		MaxIdleTimeout:       gatewayDead,
		// The least that QUIC works on (RFC 9000, section 14): a path may be narrow.
		// The true size is found by probing.
		InitialPacketSize: 1200,
		// One request, and the three streams of HTTP/3's own (RFC 9114, section 6.2).
		MaxIncomingStreams:             4,
		MaxIncomingUniStreams:          8,
		InitialStreamReceiveWindow:     64 << 10,
		MaxStreamReceiveWindow:         4 << 20, // TCP's too is some MiB (tcp(7), tcp_rmem)
		InitialConnectionReceiveWindow: 96 << 10,
		MaxConnectionReceiveWindow:     5 << 20,
	}
}

// requestStream is what both ends of an HTTP/3 request have.
type requestStream interface {
	Read(b []byte) (int, error)
	Write(b []byte) (int, error)
	SetWriteDeadline(time.Time) error
	SendDatagram(b []byte) error
	ReceiveDatagram(ctx context.Context) ([]byte, error)
	Context() context.Context
}

// overH3 carries single packets in HTTP datagrams (RFC 9297, section 2.1), each
// by itself, and all else on the request's stream: trains, bursts of packets as
// DATAGRAM capsules (section 3.5), and any packet that is too long for a
// datagram on this path, so a narrow path is slow but never a black hole; QUIC
// itself finds out how long a datagram may be (RFC 9000, section 14.3). A peer
// that is not ours may not read packets on the stream: it gets those only that
// are too long.
type overH3 struct {
	stream requestStream
	conn   *quic.Conn
	end    func() // closes what the connection stands on
	ours   bool   // the peer is
	moved  func() // is told of each write of some length that was taken
	last   quic.ConnectionStats

	mu      sync.Mutex // of what two senders share, and of writes
	allowed float64    // datagrams that may go now, at refills
	refills time.Time

	chunk       [streamChunk]byte
	start, stop int
	more        bool // the last read was full: read more at once
}

// NewH3Stream returns a stream over an HTTP/3 request that was granted. trains
// says that the peer takes trains. end closes what conn stands on; it may be nil.
func NewH3Stream(stream requestStream, conn *quic.Conn, trains bool, end func(), until time.Time) *Stream {
	by := &overH3{stream: stream, conn: conn, end: end, ours: trains}
	s := newStream(by, nil, until)
	by.moved = func() { s.moved.Store(s.now()) }
	s.Trains, s.pad = trains, true
	return s
}

func (c *overH3) lanes() int     { return 2 }
func (c *overH3) setIdle(func()) {}
func (c *overH3) finish()        {} // with the stream's end datagrams on their way would be lost

func (c *overH3) close() {
	c.conn.CloseWithError(quic.ApplicationErrorCode(http3.ErrCodeNoError), "")
	if c.end != nil {
		c.end()
	}
}

func (c *overH3) wait() error {
	if c.start < c.stop || c.more {
		return nil
	}
	n, err := c.stream.Read(c.chunk[:])
	if n > 0 {
		c.start, c.stop, c.more = 0, n, n == len(c.chunk)
		return nil
	}
	return err
}

func (c *overH3) Read(b []byte) (int, error) {
	if err := c.wait(); err != nil {
		return 0, err
	}
	if c.start < c.stop {
		n := copy(b, c.chunk[c.start:c.stop])
		c.start += n
		return n, nil
	}
	n, err := c.stream.Read(b)
	c.more = n > len(c.chunk)
	return n, err
}

// datagrams receives on one goroutine, whose queue in quic-go is short, and
// delivers batches on another.
func (c *overH3) datagrams(ctx context.Context, deliver func([][]byte)) error {
	var mu sync.Mutex
	var held [][]byte
	wake := make(chan struct{}, 1)
	done := make(chan error, 1)
	go func() {
		for {
			b, err := c.stream.ReceiveDatagram(ctx)
			if err != nil {
				done <- err
				return
			}
			if context, n := varint(b); n == 0 || context != 0 || len(b) == n {
				continue // another context is not ours to understand (RFC 9484, section 6)
			} else {
				b = b[n:]
			}
			mu.Lock()
			if len(held) < heldDatagrams {
				held = append(held, b)
			}
			mu.Unlock()
			select {
			case wake <- struct{}{}:
			default:
			}
		}
	}()
	var batch [][]byte
	for {
		clear(batch)
		select {
		case err := <-done:
			return err
		case <-wake:
		}
		mu.Lock()
		held, batch = batch[:0], held
		mu.Unlock()
		for some := range slices.Chunk(batch, batchLimit) {
			deliver(some)
		}
	}
}

func (c *overH3) send(capsules []byte, _ int) (lost int, err error) {
	small := len(capsules) <= smallBatch
	run := capsules[:0] // of the stream: overwrites what has been looked at
	for len(capsules) > 0 {
		kind, n := varint(capsules)
		size, m := varint(capsules[n:])
		whole := capsules[:n+m+int(size)]
		capsules = capsules[len(whole):]
		value := whole[n+m:]
		if kind == capsuleDatagram && (!c.ours || (small || !carriesTCP(value[1:])) && c.mayDatagram()) {
			err := c.stream.SendDatagram(value)
			var long *quic.DatagramTooLargeError
			if err == nil {
				continue
			}
			if !errors.As(err, &long) {
				return lost, err
			}
		}
		run = append(run, whole...)
	}
	for len(run) > 0 {
		n := wholeUpTo(run, longWrite)
		if err := c.write(run[:n]); err != nil {
			return lost, err
		}
		run = run[n:]
	}
	return lost, nil
}

// wholeUpTo is how long the capsules are, the first and what follows of it, that
// come to at most n bytes together, or the first alone if it is longer.
func wholeUpTo(capsules []byte, n int) (length int) {
	for length < len(capsules) {
		_, k := varint(capsules[length:])
		size, m := varint(capsules[length+k:])
		next := length + k + m + int(size)
		if length > 0 && next > n {
			break
		}
		length = next
	}
	return length
}

// write writes whole capsules on the stream.
func (c *overH3) write(capsules []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stream.SetWriteDeadline(time.Now().Add(DeadAfter))
	if _, err := c.stream.Write(capsules); err != nil {
		return err
	}
	if len(capsules) >= longWrite/2 {
		c.moved()
	}
	return nil
}

// mayDatagram takes one of the datagrams that are allowed now.
func (c *overH3) mayDatagram() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	c.allowed = min(c.allowed+now.Sub(c.refills).Seconds()*perSecond, burst)
	c.refills = now
	if c.allowed < 1 {
		return false
	}
	c.allowed--
	return true
}

// carriesTCP reports whether an IP packet holds TCP.
func carriesTCP(p []byte) bool {
	const tcp = 6
	return len(p) >= 20 && (p[0]>>4 == 4 && p[9] == tcp || p[0]>>4 == 6 && p[6] == tcp)
}

func (c *overH3) sample() Sample {
	now := c.conn.ConnectionStats()
	p := Sample{
		Sent: now.PacketsSent - c.last.PacketsSent,
		RTT:  now.SmoothedRTT, Jitter: now.MeanDeviation,
	}
	if now.PacketsLost > c.last.PacketsLost { // it may go down again
		p.Lost = now.PacketsLost - c.last.PacketsLost
	}
	c.last = now
	return p
}

// dialH3 opens a session over HTTP/3. A nil error proves what it proves for
// dialTLS.
func dialH3(ctx context.Context, to tunnel.Target) (_ *opened, err error) {
	if to.Proxy.IsValid() {
		return nil, errors.New("an http proxy carries no udp")
	}
	listen := net.ListenConfig{Control: tunnel.BindToLink(to.Path.Link)}
	local := net.UDPAddr{IP: to.Path.From(to.Gateway.Address.Addr()).AsSlice()}
	udp, err := listen.ListenPacket(ctx, "udp", local.String())
	if err != nil {
		return nil, err
	}
	socket := &quic.Transport{Conn: UDP(udp)}
	end := func() {
		socket.Close()
		udp.Close()
	}
	config := clientTLS(to)
	config.NextProtos = []string{http3.NextProtoH3}
	conn, err := socket.Dial(ctx, net.UDPAddrFromAddrPort(to.Gateway.Address), config, QUICConfig())
	if err != nil {
		end()
		return nil, err
	}
	o, err := connect(ctx, conn, end, to)
	if err != nil {
		conn.CloseWithError(quic.ApplicationErrorCode(http3.ErrCodeNoError), "")
		end()
		return nil, err
	}
	return o, nil
}

// connect asks for CONNECT-IP (RFC 9484, section 4.5).
func connect(ctx context.Context, conn *quic.Conn, end func(), to tunnel.Target) (*opened, error) {
	state := conn.ConnectionState().TLS
	if err := to.Agreement.Check(state); err != nil {
		return nil, err
	}
	client := (&http3.Transport{EnableDatagrams: true, MaxResponseHeaderBytes: maxResponse}).NewClientConn(conn)
	select {
	case <-client.ReceivedSettings():
	case <-client.Context().Done():
		return nil, context.Cause(client.Context())
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if s := client.Settings(); !s.EnableExtendedConnect || !s.EnableDatagrams {
		return nil, errors.New("gateway's http/3 has no extended connect or no datagrams")
	}
	stream, err := client.OpenRequestStream(ctx)
	if err != nil {
		return nil, err
	}
	req := request(to)
	req.Method, req.Proto, req.ProtoMajor, req.ProtoMinor = http.MethodConnect, Protocol, 3, 0
	req.Header.Set(http3.CapsuleProtocolHeader, "?1")
	stop := context.AfterFunc(ctx, func() { stream.SetDeadline(time.Unix(1, 0)) })
	err = stream.SendRequestHeader(req)
	var resp *http.Response
	if err == nil {
		resp, err = stream.ReadResponse()
	}
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return nil, fmt.Errorf("request: %w", err)
	}
	a, trains, err := parseGranted(resp)
	if err != nil {
		return nil, err
	}
	return &opened{stream: NewH3Stream(stream, conn, trains, end, to.Until), assignment: a, carriage: HTTP3, tls: state}, nil
}
