package connectip

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"sekisho/attest"
	"sekisho/netd/tunnel"
)

const (
	// openTimeout bounds dialling, handshake, upgrade and assignment together.
	openTimeout = 10 * time.Second
	// maxResponse bounds the gateway's response header in bytes.
	maxResponse = 8 << 10
	// headStart is what the preferred carriage has before the other is tried too
	// (as RFC 8305, section 5, gives one address family).
	headStart = 250 * time.Millisecond
	// patience is what one carriage has left when the other has failed: a
	// network that drops UDP does not say so.
	patience = 1500 * time.Millisecond
)

// Driver is the connectip tunnel.Driver. Make one with New and keep Run going.
type Driver struct {
	dev *tunnel.Device

	mu      sync.RWMutex // held for reading while a frame is queued, so that none is queued to a retired session
	current *session     // the one that carries packets, or the last that did
	live    map[*session]struct{}
	target  tunnel.Target // of current
	changed chan struct{}
	choice  chooser
	closed  bool

	opening sync.Mutex // one opening at a time
	// Only is the one carriage to be used; none lets the path decide.
	Only Carriage
}

var _ tunnel.Driver = (*Driver)(nil)

// New returns a driver that carries the packets of dev.
func New(dev *tunnel.Device) *Driver {
	return &Driver{dev: dev, live: map[*session]struct{}{}, changed: make(chan struct{})}
}

// opened is a connection to a gateway that granted a session.
type opened struct {
	stream     *Stream
	assignment tunnel.Assignment // but for the addresses
	carriage   Carriage
	tls        tls.ConnectionState
	gateway    netip.AddrPort // which of its addresses
}

// session is one open connection to a gateway.
type session struct {
	stream   *Stream
	carriage Carriage
	status   tunnel.Status // but for what changes
	cancel   context.CancelFunc
	ended    chan struct{}
	err      error // set before ended is closed
}

// Run moves frames from the device into the present session, and drops them
// while there is none, until ctx is done. It closes the device and every session.
func (d *Driver) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(ctx, func() { d.dev.Close() })
	defer stop()
	var parts sync.WaitGroup
	parts.Go(func() { d.improve(ctx) })
	var err error
	for {
		var f tunnel.Frame
		if f, err = d.dev.Read(); err != nil {
			break
		}
		d.mu.RLock()
		if d.current != nil {
			d.current.stream.Send(f)
		}
		d.mu.RUnlock()
	}
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	cancel()
	d.mu.Lock()
	d.closed = true
	d.mu.Unlock()
	d.Down()
	parts.Wait()
	return err
}

// Up implements tunnel.Driver.
func (d *Driver) Up(ctx context.Context, to tunnel.Target) (tunnel.Assignment, error) {
	d.opening.Lock()
	defer d.opening.Unlock()
	s, err := d.race(ctx, to)
	if err != nil {
		return tunnel.Assignment{}, fmt.Errorf("gateway %s: %w", to.Gateway.Address, err)
	}
	return s.status.Assignment, d.adopt(s, to)
}

// Rebind implements tunnel.Driver.
func (d *Driver) Rebind(ctx context.Context, path tunnel.Path) error {
	d.mu.RLock()
	to, open := d.target, d.current != nil && d.current.open()
	d.mu.RUnlock()
	if !open {
		return errors.New("no session to move: open one")
	}
	to.Path = path
	_, err := d.Up(ctx, to)
	return err
}

// adopt makes s the session that carries packets and retires the one before.
func (d *Driver) adopt(s *session, to tunnel.Target) error {
	d.mu.Lock()
	old := d.current
	d.current, d.target = s, to
	d.choice.at(s.carriage)
	d.change()
	d.mu.Unlock()
	s.stream.ask() // the gateway takes a session for the present one when it is used
	if old != nil {
		old.stream.Retire()
	}
	return nil
}

// change tells who waits for one. d.mu is held.
func (d *Driver) change() {
	close(d.changed)
	d.changed = make(chan struct{})
}

// Status implements tunnel.Driver.
func (d *Driver) Status() tunnel.Status {
	d.mu.RLock()
	defer d.mu.RUnlock()
	s := d.current
	if s == nil {
		return tunnel.Status{}
	}
	st := s.status
	st.Counters, st.Changed, st.Suspect = s.stream.Counters(), d.changed, s.stream.Suspect()
	if !s.open() {
		st.Open, st.Err = false, s.err
	}
	return st
}

func (s *session) open() bool {
	select {
	case <-s.ended:
		return false
	default:
		return true
	}
}

// Down implements tunnel.Driver. It returns when no connection is left.
func (d *Driver) Down() {
	d.mu.RLock()
	live := slices.Collect(maps.Keys(d.live))
	d.mu.RUnlock()
	for _, s := range live {
		s.cancel()
		<-s.ended
	}
}

// improve watches the sessions' signs of life, and moves the present one to
// another carriage as the path asks.
func (d *Driver) improve(ctx context.Context) {
	beat := time.NewTicker(Beat)
	defer beat.Stop()
	var suspect bool
	for n := 1; ; n++ {
		select {
		case <-ctx.Done():
			return
		case <-beat.C:
		}
		d.mu.Lock()
		s, to := d.current, d.target
		for l := range d.live {
			l.stream.Tick()
		}
		if s == nil || !s.open() {
			suspect = false
			d.mu.Unlock()
			continue
		}
		if now := s.stream.Suspect(); now != suspect {
			suspect = now
			d.change()
		}
		want := s.carriage
		if n%int(sampleEvery/Beat) == 0 && d.Only == 0 && !suspect && !to.Proxy.IsValid() {
			want = d.choice.step(s.stream.Sample())
		}
		d.mu.Unlock()
		if want != s.carriage && d.opening.TryLock() {
			d.move(ctx, s, to, want)
			d.opening.Unlock()
		}
	}
}

// move opens the session anew over another carriage.
func (d *Driver) move(ctx context.Context, from *session, to tunnel.Target, want Carriage) {
	ctx, cancel := context.WithTimeout(ctx, openTimeout/2)
	defer cancel()
	done := make(chan struct{})
	var s *session
	var err error
	go func() {
		defer close(done)
		s, err = d.open(ctx, to, want)
	}()
	beat := time.NewTicker(Beat) // signs of life are watched meanwhile
	defer beat.Stop()
	for waiting := true; waiting; {
		select {
		case <-done:
			waiting = false
		case <-beat.C:
			from.stream.Tick()
		}
	}
	d.mu.Lock()
	stale := d.current != from || !from.open()
	if err != nil {
		d.choice.failed()
	}
	d.mu.Unlock()
	switch {
	case err != nil:
	case stale:
		s.cancel()
	default:
		d.adopt(s, to)
	}
}

// race opens a session over whichever carriage gets there first.
func (d *Driver) race(ctx context.Context, to tunnel.Target) (*session, error) {
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	first := TLS
	d.mu.RLock()
	if d.choice.now != 0 {
		first = d.choice.now
	}
	d.mu.RUnlock()
	if d.Only != 0 {
		return d.open(ctx, to, d.Only)
	}
	if to.Proxy.IsValid() {
		return d.open(ctx, to, TLS)
	}
	type result struct {
		s   *session
		err error
	}
	results := make(chan result, 2)
	start := func(c Carriage) {
		go func() {
			s, err := d.open(ctx, to, c)
			if err != nil {
				err = fmt.Errorf("%s: %w", c, err)
			}
			results <- result{s, err}
		}()
	}
	start(first)
	running := 1
	late := time.NewTimer(headStart)
	defer late.Stop()
	second := func() {
		if late.Stop(); running == 1 {
			running++
			start(first.other())
		}
	}
	var errs []error
	for len(errs) < 2 {
		select {
		case <-late.C:
			second()
		case r := <-results:
			if r.err == nil {
				cancel()
				if running == 2 && len(errs) == 0 { // the other's end is waited for, and it is not used
					go func() {
						if r := <-results; r.s != nil {
							r.s.cancel()
						}
					}()
				}
				return r.s, nil
			}
			var refused *RefusedError
			if errors.As(r.err, &refused) {
				return nil, r.err // the other carriage leads to the same gateway
			}
			errs = append(errs, r.err)
			second()
			if len(errs) == 1 {
				defer time.AfterFunc(patience, cancel).Stop()
			}
		}
	}
	return nil, errors.Join(errs...)
}

// open connects over one carriage and waits for the first assignment.
func (d *Driver) open(ctx context.Context, to tunnel.Target, by Carriage) (*session, error) {
	dial := dialTLS
	if by == HTTP3 {
		dial = dialH3
	}
	addresses := slices.DeleteFunc(to.Gateway.Addresses(), func(a netip.AddrPort) bool { return !to.Path.Reaches(a) })
	if to.Proxy.IsValid() { // its family is the path's
		addresses = []netip.AddrPort{to.Gateway.Address}
	}
	if len(addresses) == 0 {
		return nil, fmt.Errorf("%s has no address of the family of %s", to.Path.Link, to.Gateway.Address)
	}
	o, err := attest.First(ctx, addresses, func(ctx context.Context, a netip.AddrPort) (*opened, error) {
		to := to
		to.Gateway.Address = a
		o, err := dial(ctx, to)
		if err == nil {
			o.gateway = a
		}
		return o, err
	}, func(o *opened) { o.stream.by.close() })
	if err != nil {
		return nil, err
	}
	s := &session{
		stream: o.stream, carriage: by,
		status: tunnel.Status{
			Open: true, Gateway: o.gateway, Path: to.Path, Carriage: by.String(), Since: time.Now(), Until: to.Until,
			Cipher: tls.CipherSuiteName(o.tls.CipherSuite) + " " + o.tls.CurveID.String(),
		},
		ended: make(chan struct{}),
	}
	assigned := make(chan tunnel.Assignment, 1)
	d.serve(s, o.assignment, assigned)
	// The session outlives the context of Up: Run or Down ends it.
	var life context.Context
	life, s.cancel = context.WithCancel(context.WithoutCancel(ctx))
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		s.cancel()
		s.stream.by.close()
		return nil, net.ErrClosed
	}
	d.live[s] = struct{}{}
	d.mu.Unlock()
	go func() { // Run waits for it in Down
		s.err = s.stream.Run(life)
		s.cancel()
		d.mu.Lock()
		delete(d.live, s)
		close(s.ended)
		if d.current == s {
			d.change()
		}
		d.mu.Unlock()
	}()
	select {
	case s.status.Assignment = <-assigned:
		return s, nil
	case <-s.ended:
		return nil, s.err
	case <-ctx.Done():
		s.cancel()
		<-s.ended
		return nil, fmt.Errorf("no inner address assigned: %w", ctx.Err())
	}
}

// serve sets what the session's stream does with what comes. assigned receives
// the first assignment, on top of a.
func (d *Driver) serve(s *session, a tunnel.Assignment, assigned chan<- tunnel.Assignment) {
	var first bool // touched by the stream's reader only
	mtu := a.MTU
	s.stream.Probe = true
	s.stream.OnPackets = func(packets [][]byte) int {
		// A device that is down loses them; the plan has closed it on purpose.
		_ = d.dev.Write(packets)
		return 0
	}
	s.stream.OnTrain = func(f tunnel.Frame) error {
		if err := f.Check(mtu); err != nil {
			return err
		}
		_ = d.dev.WriteFrame(f)
		return nil
	}
	s.stream.OnAssign = func(list []netip.Prefix) error {
		var v4, v6 netip.Addr
		for _, p := range list {
			addr := p.Addr()
			family := &v4
			if addr.Is6() {
				family = &v6
			}
			switch {
			case !p.IsSingleIP() || addr.IsUnspecified() || addr.IsLoopback() || addr.IsMulticast() || addr.IsLinkLocalUnicast() || addr.Is4In6():
				return fmt.Errorf("gateway assigned %s, want one unicast address", p)
			case family.IsValid() && *family != addr:
				return fmt.Errorf("gateway assigned both %s and %s", *family, addr)
			}
			*family = addr
		}
		switch {
		case !v4.IsValid():
			return errors.New("gateway assigned no IPv4 address")
		case !first:
			first = true
			a.Inner, a.Inner6 = v4, v6
			assigned <- a
		case v4 != a.Inner || v6 != a.Inner6:
			return fmt.Errorf("gateway changed the inner addresses from %s and %s to %s and %s", a.Inner, a.Inner6, v4, v6)
		}
		return nil
	}
}
