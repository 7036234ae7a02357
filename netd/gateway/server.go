package gateway

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/netutil"

	"sekisho/attest"
	"sekisho/attest/cryptrec"
	"sekisho/netd"
	"sekisho/netd/tunnel"
	"sekisho/netd/tunnel/connectip"
)

const (
	// openTimeout bounds the TLS handshake, and after it the request.
	openTimeout = 10 * time.Second
	// maxHeader bounds a request's header in bytes.
	maxHeader = 8 << 10
	// opening is how many connections beyond the sessions may be open at once:
	// those in the handshake and those that linger after being replaced.
	opening = 1024
	// retryAfter is what a laptop is told when there is no room, in seconds.
	retryAfter = "10"
)

// deviceURI is how a laptop's certificate names its device: a URI with the
// device id in hexadecimal behind it.
const deviceURI = "urn:sekisho:device:"

// Device is where the server's packets come from and go to: a tunnel.Device.
type Device interface {
	ReadBatch() ([][]byte, error)
	WriteBatch(packets [][]byte) error
	Close() error
}

// Server is a gateway. Make one with New.
type Server struct {
	config *Config
	tls    *tls.Config
	leases *Leases
	dev    Device
	log    *slog.Logger
	since  time.Time

	mu       sync.RWMutex
	byDevice map[attest.Digest]*session
	byInner  map[[4]byte]*session
	ended    netd.Counters // of sessions that are over
	refused  uint64
	sources  *sources       // of Serve, nil before it
	running  sync.WaitGroup // sessions, added under mu while Serve's context is not done
}

// session is one laptop's connection.
type session struct {
	stream *connectip.Stream
	device attest.Digest
	inner  netip.Addr
	remote string
	since  time.Time
	until  time.Time
}

// New returns a Server that serves config with the given TLS configuration.
func New(config *Config, t *tls.Config, leases *Leases, dev Device, log *slog.Logger) *Server {
	return &Server{
		config: config, tls: t, leases: leases, dev: dev, log: log, since: time.Now(),
		byDevice: map[attest.Digest]*session{}, byInner: map[[4]byte]*session{},
	}
}

// Serve accepts laptops on l until ctx is done or the device fails. It closes
// l, the device and every session, and waits for them.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	srv := &http.Server{
		Handler:           http.HandlerFunc(s.handle),
		TLSConfig:         s.tls,
		ReadHeaderTimeout: openTimeout,
		ReadTimeout:       openTimeout,
		WriteTimeout:      openTimeout,
		MaxHeaderBytes:    maxHeader,
		Protocols:         new(http.Protocols),
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ErrorLog:          log.New(io.Discard, "", 0), // one line per port scan helps nobody
	}
	srv.Protocols.SetHTTP1(true)
	srv.SetKeepAlivesEnabled(false)
	var parts sync.WaitGroup
	from := newSources(netutil.LimitListener(l, s.config.MaxSessions+opening))
	s.mu.Lock()
	s.sources = from
	s.mu.Unlock()
	parts.Go(func() {
		cancel(fmt.Errorf("accept: %w", srv.ServeTLS(from, "", "")))
	})
	parts.Go(func() { cancel(s.dispatch()) })
	<-ctx.Done()
	srv.Close()
	s.dev.Close()
	parts.Wait()
	s.mu.Lock() // ctx is done: from here on, run registers nobody
	s.mu.Unlock()
	s.running.Wait()
	return context.Cause(ctx)
}

// handle admits one laptop. It returns when the session is over.
func (s *Server) handle(w http.ResponseWriter, r *http.Request) {
	sess, err := s.admit(r)
	if err != nil {
		s.refuse(w, r, err)
		return
	}
	header, err := connectip.Granted(tunnel.Assignment{MTU: s.config.MTU, DNS: s.config.DNS})
	if err != nil {
		s.refuse(w, r, err)
		return
	}
	conn, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		s.refuse(w, r, err)
		return
	}
	defer conn.Close()
	if c, ok := conn.(*tls.Conn).NetConn().(*sourceConn); ok {
		c.leave() // a laptop, and from here on a session
	}
	if err := grant(conn, rw, header); err != nil {
		return
	}
	buffered, err := rw.Reader.Peek(rw.Reader.Buffered())
	if err != nil {
		return
	}
	s.run(r.Context(), sess, conn.(*tls.Conn), buffered)
}

// grant writes the 101 response and lifts the deadlines of the request.
func grant(conn net.Conn, rw *bufio.ReadWriter, header http.Header) error {
	io.WriteString(rw, "HTTP/1.1 101 Switching Protocols\r\n")
	header.Write(rw)
	io.WriteString(rw, "\r\n")
	if err := rw.Flush(); err != nil {
		return err
	}
	return conn.SetDeadline(time.Time{})
}

// refusal is an error with the HTTP status that tells it.
type refusal struct {
	status int
	err    error
}

func (r *refusal) Error() string { return r.err.Error() }

// admit decides about a request. A nil error proves: only algorithms in force
// were used; the client showed a certificate in force, of the verifier's CA,
// that names one device; the request is for CONNECT-IP; the device has an
// inner address; there is room.
func (s *Server) admit(r *http.Request) (*session, error) {
	if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 {
		return nil, &refusal{http.StatusForbidden, errors.New("no verified certificate")}
	}
	if err := cryptrec.Check(*r.TLS); err != nil {
		return nil, &refusal{http.StatusForbidden, err}
	}
	device, err := deviceOf(r.TLS.PeerCertificates[0])
	if err != nil {
		return nil, &refusal{http.StatusForbidden, err}
	}
	if err := connectip.Requested(r); err != nil {
		return nil, &refusal{http.StatusBadRequest, err}
	}
	s.mu.RLock()
	n, known := len(s.byDevice), s.byDevice[device] != nil
	s.mu.RUnlock()
	if n >= s.config.MaxSessions && !known {
		return nil, &refusal{http.StatusServiceUnavailable, fmt.Errorf("%d sessions are open", n)}
	}
	inner, err := s.leases.Get(device)
	if err != nil {
		return nil, &refusal{http.StatusServiceUnavailable, err}
	}
	return &session{device: device, inner: inner, remote: r.RemoteAddr, since: time.Now(), until: lapse(r.TLS.VerifiedChains[0])}, nil
}

func (s *Server) refuse(w http.ResponseWriter, r *http.Request, err error) {
	status := http.StatusInternalServerError
	var no *refusal
	if errors.As(err, &no) {
		status = no.status
	}
	if status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", retryAfter)
	}
	s.mu.Lock()
	s.refused++
	s.mu.Unlock()
	s.log.Warn("session refused", "remote", r.RemoteAddr, "status", status, "err", err)
	http.Error(w, http.StatusText(status), status)
}

// run carries a session from its registration to its end.
func (s *Server) run(ctx context.Context, sess *session, conn *tls.Conn, buffered []byte) {
	stream := connectip.NewStream(conn, buffered)
	source := sess.inner.As4()
	stream.OnPackets = func(packets [][]byte) int {
		honest := packets[:0]
		for _, p := range packets {
			if fromSource(p, source) {
				honest = append(honest, p)
			}
		}
		_ = s.dev.WriteBatch(honest) // what the kernel refuses is lost, as on any wire
		return len(packets) - len(honest)
	}
	stream.OnRequest = func(ids []uint64) error {
		stream.Assign(sess.inner, ids...)
		return nil
	}
	sess.stream = stream

	s.mu.Lock()
	if ctx.Err() != nil {
		s.mu.Unlock()
		return
	}
	s.running.Add(1)
	defer s.running.Done()
	old := s.byDevice[sess.device]
	s.byDevice[sess.device], s.byInner[source] = sess, sess
	s.mu.Unlock()
	if old != nil {
		old.stream.Retire()
	}
	stream.Assign(sess.inner, 0)
	stream.AdvertiseEverything()
	s.log.Info("session open", "device", sess.device, "inner", sess.inner, "remote", sess.remote, "until", sess.until)

	err := stream.Run(ctx, sess.until)

	c := stream.Counters()
	s.mu.Lock()
	if s.byDevice[sess.device] == sess {
		delete(s.byDevice, sess.device)
		delete(s.byInner, source)
	}
	add(&s.ended, c)
	s.mu.Unlock()
	s.log.Info("session closed", "device", sess.device, "inner", sess.inner, "reason", err, "dropped", c.Dropped)
}

// dispatch moves packets from the device to the sessions until it fails.
func (s *Server) dispatch() error {
	for {
		batch, err := s.dev.ReadBatch()
		if err != nil {
			return err
		}
		s.mu.RLock()
		for len(batch) > 0 {
			to, ok := destination(batch[0])
			n := 1
			for n < len(batch) {
				if next, ok := destination(batch[n]); !ok || next != to {
					break
				}
				n++
			}
			if sess := s.byInner[to]; ok && sess != nil {
				sess.stream.Send(batch[:n]...)
			}
			batch = batch[n:]
		}
		s.mu.RUnlock()
	}
}

// fromSource reports whether p is a whole IPv4 packet from source (RFC 791,
// section 3.1).
func fromSource(p []byte, source [4]byte) bool {
	return len(p) >= 20 && p[0]>>4 == 4 && int(p[2])<<8|int(p[3]) == len(p) && [4]byte(p[12:16]) == source
}

// destination returns the destination address of an IPv4 packet.
func destination(p []byte) ([4]byte, bool) {
	if len(p) < 20 || p[0]>>4 != 4 {
		return [4]byte{}, false
	}
	return [4]byte(p[16:20]), true
}

// deviceOf returns the one device that a laptop's certificate names.
func deviceOf(c *x509.Certificate) (attest.Digest, error) {
	var d attest.Digest
	if len(c.URIs) != 1 {
		return d, fmt.Errorf("certificate has %d URI names, want one %sID", len(c.URIs), deviceURI)
	}
	id, ok := strings.CutPrefix(c.URIs[0].String(), deviceURI)
	if !ok {
		return d, fmt.Errorf("certificate names %q, want %sID", c.URIs[0], deviceURI)
	}
	return d, d.UnmarshalText([]byte(id))
}

// lapse returns when the first certificate of the chain lapses.
func lapse(chain []*x509.Certificate) time.Time {
	return slices.MinFunc(chain, func(a, b *x509.Certificate) int { return a.NotAfter.Compare(b.NotAfter) }).NotAfter
}

func add(sum *netd.Counters, c netd.Counters) {
	sum.SentPackets += c.SentPackets
	sum.SentBytes += c.SentBytes
	sum.ReceivedPackets += c.ReceivedPackets
	sum.ReceivedBytes += c.ReceivedBytes
	sum.Dropped += c.Dropped
}

// Status is the answer to GET /v1/status.
type Status struct {
	State    string        `json:"state"` // "serving"
	Since    time.Time     `json:"since"`
	Reason   string        `json:"reason"`
	Detail   string        `json:"detail"`
	Listen   string        `json:"listen"`
	Pool     netip.Prefix  `json:"pool"`
	Leases   int           `json:"leases"`
	Refused  uint64        `json:"refused"`  // requests
	Crowded  uint64        `json:"crowded"`  // connections closed because their source address had too many under way
	Counters netd.Counters `json:"counters"` // of all sessions, sent is towards laptops
	Sessions []Session     `json:"sessions"` // by inner address
}

// Session describes an open session.
type Session struct {
	Device   attest.Digest `json:"device"`
	Inner    netip.Addr    `json:"inner"`
	Remote   string        `json:"remote"`
	Since    time.Time     `json:"since"`
	Until    time.Time     `json:"until"`
	Counters netd.Counters `json:"counters"`
}

// Status returns what the server does.
func (s *Server) Status() Status {
	s.mu.RLock()
	list := slices.Collect(maps.Values(s.byDevice))
	st := Status{State: "serving", Since: s.since, Listen: s.config.Listen.String(), Pool: s.config.Pool, Refused: s.refused, Counters: s.ended}
	if s.sources != nil {
		st.Crowded = s.sources.refused.Load()
	}
	s.mu.RUnlock()
	st.Leases = s.leases.Len()
	for _, sess := range list {
		c := sess.stream.Counters()
		add(&st.Counters, c)
		st.Sessions = append(st.Sessions, Session{sess.device, sess.inner, sess.remote, sess.since, sess.until, c})
	}
	slices.SortFunc(st.Sessions, func(a, b Session) int { return a.Inner.Compare(b.Inner) })
	st.Detail = fmt.Sprintf("%d sessions", len(list))
	return st
}
