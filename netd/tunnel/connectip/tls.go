package connectip

import (
	"bufio"
	"bytes"
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

	"sekisho/attest/cryptrec"
	"sekisho/netd/tunnel"
)

// unsent bounds what the kernel holds of a connection beyond its window, in
// bytes (tcp(7), TCP_NOTSENT_LOWAT): what waits, waits in the outbox, which
// drops before it gets old.
const unsent = 128 << 10

// overTLS carries capsules on the bare TLS stream.
type overTLS struct {
	*tls.Conn
	wire *Wire
	last tcpCount
}

// NewTLSStream returns a stream over conn, whose HTTP upgrade is done and whose
// NetConn is a *Wire, or has one. buffered holds what was read beyond it.
func NewTLSStream(conn *tls.Conn, wire *Wire, buffered []byte, until time.Time) *Stream {
	tcp := wire.Conn.(*net.TCPConn)
	if raw, err := tcp.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) {
			// Without it the tunnel is as good, only its queue is longer.
			_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, unsent)
		})
	}
	return newStream(&overTLS{Conn: conn, wire: wire}, buffered, until)
}

func (c *overTLS) wait() error                                     { return c.wire.wait() }
func (c *overTLS) setIdle(idle func())                             { c.wire.idle = idle }
func (c *overTLS) finish()                                         { c.Conn.CloseWrite() }
func (c *overTLS) close()                                          { c.wire.Close() } // not tls.Conn.Close, which waits for a stuck write
func (c *overTLS) datagrams(context.Context, func([][]byte)) error { return nil }

func (c *overTLS) send(capsules []byte) (int, error) {
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
// cryptrec says, that the gateway showed a certificate of the organisation for
// its name, and that it granted the upgrade.
func dialTLS(ctx context.Context, to tunnel.Target) (*opened, error) {
	raw, err := dialTCP(ctx, to)
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
	config := cryptrec.Config()
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
	if err := cryptrec.Check(state); err != nil {
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
	return &opened{s, a, TLS, state}, nil
}

// dialTCP connects to the gateway from the path's address and link, by the
// proxy if there is one.
func dialTCP(ctx context.Context, to tunnel.Target) (*net.TCPConn, error) {
	dialer := net.Dialer{KeepAlive: -1, Control: tunnel.BindToLink(to.Path.Link)} // the stream has its own signs of life
	if to.Path.Source.IsValid() {
		dialer.LocalAddr = &net.TCPAddr{IP: to.Path.Source.AsSlice()}
	}
	first := to.Gateway.Address
	if to.Proxy.IsValid() {
		first = to.Proxy
	}
	c, err := dialer.DialContext(ctx, "tcp", first.String())
	if err != nil {
		return nil, err
	}
	tcp := c.(*net.TCPConn)
	if to.Proxy.IsValid() {
		if err := throughProxy(ctx, tcp, to.Gateway.Address.String()); err != nil {
			tcp.Close()
			return nil, fmt.Errorf("proxy %s: %w", to.Proxy, err)
		}
	}
	return tcp, nil
}

// throughProxy asks an HTTP proxy for a TCP connection (RFC 9110, section
// 9.3.6). The proxy learns where to, and nothing else.
func throughProxy(ctx context.Context, c *net.TCPConn, address string) error {
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err := fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", address, address); err != nil {
		return err
	}
	// The gateway says nothing before the laptop does, so nothing comes behind
	// the header: it is read byte by byte all the same, to leave the rest alone.
	head := make([]byte, 0, 512)
	for !bytes.HasSuffix(head, []byte("\r\n\r\n")) {
		if len(head) == maxResponse {
			return fmt.Errorf("response: over %d bytes", maxResponse)
		}
		var b [1]byte
		if _, err := c.Read(b[:]); err != nil {
			return fmt.Errorf("response: %w", err)
		}
		head = append(head, b[0])
	}
	resp, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(head)), &http.Request{Method: http.MethodConnect})
	if err != nil {
		return fmt.Errorf("response: %w", err)
	}
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("response: http status %d %s", resp.StatusCode, http.StatusText(resp.StatusCode))
	}
	return nil
}
