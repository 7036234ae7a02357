// Package tunnel says what netd asks of a tunnel, whatever its protocol, and
// holds the packet device that user-space protocols share. One driver per
// protocol lives in a package below.
package tunnel

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net/netip"
	"time"

	"sekisho/attest"
	"sekisho/attest/cryptrec"
	"sekisho/netd"
)

// Path is the way that a session's packets leave the laptop. A session's
// sockets are bound to its link, so that one that drains keeps its own uplink
// when another is preferred. The zero value leaves it to the kernel's routes.
type Path struct {
	Link    string     // the uplink
	Source  netip.Addr // its IPv4 address, if it has one
	Source6 netip.Addr // its IPv6 address, if it has one
	MTU     int        // of outer packets, in bytes, if the way is known to swallow longer ones; 0 if not
}

// From returns the source address of packets to a; zero leaves it to the kernel.
func (p Path) From(a netip.Addr) netip.Addr {
	if a.Is4() {
		return p.Source
	}
	return p.Source6
}

// Reaches reports whether the path has an address of the family of a, or leaves
// it to the kernel.
func (p Path) Reaches(a netip.AddrPort) bool {
	return p.From(a.Addr()).IsValid() || !p.Source.IsValid() && !p.Source6.IsValid()
}

// Without returns the path without what a session with a does not use: one that
// differs in no more is as good for it.
func (p Path) Without(a netip.Addr) Path {
	if a.Is4() {
		p.Source6 = netip.Addr{}
	} else {
		p.Source = netip.Addr{}
	}
	return p
}

// Target is what a session is opened to and with.
type Target struct {
	Gateway    attest.Endpoint
	Roots      *x509.CertPool   // the organisation's, for the gateway's certificate
	Credential *tls.Certificate // the laptop's
	Until      time.Time        // when the session closes whatever happens
	Path       Path
	Proxy      netip.AddrPort // an HTTP proxy before the gateway; zero is none
	Agreement  cryptrec.KeyAgreement
}

// Assignment is what the gateway gave.
type Assignment struct {
	Inner  netip.Addr   // the only IPv4 address that inner packets may bear
	Inner6 netip.Addr   // the only IPv6 address, or zero if there is none
	MTU    int          // of inner packets, in bytes
	DNS    []netip.Addr // resolvers behind the tunnel
}

// Status describes the present session. The zero value is closed.
type Status struct {
	Open       bool
	Gateway    netip.AddrPort
	Assignment Assignment
	Path       Path
	Carriage   string // what carries it, for people
	Since      time.Time
	Until      time.Time
	Cipher     string
	Counters   netd.Counters
	// Suspect: the path was asked for a sign of life and gave none. The session
	// may recover; who has another way should take it.
	Suspect bool
	// Err says why the session is not open. It is nil if there has been none.
	Err error
	// Changed is closed with the next change that nobody asked for: an end, a
	// suspicion or its end, another carriage. It is nil if there has been no session.
	Changed <-chan struct{}
}

// Driver speaks one tunnel protocol. The consumer is netd's daemon; an IKEv2
// driver, whose packets never leave the kernel, fits as well as one that
// carries them itself: Up is an initiation, Rebind is MOBIKE (RFC 4555).
type Driver interface {
	// Up opens a session and makes it the one that carries packets. A session
	// that was open carries them until then (make before break): this is how a
	// tunnel moves to another gateway or a renewed certificate. After an error
	// the earlier session, if any, is as it was.
	Up(ctx context.Context, to Target) (Assignment, error)
	// Rebind moves the open session to another path, make before break as well.
	// Inner addresses, gateway and certificate stay.
	Rebind(ctx context.Context, path Path) error
	// Status returns the present session, or the last one.
	Status() Status
	// Down closes the session, if one is open.
	Down()
}
