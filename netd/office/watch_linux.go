package office

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	mrand "math/rand/v2"
	"net"
	"net/netip"
	"time"

	"sekisho/attest"
	"sekisho/attest/cryptrec"
)

// protocol is the beacon's in ALPN (RFC 7301).
const protocol = "sekisho-office"

const (
	dialEnd   = 3 * time.Second // of connecting and shaking hands
	roundEnd  = time.Second     // of one question
	firstWait = 250 * time.Millisecond
	// A beacon is looked for, and a proven office begun anew with a full
	// handshake, every 15 to 30 s at random.
	anewMin, anewSpread = 15 * time.Second, 15 * time.Second
)

// Path is an uplink on which an office may be. The zero value is none.
type Path struct {
	Link     string
	Index    int          // of the link
	Flaps    uint32       // how often its carrier has come or gone: after it, the LAN is another
	Address  netip.Prefix // the laptop's on it
	Hardware string       // the link's hardware address
}

// Proof is that a LAN is an office. The zero value is none.
type Proof struct {
	Path     Path           // where it holds and nowhere else
	Site     string         // of the organisation
	Beacon   netip.AddrPort // that said so
	Networks []netip.Prefix // to be reached over the LAN directly
	Until    time.Time      // unless renewed
}

// Finding is what a Watcher knows. Proof is zero unless the office is proven;
// Why then says what came of the last attempt, empty if there was none.
type Finding struct {
	Proof Proof
	Trip  time.Duration // of the last answer
	Why   string
}

// Watcher looks for the organisation's beacons on an uplink.
type Watcher struct {
	Office       *attest.Office
	KeyAgreement cryptrec.KeyAgreement // the least that a beacon is believed with
	// Credential returns the laptop's certificate.
	Credential func(context.Context) (*tls.Certificate, error)
	Neighbour  Neighbour
	// Report is called with every change by Run's goroutine. It must not block.
	Report func(Finding)
	Log    *slog.Logger
}

// Run watches the paths that arrive on paths, each in place of the one before,
// until ctx is done. A new path is a LAN not proven yet.
func (w *Watcher) Run(ctx context.Context, paths <-chan Path) {
	for p := (Path{}); ; {
		following, cancel := context.WithCancel(ctx)
		done := make(chan struct{})
		go func() {
			defer close(done)
			w.follow(following, p)
		}()
		select {
		case <-ctx.Done():
		case p = <-paths:
		}
		cancel()
		<-done
		w.Report(Finding{})
		if ctx.Err() != nil {
			return
		}
	}
}

// follow keeps one path's finding until ctx is done. Only a beacon on the
// link's own prefix can prove it: others are behind a router.
func (w *Watcher) follow(ctx context.Context, p Path) {
	var near []attest.Beacon
	for _, b := range w.Office.Beacons {
		if b.Address.Addr() != p.Address.Addr() && p.Address.IsValid() && p.Address.Contains(b.Address.Addr()) {
			near = append(near, b)
		}
	}
	if len(near) == 0 {
		return
	}
	roots, err := w.Office.Roots()
	if err != nil {
		w.Log.Error("no office", "err", err)
		return
	}
	bound := w.Office.MaxRoundTripMS
	if bound == 0 {
		bound = attest.DefaultRoundTripMS
	}
	v := visit{w: w, path: p, roots: roots, decision: Decision{Bound: time.Duration(bound) * time.Millisecond}}
	pause := firstWait
	for i := 0; ctx.Err() == nil; i++ {
		b := near[i%len(near)]
		err := v.ask(ctx, b)
		if ctx.Err() != nil {
			return
		}
		w.Log.Info("office", "beacon", b.Address, "link", p.Link, "err", err)
		if errors.Is(err, ErrRefused) {
			v.decision.Refused(time.Now())
		}
		v.report(Statement{}, b, 0, err.Error())
		if v.asked {
			pause = firstWait // there was an office a moment ago
		}
		v.asked = false
		sleep(ctx, pause/2+mrand.N(pause/2))
		if pause *= 2; pause > anewMin {
			pause = anewMin + mrand.N(anewSpread)
		}
	}
}

// visit is what is known of one path.
type visit struct {
	w        *Watcher
	path     Path
	roots    *x509.CertPool
	decision Decision
	asked    bool // a statement was good since asked was last cleared
	said     Finding
}

// ask questions b until it fails to answer. A connection is replaced by a new
// one, with a full handshake, while it still answers.
func (v *visit) ask(ctx context.Context, b attest.Beacon) error {
	s, err := v.open(ctx, b)
	if err != nil {
		return err
	}
	defer func() { s.conn.Close() }()
	anew := time.Now().Add(anewMin + mrand.N(anewSpread))
	for {
		statement, trip, err := s.round(ctx)
		if err != nil {
			return err
		}
		now := time.Now()
		v.asked = true
		v.decision.Good(now, trip, time.Duration(statement.Life)*time.Millisecond)
		_, open := v.decision.Open(now)
		why := ""
		if !open {
			why = fmt.Sprintf("beacon %s answers after %v, bound %v", b.Address, trip.Round(time.Microsecond), v.decision.Bound)
		}
		v.report(statement, b, trip, why)
		if now.After(anew) {
			next, err := v.open(ctx, b)
			if err != nil {
				return err
			}
			s.conn.Close()
			s, anew = next, now.Add(anewMin+mrand.N(anewSpread))
		}
		pause := Every
		if !open && len(v.decision.trips) < window {
			pause = 10 * time.Millisecond
		}
		sleep(ctx, pause)
	}
}

// report tells what the decision now is, if that is news or moves its end.
func (v *visit) report(s Statement, b attest.Beacon, trip time.Duration, why string) {
	f := Finding{Trip: trip, Why: why}
	if until, open := v.decision.Open(time.Now()); open {
		f = v.said
		if s.Site != "" {
			f = Finding{Trip: trip, Proof: Proof{Path: v.path, Site: s.Site, Beacon: b.Address, Networks: s.Networks}}
		}
		f.Proof.Until = until
	}
	v.said = f
	v.w.Report(f)
}

// session is an open connection to a beacon.
type session struct {
	conn     *tls.Conn
	in       lines
	beacon   attest.Beacon
	question Question // but for the nonce
	v        *visit
}

// open connects to b over the path's interface. A nil error proves that b
// showed a certificate of the office CA for its name, with algorithms of the
// list in force.
func (v *visit) open(ctx context.Context, b attest.Beacon) (*session, error) {
	ctx, cancel := context.WithTimeout(ctx, dialEnd)
	defer cancel()
	credential, err := v.w.Credential(ctx)
	if err != nil {
		return nil, err
	}
	d := net.Dialer{Control: bind(v.path.Link), KeepAlive: -1, LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(v.path.Address.Addr(), 0))}
	raw, err := d.DialContext(ctx, "tcp4", b.Address.String())
	if err != nil {
		return nil, err
	}
	config := v.w.KeyAgreement.Config()
	config.RootCAs, config.ServerName, config.Certificates, config.NextProtos = v.roots, b.ServerName, []tls.Certificate{*credential}, []string{protocol}
	conn := tls.Client(raw, config)
	if err := conn.HandshakeContext(ctx); err != nil {
		raw.Close()
		var timeout net.Error
		if errors.As(err, &timeout) && timeout.Timeout() || ctx.Err() != nil {
			return nil, err
		}
		return nil, fmt.Errorf("%w: %w", ErrRefused, err)
	}
	local, err := netip.ParseAddrPort(raw.LocalAddr().String())
	if err == nil {
		err = v.w.KeyAgreement.Check(conn.ConnectionState())
	}
	if err != nil {
		raw.Close()
		return nil, fmt.Errorf("%w: %w", ErrRefused, err)
	}
	return &session{conn: conn, in: lines{r: conn}, beacon: b, v: v, question: Question{Laptop: local, Hardware: v.path.Hardware, Beacon: b.Address}}, nil
}

// round asks one question and verifies the answer.
func (s *session) round(ctx context.Context) (Statement, time.Duration, error) {
	var a Answer
	q := s.question
	q.Nonce = make([]byte, NonceSize)
	rand.Read(q.Nonce)
	start := time.Now()
	s.conn.SetDeadline(start.Add(roundEnd))
	stop := context.AfterFunc(ctx, func() { s.conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := write(s.conn, q); err != nil {
		return Statement{}, 0, err
	}
	if err := s.in.read(&a); err != nil {
		var alert *net.OpError
		if errors.As(err, &alert) && alert.Op == "remote error" { // the beacon does not want our certificate
			err = fmt.Errorf("%w: %w", ErrRefused, err)
		}
		return Statement{}, 0, err
	}
	trip := time.Since(start)
	hardware, err := s.v.w.Neighbour(s.v.path.Link, s.beacon.Address.Addr())
	if err != nil {
		return Statement{}, 0, fmt.Errorf("hardware address of %s: %w", s.beacon.Address.Addr(), err)
	}
	statement, err := Verify(a, q, s.conn.ConnectionState(), s.beacon.Site, hardware.String())
	return statement, trip, err
}

// sleep returns after d, or when ctx is done.
func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
