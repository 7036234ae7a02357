package connectip

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"sekisho/netd/tunnel"
)

// unsentShare of what the path takes in queueTime, and unsentLeast bytes (a TLS
// record), are what the kernel may hold of a connection beyond its window
// (tcp(7), TCP_NOTSENT_LOWAT): what waits, waits in the outbox, which drops
// before it gets old. It lasts until a busy machine brings more.
const (
	unsentShare = 1.0 / 8
	unsentLeast = 16 << 10
)

// overTLS carries capsules on the bare TLS stream.
type overTLS struct {
	*tls.Conn
	wire   *Wire
	last   tcpCount
	unsent int // bytes, as the kernel was told
}

// NewTLSStream returns a stream over conn, whose HTTP upgrade is done and whose
// NetConn is a *Wire, or has one. buffered holds what was read beyond it.
func NewTLSStream(conn *tls.Conn, wire *Wire, buffered []byte, until time.Time) *Stream {
	return newStream(&overTLS{Conn: conn, wire: wire}, buffered, until)
}

func (c *overTLS) wait() error                                     { return c.wire.wait() }
func (c *overTLS) setIdle(idle func())                             { c.wire.idle = idle }
func (c *overTLS) lanes() int                                      { return 1 }
func (c *overTLS) finish()                                         { c.Conn.CloseWrite() }
func (c *overTLS) close()                                          { c.wire.Close() } // not tls.Conn.Close, which waits for a stuck write
func (c *overTLS) datagrams(context.Context, func([][]byte)) error { return nil }

func (c *overTLS) send(capsules []byte, most int) (int, error) {
	if n := max(int(float64(most)*unsentShare), unsentLeast); n >= 2*c.unsent || n <= c.unsent/2 {
		c.unsent = n
		c.wire.raw.Control(func(fd uintptr) {
			// Without it the tunnel is as good, only its queue is longer.
			_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, n)
		})
	}
	c.Conn.SetWriteDeadline(time.Now().Add(DeadAfter))
	err := c.wire.together(func() error { _, err := c.Conn.Write(capsules); return err })
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = fmt.Errorf("%w: takes nothing for %v", ErrDead, DeadAfter)
	}
	return 0, err
}

// tcpCount is what the kernel counted of a TCP connection.
type tcpCount struct{ sent, again uint64 }

func (c *overTLS) sample() Sample {
	raw, err := c.wire.Conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		return Sample{}
	}
	var info *unix.TCPInfo
	raw.Control(func(fd uintptr) { info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) })
	if err != nil || info == nil {
		return Sample{}
	}
	now := tcpCount{uint64(info.Segs_out), uint64(info.Total_retrans)}
	p := Sample{
		Sent: now.sent - c.last.sent, Lost: now.again - c.last.again,
		RTT: time.Duration(info.Rtt) * time.Microsecond, Jitter: time.Duration(info.Rttvar) * time.Microsecond,
	}
	c.last = now
	return p
}

// dialTLS opens a session over TLS on TCP. A nil error proves what Check of
// cryptrec.KeyAgreement says, that the gateway showed a certificate of the organisation for
// its name, and that it granted the upgrade.
func dialTLS(ctx context.Context, to tunnel.Target) (*opened, error) {
	raw, err := tunnel.DialTCP(ctx, to.Path, to.Gateway.Address, to.Proxy)
	if err != nil {
		return nil, err
	}
	wire, err := NewWire(raw)
	if err != nil {
		raw.Close()
		return nil, err
	}
	config := clientTLS(to)
	config.NextProtos = []string{"http/1.1"}
	config.DynamicRecordSizingDisabled = true // records are full, or the packet waited for none
	conn := tls.Client(wire, config)
	stop := context.AfterFunc(ctx, func() { raw.SetDeadline(time.Unix(1, 0)) })
	o, err := upgrade(ctx, conn, wire, to)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		raw.Close()
		return nil, err
	}
	return o, nil
}

// clientTLS is the TLS configuration of both carriages but for the protocol.
func clientTLS(to tunnel.Target) *tls.Config {
	config := to.Agreement.Config()
	config.ServerName = to.Gateway.ServerName
	config.RootCAs = to.Roots
	config.Certificates = []tls.Certificate{*to.Credential}
	return config
}

// upgrade shakes hands and asks for CONNECT-IP.
func upgrade(ctx context.Context, conn *tls.Conn, wire *Wire, to tunnel.Target) (*opened, error) {
	if err := conn.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	state := conn.ConnectionState()
	if err := to.Agreement.Check(state); err != nil {
		return nil, err
	}
	req := request(to)
	setUpgrade(req.Header)
	if err := req.Write(conn); err != nil {
		return nil, fmt.Errorf("request: %w", err)
	}
	br := bufio.NewReader(&io.LimitedReader{R: conn, N: maxResponse})
	resp, err := http.ReadResponse(br, req)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, fmt.Errorf("response: cut off, or over %d bytes", maxResponse)
	}
	if err != nil {
		return nil, fmt.Errorf("response: %w", err)
	}
	a, trains, err := parseGranted(resp)
	if err != nil {
		return nil, err
	}
	buffered, err := br.Peek(br.Buffered())
	if err != nil {
		return nil, err
	}
	s := NewTLSStream(conn, wire, buffered, to.Until)
	s.Trains = trains
	return &opened{stream: s, assignment: a, carriage: TLS, tls: state}, nil
}
