package gateway

import (
	"bufio"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"sekisho/attest"
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

// GCPercent is for debug.SetGCPercent in a process that serves: packets leave no
// garbage, and what each idle session holds shall not be held for garbage again.
const GCPercent = 50

// deviceURI is how a laptop's certificate names its device: a URI with the
// device id in hexadecimal behind it.
const deviceURI = "urn:sekisho:device:"

// Device is where the server's packets come from and go to: a tunnel.Device.
type Device interface {
	Read() (tunnel.Frame, error)
	Write(packets [][]byte) error
	WriteFrame(tunnel.Frame) error
	Close() error
}

// Revocations is what the server asks of the feed of revoked devices.
type Revocations interface {
	// Heard returns why the feed is not to be relied on now, in which case
	// nobody new is admitted; nil when it is.
	Heard() error
	// Revoked reports whether the holder has lost its admission.
	Revoked(attest.Holder) bool
	// Changed returns a channel that is closed with the next change.
	Changed() <-chan struct{}
}

// Server is a gateway. Make one with New.
type Server struct {
	// Revocations is the feed; nil revokes nobody. Set it before Serve.
	Revocations Revocations

	config *Config
	tls    *tls.Config
	leases *Leases
	dev    Device
	log    *slog.Logger
	since  time.Time

	mu      sync.RWMutex
	places  map[attest.Digest]int // requests and sessions of each admitted laptop, MaxSessions laptops at most
	devices map[attest.Digest]*laptop
	byInner map[[16]byte]*laptop
	ended   netd.Counters // of sessions that are over
	refused uint64
	metrics *metrics
	sources *sources       // of Serve, nil before it
	running sync.WaitGroup // sessions, added under mu while Serve's context is not done
}

// New returns a Server that serves config with the given TLS configuration.
func New(config *Config, t *tls.Config, leases *Leases, dev Device, log *slog.Logger) *Server {
	s := &Server{
		config: config, tls: t, leases: leases, dev: dev, log: log, since: time.Now(),
		places: map[attest.Digest]int{}, devices: map[attest.Digest]*laptop{}, byInner: map[[16]byte]*laptop{},
	}
	s.metrics = newMetrics(s)
	return s
}

// Serve accepts laptops on tcp, and over HTTP/3 on udp unless that is nil,
// until ctx is done or the device fails. It closes all of them and every
// session, and waits for them.
func (s *Server) Serve(ctx context.Context, tcp net.Listener, udp net.PacketConn) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	srv := &http.Server{
		Handler:           s.handler(ctx),
		TLSConfig:         s.tls,
		ReadHeaderTimeout: openTimeout,
		ReadTimeout:       openTimeout,
		WriteTimeout:      openTimeout,
		MaxHeaderBytes:    maxHeader,
		Protocols:         new(http.Protocols),
		ErrorLog:          log.New(io.Discard, "", 0), // one line per port scan helps nobody
	}
	srv.Protocols.SetHTTP1(true)
	srv.SetKeepAlivesEnabled(false)
	var parts sync.WaitGroup
	from := newSources(tcp, s.config.MaxSessions+opening)
	s.mu.Lock()
	s.sources = from
	s.mu.Unlock()
	if err := s.follow(ctx, &parts); err != nil {
		cancel(err)
	}
	parts.Go(func() { cancel(fmt.Errorf("accept: %w", srv.ServeTLS(from, "", ""))) })
	if udp != nil {
		parts.Go(func() { cancel(s.serveH3(ctx, udp, from)) })
	}
	parts.Go(func() { cancel(s.dispatch()) })
	parts.Go(func() { s.tick(ctx) })
	parts.Go(func() {
		if err := s.serveMetrics(ctx); err != nil { // the tunnels do not depend on it
			s.log.Error("no metrics", "err", err)
		}
	})
	parts.Go(func() { s.followRevocations(ctx) })
	<-ctx.Done()
	srv.Close()
	s.dev.Close()
	parts.Wait()
	s.mu.Lock() // ctx is done: from here on, run registers nobody
	s.mu.Unlock()
	s.running.Wait()
	return context.Cause(ctx)
}

// connKey is the context key of what serveH3 leaves for handleH3.
type connKey struct{}

// serveH3 accepts laptops over HTTP/3 until ctx is done.
func (s *Server) serveH3(ctx context.Context, udp net.PacketConn, from *sources) error {
	socket := &quic.Transport{
		Conn: connectip.UDP(udp),
		// Beyond this many under way each must show that it can be reached at its
		// address before it costs a handshake (RFC 9000, section 8.1.2).
		VerifySourceAddress: func(net.Addr) bool { return from.underWay() > opening/8 },
		ConnContext: func(ctx context.Context, c *quic.ClientInfo) (context.Context, error) {
			leave, ok := from.admit(c.RemoteAddr)
			if !ok {
				return nil, errors.New("crowded")
			}
			context.AfterFunc(ctx, leave)
			return context.WithValue(ctx, sourceKey{}, leave), nil
		},
	}
	l, err := socket.Listen(http3.ConfigureTLSConfig(s.tls), connectip.QUICConfig())
	if err != nil {
		return fmt.Errorf("listen on udp: %w", err)
	}
	srv := &http3.Server{
		Handler: s.handler(ctx), EnableDatagrams: true, MaxHeaderBytes: maxHeader, IdleTimeout: openTimeout,
		ConnContext: func(ctx context.Context, c *quic.Conn) context.Context { return context.WithValue(ctx, connKey{}, c) },
	}
	defer udp.Close()
	defer socket.Close()
	stop := context.AfterFunc(ctx, func() { srv.Close(); l.Close() })
	defer stop()
	return fmt.Errorf("accept on udp: %w", srv.ServeListener(l))
}

// sourceKey is the context key of a QUIC connection's leave.
type sourceKey struct{}

// handler admits laptops, whose sessions end with ctx. It does not wait for
// them: what HTTP needed of memory goes with the request.
func (s *Server) handler(ctx context.Context) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		sess, err := s.admit(r)
		if err == nil {
			if err = connectip.Granted(w.Header(), r.ProtoMajor, tunnel.Assignment{MTU: s.config.MTU, DNS: s.config.DNS}); err != nil {
				s.leave(sess.device)
			}
		}
		if err != nil {
			s.refuse(w, r, err)
			return
		}
		if r.ProtoMajor == 1 {
			sess.stream, err = overTLS(w, r, sess)
		} else {
			sess.stream, err = overH3(w, r, sess)
		}
		if err != nil {
			s.leave(sess.device)
			s.log.Warn("session not opened", "remote", sess.remote, "err", err)
			return
		}
		s.start(ctx, sess)
	})
}

// overTLS takes the connection out of HTTP/1.1.
func overTLS(w http.ResponseWriter, r *http.Request, sess *session) (*connectip.Stream, error) {
	header := w.Header()
	c, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return nil, err
	}
	conn := c.(*tls.Conn)
	from := conn.NetConn().(*sourceConn)
	from.leave() // a laptop, and from here on a session
	if err := grant(conn, rw, header); err != nil {
		conn.Close()
		return nil, err
	}
	buffered, err := rw.Reader.Peek(rw.Reader.Buffered())
	if err != nil {
		conn.Close()
		return nil, err
	}
	stream := connectip.NewTLSStream(conn, from.Wire, buffered, sess.until)
	stream.Trains = connectip.TakesTrains(r)
	return stream, nil
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

// overH3 takes the request's stream out of HTTP/3.
func overH3(w http.ResponseWriter, r *http.Request, sess *session) (*connectip.Stream, error) {
	conn, ok := r.Context().Value(connKey{}).(*quic.Conn)
	if !ok {
		return nil, errors.New("request without a connection")
	}
	if leave, ok := conn.Context().Value(sourceKey{}).(func()); ok {
		leave()
	}
	w.WriteHeader(http.StatusOK)
	stream, err := w.(http3.HTTPStreamer).HTTPStream()
	if err != nil {
		return nil, err
	}
	return connectip.NewH3Stream(stream, conn, connectip.TakesTrains(r), nil, sess.until), nil
}

// refusal is an error with the HTTP status that tells it.
type refusal struct {
	status int
	err    error
}

func (r *refusal) Error() string { return r.err.Error() }

// admit decides about a request. A nil error proves: only algorithms in force
// were used; the client showed a certificate in force, of the verifier's CA,
// that names one device; the request is for CONNECT-IP; the device is not
// revoked and has an inner address; there is room, and the laptop's place in it
// is taken until leave.
func (s *Server) admit(r *http.Request) (*session, error) {
	if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 {
		return nil, &refusal{http.StatusForbidden, errors.New("no verified certificate")}
	}
	if err := s.config.KeyAgreement.Check(*r.TLS); err != nil {
		return nil, &refusal{http.StatusForbidden, err}
	}
	device, err := deviceOf(r.TLS.PeerCertificates[0])
	if err != nil {
		return nil, &refusal{http.StatusForbidden, err}
	}
	holder := attest.Holder{Device: device, Key: sha256.Sum256(r.TLS.PeerCertificates[0].RawSubjectPublicKeyInfo), Issued: r.TLS.PeerCertificates[0].NotBefore}
	if err := connectip.Requested(r); err != nil {
		return nil, &refusal{http.StatusBadRequest, err}
	}
	if s.Revocations != nil {
		if err := s.Revocations.Heard(); err != nil {
			return nil, &refusal{http.StatusServiceUnavailable, fmt.Errorf("revocations: %w", err)}
		}
		if s.Revocations.Revoked(holder) {
			return nil, &refusal{http.StatusForbidden, fmt.Errorf("device %s is revoked", device)}
		}
	}
	inner, err := s.leases.Get(device)
	if err != nil {
		return nil, &refusal{http.StatusServiceUnavailable, err}
	}
	s.mu.Lock()
	n, known := len(s.places), s.places[device] > 0
	full := n >= s.config.MaxSessions && !known
	if !full {
		s.places[device]++
	}
	s.mu.Unlock()
	if full {
		return nil, &refusal{http.StatusServiceUnavailable, fmt.Errorf("%d laptops are admitted", n)}
	}
	s.metrics.admitted.Inc()
	return &session{device: device, holder: holder, inner: s.config.inner(inner), remote: r.RemoteAddr, carriage: r.Proto, since: time.Now(), until: lapse(r.TLS.VerifiedChains[0])}, nil
}

// leave gives back a place that admit took.
func (s *Server) leave(device attest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.places[device]--; s.places[device] == 0 {
		delete(s.places, device)
	}
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
	s.metrics.refusedWith(status)
	s.log.Warn("session refused", "remote", r.RemoteAddr, "status", status, "err", err)
	http.Error(w, http.StatusText(status), status)
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
