package fleet

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"golang.org/x/net/netutil"

	"sekisho/attest"
	"sekisho/attest/cryptrec"
)

// Limits of the API server.
const (
	maxConns   = 4096
	maxWork    = 64               // requests in work at once
	maxLine    = 10 * time.Second // that a request waits to be one of them
	headerTime = 5 * time.Second
	bodyTime   = 30 * time.Second
	idleTime   = 15 * time.Second
	maxHeader  = 8 << 10

	// Requests of one address that show nothing yet: thousands of laptops may
	// be behind one, all at 8:30. Each attestation of a genuine device gives
	// the address back what it took, so this bounds only who asks for more
	// challenges than it answers.
	ratePerSecond = 64
	rateBurst     = 4096
	maxAddresses  = 65536
)

// GCPercent is for debug.SetGCPercent in a process that serves: evidence comes
// and goes 45 KB at a time beside a small heap, and by Go's default of 100 an
// eighth of the processor time goes into collecting it.
const GCPercent = 400

// Serve serves the API on l over TLS with cert until ctx ends. It uses only
// the algorithms of attest/cryptrec and checks that after each handshake.
func Serve(ctx context.Context, l net.Listener, cert tls.Certificate, s *Service, log *slog.Logger) error {
	config := cryptrec.Config()
	config.Certificates = []tls.Certificate{cert}
	config.NextProtos = []string{"http/1.1"}
	if s.Gateways != nil { // devices show none; a gateway's is judged here, once
		config.ClientAuth, config.ClientCAs = tls.VerifyClientCertIfGiven, s.Gateways
	}
	return serve(ctx, tls.NewListener(netutil.LimitListener(l, maxConns), config), listed(Handler(s, log)), log)
}

// listed answers only on connections that negotiated listed algorithms.
func listed(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.TLS == nil || cryptrec.Check(*r.TLS) != nil {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		h.ServeHTTP(w, r)
	})
}

func serve(ctx context.Context, l net.Listener, h http.Handler, log *slog.Logger) error {
	srv := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: headerTime,
		ReadTimeout:       bodyTime,
		WriteTimeout:      bodyTime,
		IdleTimeout:       idleTime,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		BaseContext: func(net.Listener) context.Context {
			return context.WithValue(context.WithoutCancel(ctx), endingKey{}, ctx)
		},
	}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), headerTime)
	defer cancel()
	err := srv.Shutdown(stop)
	if err != nil {
		err = errors.Join(err, srv.Close())
	}
	<-done
	return err
}

// Handler returns the API. What is not one of its routes is refused.
func Handler(s *Service, log *slog.Logger) http.Handler {
	a := &api{service: s, log: log, limits: newLimiter(s.Now), work: make(chan struct{}, maxWork), downloads: make(chan struct{}, maxDownloads), ramp: s.ramp}
	mux := http.NewServeMux()
	for _, r := range a.routes() {
		if !r.own {
			r.handler = a.limited(r.handler)
		}
		mux.HandleFunc(r.pattern, r.handler)
	}
	return mux
}

// route is one request that is answered: all others are not found.
type route struct {
	pattern string // of http.ServeMux
	handler http.HandlerFunc
	own     bool // it has limits of its own
}

// routes are all of the public API. Each of them judges by itself what it is
// shown: a ticket, an answer to a challenge, evidence, a signature.
func (a *api) routes() []route {
	return []route{
		{pattern: "POST " + attest.PathEnrolBegin, handler: a.begin},
		{pattern: "POST " + attest.PathEnrolFinish, handler: a.finish},
		{pattern: "POST " + attest.PathChallenge, handler: a.challenge, own: true},
		{pattern: "POST " + attest.PathAttest, handler: a.attest, own: true},
		{pattern: "POST " + attest.PathEscrow, handler: a.escrow},
		{pattern: "POST " + attest.PathNetwork, handler: a.network},
		{pattern: "POST " + attest.PathLogon, handler: a.logon},
		{pattern: "POST " + attest.PathUpdate, handler: a.update},
		{pattern: "GET " + attest.PathImage + "/{sha256}", handler: a.image, own: true},
		{pattern: "GET " + attest.PathRevocations, handler: a.revocations, own: true},
	}
}

type api struct {
	service *Service
	log     *slog.Logger
	limits  *limiter
	work    chan struct{}
	ramp    *ramp
	// downloads is the places for those who fetch an image.
	downloads chan struct{}
	bodies    sync.Pool // *bytes.Buffer: evidence, of which nothing is kept
}

// limited applies the limits by address and of work at once.
func (a *api) limited(h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if !a.allow(w, r) {
			return
		}
		if !a.turn(r.Context()) {
			a.service.metrics.told.WithLabelValues("line").Inc()
			busy(w, http.StatusServiceUnavailable, "verifier is busy", scatter(maxLine), nil)
			return
		}
		defer a.done()
		h(w, r)
	}
}

// allow applies the limit by address.
func (a *api) allow(w http.ResponseWriter, r *http.Request) bool {
	from, err := netip.ParseAddrPort(r.RemoteAddr)
	if err == nil && a.limits.allow(network(from.Addr())) {
		return true
	}
	a.service.metrics.told.WithLabelValues("address").Inc()
	busy(w, http.StatusTooManyRequests, "too many requests from this address", scatter(idleTime), nil)
	return false
}

// turn waits until a request may be worked on, and done ends that.
func (a *api) turn(ctx context.Context) bool {
	select {
	case a.work <- struct{}{}:
		return true
	default:
	}
	late := time.NewTimer(maxLine)
	defer late.Stop()
	select {
	case a.work <- struct{}{}:
		return true
	case <-ctx.Done():
	case <-late.C:
	}
	return false
}

func (a *api) done() { <-a.work }

// scatter is a time between t and twice that, at random: whoever is sent away
// for it does not come back with all others.
func scatter(t time.Duration) time.Duration { return t + rand.N(t) }

// busy tells a device to come back later, on another connection.
func busy(w http.ResponseWriter, code int, detail string, wait time.Duration, ticket []byte) {
	w.Header().Set("Retry-After", strconv.Itoa(int((wait+time.Second-1)/time.Second)))
	w.Header().Set("Connection", "close")
	reply(w, code, attest.Busy{Reason: attest.ReasonBusy, Detail: detail + "; try again later", RetryAfter: wait.Milliseconds(), Ticket: ticket})
}

func (a *api) begin(w http.ResponseWriter, r *http.Request) {
	var req attest.EnrolRequest
	if !a.decode(w, r, &req) {
		return
	}
	c, err := a.service.Begin(r.Context(), req)
	a.answer(w, r, "enrol begin", c, err)
}

func (a *api) finish(w http.ResponseWriter, r *http.Request) {
	var req attest.EnrolAnswer
	if !a.decode(w, r, &req) {
		return
	}
	e, err := a.service.Finish(r.Context(), req)
	if err == nil {
		a.service.metrics.enrolled.Inc()
		a.log.Info("enrolled", "device", e.Device, "from", r.RemoteAddr)
	}
	a.answer(w, r, "enrol finish", e, err)
}

func (a *api) challenge(w http.ResponseWriter, r *http.Request) {
	var req attest.ChallengeRequest
	if !a.allow(w, r) || !a.decode(w, r, &req) {
		return
	}
	wait, ticket := a.ramp.admit(req.Device, req.Ticket)
	if wait > rampHold {
		a.service.metrics.told.WithLabelValues("ramp").Inc()
		busy(w, http.StatusServiceUnavailable, "many laptops attest at once", wait, ticket)
		return
	}
	if wait > 0 {
		place := time.NewTimer(wait)
		defer place.Stop()
		select {
		case <-place.C:
		case <-r.Context().Done():
			return
		}
	}
	reply(w, http.StatusOK, a.service.Challenge(req))
}

func (a *api) attest(w http.ResponseWriter, r *http.Request) {
	body, ok := a.bodies.Get().(*bytes.Buffer)
	if !ok {
		body = new(bytes.Buffer)
	}
	defer func() {
		body.Reset()
		a.bodies.Put(body)
	}()
	// One byte over the limit is enough for the appraisal to say so.
	if n := r.ContentLength; n > 0 && n <= attest.MaxEvidence {
		body.Grow(int(n) + bytes.MinRead)
	}
	if _, err := body.ReadFrom(io.LimitReader(r.Body, attest.MaxEvidence+1)); err != nil {
		reply(w, http.StatusBadRequest, attest.Refuse(attest.ReasonRequestMalformed, "request body ended early"))
		return
	}
	a.ramp.enter()
	defer a.ramp.leave()
	if !a.turn(r.Context()) {
		a.service.metrics.told.WithLabelValues("line").Inc()
		busy(w, http.StatusServiceUnavailable, "verifier is busy", scatter(maxLine), nil)
		return
	}
	begin := time.Now()
	resp, err := func() (*attest.AttestResponse, error) {
		defer a.done()
		return a.service.Attest(r.Context(), body.Bytes())
	}()
	if err == nil {
		if from, e := netip.ParseAddrPort(r.RemoteAddr); e == nil && (resp.Result.Report != "" || resp.Result.Status == attest.StatusAffirming) {
			a.limits.refund(network(from.Addr()))
		}
		res := resp.Result
		a.service.metrics.result(res, time.Since(begin))
		a.log.Info("appraised", "device", res.Device, "status", res.Status, "reason", res.Reason, "detail", res.Detail, "from", r.RemoteAddr)
	}
	a.answer(w, r, "attest", resp, err)
}

// answer sends v or, if err is a refusal, that; other errors stay here.
func (a *api) answer(w http.ResponseWriter, r *http.Request, what string, v any, err error) {
	var why *attest.Refusal
	switch {
	case err == nil:
		reply(w, http.StatusOK, v)
	case errors.As(err, &why):
		a.log.Warn("refused", "request", what, "reason", why.Reason, "detail", why.Detail, "from", r.RemoteAddr)
		a.service.metrics.refused.WithLabelValues(what, why.Reason.String()).Inc()
		if why.Reason == attest.ReasonBusy {
			busy(w, http.StatusServiceUnavailable, why.Detail, scatter(maxLine), nil)
			return
		}
		reply(w, http.StatusForbidden, why)
	default:
		a.log.Error("failed", "request", what, "error", err, "from", r.RemoteAddr)
		reply(w, http.StatusInternalServerError, attest.Refuse(attest.ReasonNone, "verifier failed; its log says why"))
	}
}

func (a *api) decode(w http.ResponseWriter, r *http.Request, v any) bool {
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, attest.MaxMessage))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		reply(w, http.StatusBadRequest, attest.Refuse(attest.ReasonRequestMalformed, "request: %v", err))
		return false
	}
	return true
}

func reply(w http.ResponseWriter, code int, v any) {
	data, err := json.Marshal(v)
	if err != nil {
		code, data = http.StatusInternalServerError, []byte("{}")
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	w.Write(append(data, '\n'))
}

// limiter is one token bucket for each address.
type limiter struct {
	now func() time.Time

	mu      sync.Mutex
	buckets map[netip.Addr]bucket
}

type bucket struct {
	tokens float64
	at     time.Time
}

func newLimiter(now func() time.Time) *limiter {
	return &limiter{now: now, buckets: make(map[netip.Addr]bucket)}
}

// network is what counts as one address: of IPv6, where a single host has as
// many as it likes, the first 64 bits (RFC 4291, section 2.5.4).
func network(a netip.Addr) netip.Addr {
	a = a.Unmap()
	if p, err := a.Prefix(64); a.Is6() && err == nil {
		return p.Addr()
	}
	return a
}

func (l *limiter) allow(from netip.Addr) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	b, ok := l.buckets[from]
	if !ok {
		if len(l.buckets) >= maxAddresses {
			l.sweep(now)
		}
		b = bucket{rateBurst, now}
	}
	b.tokens = min(rateBurst, b.tokens+max(0, now.Sub(b.at).Seconds())*ratePerSecond)
	b.at = now
	ok = b.tokens >= 1
	if ok {
		b.tokens--
	}
	l.buckets[from] = b
	return ok
}

// refund gives back what a request took: it was a genuine device's.
func (l *limiter) refund(from netip.Addr) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if b, ok := l.buckets[from]; ok {
		b.tokens = min(rateBurst, b.tokens+1)
		l.buckets[from] = b
	}
}

// sweep forgets addresses whose bucket is full again, or all of them when that
// frees nothing: memory is bounded, and the limit on work at once remains.
func (l *limiter) sweep(now time.Time) {
	for a, b := range l.buckets {
		if now.Sub(b.at).Seconds()*ratePerSecond >= rateBurst {
			delete(l.buckets, a)
		}
	}
	if len(l.buckets) >= maxAddresses {
		clear(l.buckets)
	}
}
