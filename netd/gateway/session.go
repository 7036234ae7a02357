package gateway

import (
	"context"
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"sekisho/attest"
	"sekisho/netd/tunnel"
	"sekisho/netd/tunnel/connectip"
)

// tickEvery is how often sessions are looked at for their end.
const tickEvery = time.Second

// perDevice is how many sessions a device may have open at once: the present
// one, one that takes its place, and those on their way out.
const perDevice = 4

// errRevoked ends the sessions of a revoked device.
var errRevoked = errors.New("device is revoked")

// errTooMany ends the oldest of a device's sessions.
var errTooMany = errors.New("device has opened too many others")

// laptop is a device with at least one session. A laptop opens the next session
// before it leaves the last, and may open two at a time to see which gets
// through: the newest that it has used for anything is the present one.
type laptop struct {
	sessions []*session // in order of admission
	current  *session   // packets go there
}

// session is one connection of a laptop.
type session struct {
	stream   *connectip.Stream
	device   attest.Digest
	holder   attest.Holder
	inner    []netip.Addr // IPv4, and IPv6 if there is any
	remote   string
	carriage string
	since    time.Time
	until    time.Time
	used     atomic.Bool // the laptop has sent something
}

// start registers a session and carries it until it ends, ctx being done among
// the reasons. Serve waits for it.
func (s *Server) start(ctx context.Context, sess *session) {
	stream := sess.stream
	stream.OnPackets = func(packets [][]byte) int {
		s.use(sess)
		honest := packets[:0]
		for _, p := range packets {
			if fromSource(p, sess.inner) {
				honest = append(honest, p)
			}
		}
		_ = s.dev.Write(honest) // what the kernel refuses is lost, as on any wire
		return len(packets) - len(honest)
	}
	stream.OnTrain = func(f tunnel.Frame) error {
		s.use(sess)
		if err := f.Check(s.config.MTU); err != nil {
			return err
		}
		if !fromSource(f.Packet(), sess.inner) {
			return errSpoofed
		}
		_ = s.dev.WriteFrame(f)
		return nil
	}
	stream.OnRequest = func(asked []connectip.Request) error {
		s.use(sess)
		stream.Assign(sess.inner, asked...)
		return nil
	}
	s.mu.Lock()
	if ctx.Err() != nil {
		s.mu.Unlock()
		s.leave(sess.device)
		stream.Close()
		return
	}
	l := s.devices[sess.device]
	if l == nil {
		l = &laptop{current: sess}
		s.devices[sess.device] = l
		for _, a := range sess.inner {
			s.byInner[a.As16()] = l
		}
	}
	l.sessions = append(l.sessions, sess)
	var excess *session
	if len(l.sessions) > perDevice {
		excess = l.sessions[0]
	}
	s.running.Go(func() { s.run(ctx, l, sess) })
	s.mu.Unlock()
	if excess != nil {
		excess.stream.End(errTooMany)
	}
}

// run carries a registered session to its end.
func (s *Server) run(ctx context.Context, l *laptop, sess *session) {
	defer s.leave(sess.device)
	s.log.Info("session open", "device", sess.device, "inner", sess.inner, "remote", sess.remote, "carriage", sess.carriage, "until", sess.until)
	sess.stream.Assign(sess.inner)
	sess.stream.AdvertiseEverything(sess.inner)

	err := sess.stream.Run(ctx)

	c := sess.stream.Counters()
	s.mu.Lock()
	l.sessions = slices.DeleteFunc(l.sessions, func(o *session) bool { return o == sess })
	switch n := len(l.sessions); {
	case n == 0:
		delete(s.devices, sess.device)
		for _, a := range sess.inner {
			delete(s.byInner, a.As16())
		}
	case l.current == sess:
		l.current = l.sessions[n-1]
	}
	add(&s.ended, c)
	s.mu.Unlock()
	s.log.Info("session closed", "device", sess.device, "inner", sess.inner, "reason", err, "dropped", c.Dropped)
}

// use makes sess its laptop's present session when the laptop has used it for
// the first time, and retires the one before.
func (s *Server) use(sess *session) {
	if sess.used.Load() || sess.used.Swap(true) {
		return
	}
	s.mu.Lock()
	l := s.devices[sess.device]
	if l == nil || slices.Index(l.sessions, sess) <= slices.Index(l.sessions, l.current) {
		s.mu.Unlock()
		return
	}
	old := l.current
	l.current = sess
	s.mu.Unlock()
	old.stream.Retire()
}

// dispatch moves frames from the device to the sessions until it fails.
func (s *Server) dispatch() error {
	for {
		f, err := s.dev.Read()
		if err != nil {
			return err
		}
		to, ok := destination(f.Packet())
		if !ok {
			continue
		}
		s.mu.RLock()
		if l := s.byInner[to]; l != nil && !l.current.stream.Send(f) {
			// It is on its way out and the next was not used yet.
			for _, other := range slices.Backward(l.sessions) {
				if other.stream.Send(f) {
					break
				}
			}
		}
		s.mu.RUnlock()
	}
}

// each calls f with every session.
func (s *Server) each(f func(*session)) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, l := range s.devices {
		for _, sess := range l.sessions {
			f(sess)
		}
	}
}

// tick ends sessions that are dead, whose certificate has lapsed, or whose device
// was revoked between its admission and its first packet.
func (s *Server) tick(ctx context.Context) {
	beat := time.NewTicker(tickEvery)
	defer beat.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-beat.C:
			s.each(func(sess *session) {
				s.endRevoked(sess)
				sess.stream.Tick()
			})
		}
	}
}

// followRevocations ends the sessions of revoked devices.
func (s *Server) followRevocations(ctx context.Context) {
	if s.Revocations == nil {
		return
	}
	for {
		changed := s.Revocations.Changed()
		s.each(s.endRevoked)
		select {
		case <-ctx.Done():
			return
		case <-changed:
		}
	}
}

func (s *Server) endRevoked(sess *session) {
	if s.Revocations != nil && s.Revocations.Revoked(sess.holder) {
		sess.stream.End(errRevoked)
	}
}

var errSpoofed = errors.New("source is not the laptop's inner address")

// fromSource reports whether p is a whole IP packet (RFC 791, section 3.1; RFC
// 8200, section 3) whose source is one of inner.
func fromSource(p []byte, inner []netip.Addr) bool {
	var source netip.Addr
	switch {
	case len(p) >= 20 && p[0]>>4 == 4 && int(binary.BigEndian.Uint16(p[2:])) == len(p):
		source = netip.AddrFrom4([4]byte(p[12:16]))
	case len(p) >= 40 && p[0]>>4 == 6 && int(binary.BigEndian.Uint16(p[4:]))+40 == len(p):
		source = netip.AddrFrom16([16]byte(p[8:24]))
	default:
		return false
	}
	return slices.Contains(inner, source)
}

// destination returns the destination address of an IP packet, an IPv4 one in
// its IPv6-mapped form.
func destination(p []byte) ([16]byte, bool) {
	switch {
	case len(p) >= 20 && p[0]>>4 == 4:
		return netip.AddrFrom4([4]byte(p[16:20])).As16(), true
	case len(p) >= 40 && p[0]>>4 == 6:
		return [16]byte(p[24:40]), true
	}
	return [16]byte{}, false
}
