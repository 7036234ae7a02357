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
	"sekisho/netd"
)

// Target is what a session is opened to and with.
type Target struct {
	Gateway    attest.Endpoint
	Roots      *x509.CertPool   // the organisation's, for the gateway's certificate
	Credential *tls.Certificate // the laptop's
	Until      time.Time        // when the session closes whatever happens
	Source     netip.Addr       // the uplink's address
	// Link is the uplink's device. A session's sockets are bound to it
	// (SO_BINDTODEVICE), so that a session that drains keeps its own uplink
	// when another is preferred. Empty binds to none.
	Link string
}

// Assignment is what the gateway gave.
type Assignment struct {
	Inner netip.Addr   // the only address that inner packets may bear
	MTU   int          // of inner packets, in bytes
	DNS   []netip.Addr // resolvers behind the tunnel
}

// Status describes the present session. The zero value is closed.
type Status struct {
	Open       bool
	Gateway    netip.AddrPort
	Assignment Assignment
	Since      time.Time
	Until      time.Time
	Cipher     string
	Counters   netd.Counters
	// Ended is closed when the session has ended, and Err then says why. Both
	// are nil if there has been none.
	Ended <-chan struct{}
	Err   error
}

// Driver speaks one tunnel protocol. The consumer is netd's daemon; an IKEv2
// driver, whose packets never leave the kernel, fits as well as one that
// carries them itself.
type Driver interface {
	// Up opens a session and makes it the one that carries packets. A session
	// that was open carries them until then (make before break): this is how a
	// tunnel moves to another uplink or a renewed certificate. After an error
	// the earlier session, if any, is as it was.
	Up(ctx context.Context, to Target) (Assignment, error)
	// Status returns the present session, or the last one.
	Status() Status
	// Down closes the session, if one is open.
	Down()
}
