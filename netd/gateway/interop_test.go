package gateway

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	masque "github.com/quic-go/connect-ip-go"
	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"github.com/yosida95/uritemplate/v3"

	"sekisho/attest"
	"sekisho/attest/cryptrec"
	"sekisho/netd/tunnel/connectip"
)

// masqueClient opens a session with connect-ip-go's client.
func (s *site) masqueClient(ctx context.Context, cert tls.Certificate) (*masque.Conn, error) {
	config := cryptrec.Config()
	config.RootCAs, config.ServerName, config.NextProtos = s.roots, "gateway.test", []string{http3.NextProtoH3}
	config.Certificates = []tls.Certificate{cert}
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	socket := &quic.Transport{Conn: udp}
	s.t.Cleanup(func() { socket.Close(); udp.Close() })
	conn, err := socket.Dial(ctx, net.UDPAddrFromAddrPort(netip.MustParseAddrPort(s.addr)), config, &quic.Config{EnableDatagrams: true, InitialPacketSize: 1350})
	if err != nil {
		return nil, err
	}
	if err := cryptrec.Check(conn.ConnectionState().TLS); err != nil {
		s.t.Error(err)
	}
	req, err := masque.NewRequest(ctx, uritemplate.MustNew("https://gateway.test"+connectip.Path))
	if err != nil {
		return nil, err
	}
	c, _, err := masque.NewClientConn((&http3.Transport{EnableDatagrams: true}).NewClientConn(conn)).Dial(req)
	return c, err
}

// TestForeignClient: connect-ip-go's client against this gateway.
func TestForeignClient(t *testing.T) {
	s := newSite(t, func(c *Config) { c.Pool6 = netip.MustParsePrefix("fd00:80::/112") })
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	c, err := s.masqueClient(ctx, s.device(1, time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	given, err := c.ReceiveAddressAssignment(ctx)
	if err != nil || len(given) != 2 || given[0].IPPrefix.String() != "10.80.0.2/32" || given[1].IPPrefix.String() != "fd00:80::2/128" {
		t.Fatalf("assigned %v, %v", given, err)
	}
	if _, err := c.RequestAddresses([]netip.Prefix{netip.MustParsePrefix("0.0.0.0/32")}); err != nil {
		t.Fatal(err)
	}
	if given, err = c.ReceiveAddressAssignment(ctx); err != nil || given[0].IPPrefix.String() != "10.80.0.2/32" {
		t.Errorf("assigned on request %v, %v", given, err)
	}
	out := packet(2, 99)
	if icmp, err := c.WritePacket(bytes.Clone(out)); err != nil || icmp != nil {
		t.Fatal(icmp, err)
	}
	if got := <-s.wire.out; len(got) != len(out) || got[8] != 63 || !bytes.Equal(got[12:], out[12:]) {
		t.Errorf("passed %x, want %x with a hop less", got, out)
	}
	s.wire.in <- packet(99, 2)
	b := make([]byte, 2000)
	if n, err := c.ReadPacket(b); err != nil || !bytes.Equal(b[:n], packet(99, 2)) {
		t.Errorf("received %x, %v", b[:n], err)
	}
	if st := s.server.Status(); len(st.Sessions) != 1 || st.Sessions[0].Carriage != "connect-ip" {
		t.Errorf("sessions %+v", st.Sessions)
	}
}

// hasty revokes every device right after its admission, and tells nobody.
type hasty struct{ asked atomic.Int32 }

func (h *hasty) Heard() error               { return nil }
func (h *hasty) Revoked(attest.Holder) bool { return h.asked.Add(1) > 1 }
func (h *hasty) Changed() <-chan struct{}   { return nil }

// TestRevokedWhileAdmitted: a session that nobody knew of yet when its device
// was revoked.
func TestRevokedWhileAdmitted(t *testing.T) {
	s := newSite(t, nil, &hasty{})
	c := s.open(s.device(1, time.Hour))
	c.expect(t, first(2))
	if _, err := io.Copy(io.Discard, c.br); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the session of a revoked device goes on")
	}
}

// list is a feed that says what it was told.
type list struct {
	mu      sync.Mutex
	err     error
	revoked []attest.Digest
	changed chan struct{}
}

func (l *list) set(err error, revoked ...attest.Digest) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.err, l.revoked = err, append(l.revoked, revoked...)
	close(l.changed)
	l.changed = make(chan struct{})
}

func (l *list) Heard() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

func (l *list) Revoked(h attest.Holder) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Contains(l.revoked, h.Device)
}

func (l *list) Changed() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.changed
}

// TestRevocationClosesLiveSessions over both carriages, and keeps them closed.
func TestRevocationClosesLiveSessions(t *testing.T) {
	feed := &list{changed: make(chan struct{})}
	s := newSite(t, nil, feed)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	overTLS := s.open(s.device(1, time.Hour))
	overTLS.expect(t, first(2))
	overQUIC, err := s.masqueClient(ctx, s.device(2, time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	spared := s.open(s.device(3, time.Hour))
	spared.expect(t, first(4))
	id := func(b byte) (d attest.Digest) {
		for i := range d {
			d[i] = b
		}
		return d
	}
	feed.set(nil, id(1), id(2))
	start := time.Now()
	if _, err := overTLS.br.ReadByte(); err == nil {
		t.Error("TLS session of a revoked device: open")
	}
	if _, err := overQUIC.ReadPacket(make([]byte, 2000)); err == nil {
		t.Error("HTTP/3 session of a revoked device: open")
	}
	t.Logf("both closed after %v", time.Since(start).Round(time.Millisecond))
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("closed after %v", took)
	}
	again := s.device(1, time.Hour)
	if resp, _, _, err := s.request(&again, upgrade); err != nil || resp.StatusCode != 403 {
		t.Errorf("revoked device again: %v, %v", resp, err)
	}
	s.wire.in <- packet(99, 4)
	spared.expect(t, capsule(packet(99, 4)))
	feed.set(errors.New("nobody is heard")) // nobody new, but who is in stays
	other := s.device(4, time.Hour)
	if resp, _, _, err := s.request(&other, upgrade); err != nil || resp.StatusCode != 503 {
		t.Errorf("without a feed: %v, %v", resp, err)
	}
	s.wire.in <- packet(99, 4)
	spared.expect(t, capsule(packet(99, 4)))
}
