package connectip

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"sync"
	"time"

	"sekisho/attest/cryptrec"
	"sekisho/netd/tunnel"
)

const (
	// openTimeout bounds dialling, handshake, upgrade and assignment together.
	openTimeout = 10 * time.Second
	// maxResponse bounds the gateway's response header in bytes.
	maxResponse = 8 << 10
)

// Driver is the connectip tunnel.Driver. Make one with New and keep Run going.
type Driver struct {
	dev *tunnel.Device

	mu      sync.Mutex
	current *session              // the one that carries packets, or the last that did
	live    map[*session]struct{} // current, and those that linger after it
	closed  bool
}

var _ tunnel.Driver = (*Driver)(nil)

// New returns a driver that carries the packets of dev.
func New(dev *tunnel.Device) *Driver { return &Driver{dev: dev, live: map[*session]struct{}{}} }

// session is one open connection to a gateway.
type session struct {
	stream *Stream
	status tunnel.Status // but for Counters and Err
	cancel context.CancelFunc
	ended  chan struct{}
	err    error // set before ended is closed
}

// Run moves packets from the device into the present session, and drops them
// while there is none, until ctx is done. It closes the device and every session.
func (d *Driver) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { d.dev.Close() })
	defer stop()
	var err error
	for {
		var batch [][]byte
		if batch, err = d.dev.ReadBatch(); err != nil {
			break
		}
		if s := d.session(); s != nil {
			s.stream.Send(batch...)
		}
	}
	d.mu.Lock()
	d.closed = true
	d.mu.Unlock()
	d.Down()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

func (d *Driver) session() *session {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.current
}

// Up implements tunnel.Driver.
func (d *Driver) Up(ctx context.Context, to tunnel.Target) (tunnel.Assignment, error) {
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	s, err := d.open(ctx, to)
	if err != nil {
		return tunnel.Assignment{}, fmt.Errorf("gateway %s: %w", to.Gateway.Address, err)
	}
	d.mu.Lock()
	old := d.current
	d.current = s
	d.mu.Unlock()
	if old != nil {
		old.stream.Retire()
	}
	return s.status.Assignment, nil
}

// Status implements tunnel.Driver.
func (d *Driver) Status() tunnel.Status {
	s := d.session()
	if s == nil {
		return tunnel.Status{}
	}
	st := s.status
	st.Counters = s.stream.Counters()
	select {
	case <-s.ended:
		st.Open, st.Err = false, s.err
	default:
	}
	return st
}

// Down implements tunnel.Driver. It returns when no connection is left.
func (d *Driver) Down() {
	d.mu.Lock()
	live := slices.Collect(maps.Keys(d.live))
	d.mu.Unlock()
	for _, s := range live {
		s.cancel()
		<-s.ended
	}
}

// open connects, upgrades, and waits for the first assignment.
func (d *Driver) open(ctx context.Context, to tunnel.Target) (*session, error) {
	conn, err := dial(ctx, to)
	if err != nil {
		return nil, err
	}
	assignment, buffered, err := upgrade(ctx, conn, to)
	if err != nil {
		conn.NetConn().Close()
		return nil, err
	}
	state := conn.ConnectionState()
	s := &session{
		stream: NewStream(conn, buffered),
		status: tunnel.Status{
			Open: true, Gateway: to.Gateway.Address, Since: time.Now(), Until: to.Until,
			Cipher: tls.CipherSuiteName(state.CipherSuite) + " " + state.CurveID.String(),
		},
		ended: make(chan struct{}),
	}
	s.status.Ended = s.ended
	assigned := make(chan netip.Addr, 1)
	var inner netip.Addr // touched by the stream's reader only
	s.stream.Probe = true
	s.stream.OnPackets = func(packets [][]byte) int {
		// A device that is down loses them; the plan has closed it on purpose.
		_ = d.dev.WriteBatch(packets)
		return 0
	}
	s.stream.OnAssign = func(p netip.Prefix) error {
		switch {
		case !p.IsSingleIP() || !p.Addr().Is4() || p.Addr().IsUnspecified() || p.Addr().IsLoopback() || p.Addr().IsMulticast():
			return fmt.Errorf("gateway assigned %s, want one IPv4 unicast address", p)
		case !inner.IsValid():
			inner = p.Addr()
			assigned <- inner
		case inner != p.Addr():
			return fmt.Errorf("gateway changed the inner address from %s to %s", inner, p.Addr())
		}
		return nil
	}
	// The session outlives the context of Up: Run or Down ends it.
	var life context.Context
	life, s.cancel = context.WithCancel(context.WithoutCancel(ctx))
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		s.cancel()
		conn.NetConn().Close()
		return nil, net.ErrClosed
	}
	d.live[s] = struct{}{}
	d.mu.Unlock()
	go func() { // Run waits for it in Down
		s.err = s.stream.Run(life, to.Until)
		s.cancel()
		d.mu.Lock()
		delete(d.live, s)
		d.mu.Unlock()
		close(s.ended)
	}()
	select {
	case a := <-assigned:
		assignment.Inner = a
		s.status.Assignment = assignment
		return s, nil
	case <-s.ended:
		return nil, s.err
	case <-ctx.Done():
		s.cancel()
		<-s.ended
		return nil, fmt.Errorf("no inner address assigned: %w", ctx.Err())
	}
}

// dial opens the TLS connection. A nil error proves that the gateway showed a
// certificate of the organisation for its name, and that only algorithms of the
// list in force were used.
func dial(ctx context.Context, to tunnel.Target) (*tls.Conn, error) {
	dialer := net.Dialer{KeepAlive: -1, Control: tunnel.BindToLink(to.Link)} // the stream has its own signs of life
	if to.Source.IsValid() {
		dialer.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(to.Source, 0))
	}
	raw, err := dialer.DialContext(ctx, "tcp", to.Gateway.Address.String())
	if err != nil {
		return nil, err
	}
	config := cryptrec.Config()
	config.ServerName = to.Gateway.ServerName
	config.RootCAs = to.Roots
	config.Certificates = []tls.Certificate{*to.Credential}
	config.NextProtos = []string{"http/1.1"}
	config.DynamicRecordSizingDisabled = true // records are full, or the packet waited for none
	conn := tls.Client(raw, config)
	if err := conn.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, err
	}
	if err := cryptrec.Check(conn.ConnectionState()); err != nil {
		raw.Close()
		return nil, err
	}
	return conn, nil
}

// upgrade asks for CONNECT-IP and returns what the gateway says of the inner
// network, and what it sent beyond its response.
func upgrade(ctx context.Context, conn *tls.Conn, to tunnel.Target) (tunnel.Assignment, []byte, error) {
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	a, buffered, err := exchange(conn, to)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	return a, buffered, err
}

func exchange(conn *tls.Conn, to tunnel.Target) (tunnel.Assignment, []byte, error) {
	var none tunnel.Assignment
	req := &http.Request{
		Method: http.MethodGet, URL: &url.URL{Scheme: "https", Host: to.Gateway.ServerName, Path: Path}, Host: to.Gateway.ServerName,
		ProtoMajor: 1, ProtoMinor: 1, Header: http.Header{"User-Agent": nil},
	}
	setUpgrade(req.Header)
	if err := req.Write(conn); err != nil {
		return none, nil, fmt.Errorf("request: %w", err)
	}
	br := bufio.NewReader(&io.LimitedReader{R: conn, N: maxResponse})
	resp, err := http.ReadResponse(br, req)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return none, nil, fmt.Errorf("response: cut off, or over %d bytes", maxResponse)
	}
	if err != nil {
		return none, nil, fmt.Errorf("response: %w", err)
	}
	a, err := parseGranted(resp)
	if err != nil {
		return none, nil, err
	}
	buffered, err := br.Peek(br.Buffered())
	return a, buffered, err
}
