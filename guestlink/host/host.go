//go:build linux

// Package host is the host domain's end of the guest link as a daemon: it
// joins listener, pump and API socket, and says where it stands.
package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"sekisho/guestlink"
	"sekisho/guestlink/packet"
)

// Status is what GET /v1/status answers.
type Status struct {
	State     string            `json:"state"` // "waiting" or "linked"
	Since     time.Time         `json:"since"`
	Reason    string            `json:"reason"` // "no-guest", "link-lost", "stalled", "bad-frame" or empty
	Detail    string            `json:"detail"`
	CID       uint32            `json:"cid"`
	Transport string            `json:"transport"` // "vsock" or "serial"
	Link      *Link             `json:"link"`      // null: no link is up
	Guest     guestlink.Status  `json:"guest"`
	Power     *guestlink.Power  `json:"power,omitempty"` // the guest's last answer
	Config    *guestlink.Config `json:"config"`          // null: nothing is carried
	Counters  packet.Counters   `json:"counters"`
	Refused   uint64            `json:"refused"` // connections of other context ids
}

// Link is what is in force on the link.
type Link struct {
	Version      uint16   `json:"version"`
	Capabilities []string `json:"capabilities"`
	Batch        uint32   `json:"batch"`  // bytes
	RTT          int64    `json:"rtt_us"` // of the last probe, in microseconds; 0: none yet
}

// Server is the host end. Make it with New.
type Server struct {
	// Serial says that links come over a virtio-serial port. Set before Run.
	Serial bool

	pump    *packet.Pump
	cid     uint32
	refused func() uint64
	notify  func(status string)
	now     func() time.Time
	log     *slog.Logger
	users   []uint32

	mu     sync.Mutex
	status Status
}

// New returns a Server that carries packets between dev and the guest with
// context id cid. Notify is told the status line of the service protocol at
// every change; refused counts connections that the listener closed. Beside
// root, only users may use the API. Packets that policy does not carry are
// dropped both ways.
func New(dev packet.PacketDevice, cid uint32, policy guestlink.Policy, users []uint32, refused func() uint64, notify func(string), now func() time.Time, log *slog.Logger) *Server {
	s := &Server{cid: cid, users: users, refused: refused, notify: notify, now: now, log: log}
	s.pump = packet.NewHost(dev, func(g guestlink.Status) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.status.Guest = g
	})
	s.pump.Now, s.pump.Policy = now, policy
	s.pump.PowerAnswer = func(a guestlink.Power) {
		s.mu.Lock()
		s.status.Power = &a
		s.mu.Unlock()
		s.log.Info("the guest answers", "action", a.Action, "answer", a.Answer, "detail", a.Detail)
	}
	s.set("waiting", "no-guest", "no guest has connected yet")
	return s
}

func (s *Server) set(state, reason, detail string) {
	s.mu.Lock()
	s.status.State, s.status.Reason, s.status.Detail = state, reason, detail
	s.status.Since = s.now()
	s.status.Guest = guestlink.Status{}
	s.mu.Unlock()
	// English first: the kernel's console has no glyphs for Japanese.
	line := "waiting for the work domain / 業務領域の接続待ち"
	if state == "linked" {
		line = fmt.Sprintf("linked cid %d / 業務領域と接続中", s.cid)
	}
	s.notify(line)
}

// Run serves links, and the API on each of apis, until ctx is done or the
// device or a listener fails.
func (s *Server) Run(ctx context.Context, links net.Listener, apis ...net.Listener) error {
	parent := ctx
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.pump.Run(ctx) })
	g.Go(func() error { return s.pump.Listen(ctx, links, s.changed) })
	for _, l := range apis {
		srv := &http.Server{
			Handler:           restrict(s.handler(), s.users),
			ConnContext:       withPeer,
			ReadHeaderTimeout: 5 * time.Second,
			ReadTimeout:       10 * time.Second,
			WriteTimeout:      10 * time.Second,
			IdleTimeout:       time.Minute,
			MaxHeaderBytes:    8 << 10,
		}
		g.Go(func() error { return srv.Serve(l) })
		g.Go(func() error { <-ctx.Done(); srv.Close(); return ctx.Err() })
	}
	err := g.Wait()
	if parent.Err() != nil {
		return parent.Err() // the end was asked for, whatever ended first
	}
	return err
}

func (s *Server) changed(up bool, cause error) {
	if up {
		s.log.Info("guest linked", "cid", s.cid)
		s.set("linked", "", "the work domain is linked")
		return
	}
	reason := "link-lost"
	if errors.Is(cause, os.ErrDeadlineExceeded) {
		reason = "stalled"
	}
	if guestlink.ReasonOf(cause) != guestlink.ReasonNone {
		reason = "bad-frame"
	}
	s.log.Warn("link ended", "reason", reason, "cause", cause)
	s.set("waiting", reason, "the link ended: "+cause.Error())
}

// Status returns where the host end stands.
func (s *Server) Status() Status {
	s.mu.Lock()
	st := s.status
	s.mu.Unlock()
	st.CID, st.Counters, st.Refused = s.cid, s.pump.Counters(), s.refused()
	if st.Transport = "vsock"; s.Serial {
		st.Transport = "serial"
	}
	if c, ok := s.pump.Config(); ok {
		st.Config = &c
	}
	if agreed, rtt, up := s.pump.Link(); up {
		st.Link = &Link{
			Version: agreed.Version, Capabilities: agreed.Capabilities.Words(),
			Batch: agreed.Batch, RTT: rtt.Microseconds(),
		}
	}
	return st
}

// Alive reports whether the host end runs. It blocks for as long as a lock that
// the packets and the API need is held.
func (s *Server) Alive() bool {
	s.Status()
	return !s.pump.Hangs()
}

// handler answers GET /v1/status, PUT /v1/config and POST /v1/power.
func (s *Server) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(s.Status())
	})
	mux.HandleFunc("PUT /v1/config", func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, guestlink.MaxControl))
		if err != nil {
			http.Error(w, err.Error(), http.StatusRequestEntityTooLarge)
			return
		}
		c, err := guestlink.ParseConfig(body)
		if err == nil {
			err = s.pump.SetConfig(c)
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("POST /v1/power", func(w http.ResponseWriter, r *http.Request) {
		const limit = 256
		var ask struct {
			Action guestlink.Action `json:"action"`
		}
		d := json.NewDecoder(http.MaxBytesReader(w, r.Body, limit))
		d.DisallowUnknownFields()
		if err := d.Decode(&ask); err != nil || ask.Action == guestlink.ActionNone {
			http.Error(w, `want {"action":"shutdown"} or {"action":"suspend"}`, http.StatusBadRequest)
			return
		}
		id, err := s.pump.RequestPower(ask.Action)
		if err != nil {
			http.Error(w, err.Error(), http.StatusConflict)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusAccepted)
		json.NewEncoder(w).Encode(guestlink.Power{ID: id, Action: ask.Action})
	})
	return mux
}

// restrict lets through only requests of root and of the users uids.
func restrict(h http.Handler, uids []uint32) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		uid, ok := r.Context().Value(peerKey{}).(uint32)
		if !ok || (uid != 0 && !slices.Contains(uids, uid)) {
			http.Error(w, "this user may not use this socket", http.StatusForbidden)
			return
		}
		h.ServeHTTP(w, r)
	})
}

type peerKey struct{}

// withPeer notes the user at the other end of a unix socket (SO_PEERCRED,
// unix(7)). Without one the request is refused by restrict.
func withPeer(ctx context.Context, c net.Conn) context.Context {
	if uid, ok := PeerUID(c); ok {
		return context.WithValue(ctx, peerKey{}, uid)
	}
	return ctx
}

// PeerUID returns the user at the other end of a unix socket, and false when it
// is not known.
func PeerUID(c net.Conn) (uint32, bool) {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return 0, false
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return 0, false
	}
	var cred *unix.Ucred
	raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err != nil || cred == nil {
		return 0, false
	}
	return cred.Uid, true
}
