package gateway

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"sekisho/attest"
	"sekisho/netd"
)

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
	Carriage string        `json:"carriage"` // HTTP/1.1 (TLS on TCP) or HTTP/3
	Since    time.Time     `json:"since"`
	Until    time.Time     `json:"until"`
	Counters netd.Counters `json:"counters"`
}

// Status returns what the server does.
func (s *Server) Status() Status {
	s.mu.RLock()
	var list []*session
	for _, l := range s.devices {
		list = append(list, l.current)
	}
	st := Status{State: "serving", Since: s.since, Listen: s.config.Listen.String(), Pool: s.config.Pool, Refused: s.refused, Counters: s.ended}
	if s.sources != nil {
		st.Crowded = s.sources.refused.Load()
	}
	s.mu.RUnlock()
	st.Leases = s.leases.Len()
	for _, sess := range list {
		c := sess.stream.Counters()
		add(&st.Counters, c)
		st.Sessions = append(st.Sessions, Session{sess.device, sess.inner[0], sess.remote, sess.carriage, sess.since, sess.until, c})
	}
	slices.SortFunc(st.Sessions, func(a, b Session) int { return a.Inner.Compare(b.Inner) })
	st.Detail = fmt.Sprintf("%d sessions", len(list))
	return st
}
