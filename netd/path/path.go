// Package path asks the organisation's own servers, by address, two things that
// nobody else can answer: whether the path to them is theirs, and what time it
// is.
//
// A question is a TLS 1.3 handshake with a chain of the organisation's CA. The
// handshake is the signed answer to a fresh challenge: the server's key signs
// the client's random (RFC 8446, section 4.4.3). What a captive portal answers
// in a server's place, be it HTTP status 204, a redirection or a certificate of
// its own, is no such answer, and tells the portal from a path that is silent.
//
// The time is the Date of the verifier's answer over that connection. Because
// the laptop's clock may be anything, chains are judged at the earliest moment
// that can be: the floor, which is when the organisation's CA began or what
// signed time was seen last, before a restart too (Kept). The time that a server
// signs has to be one at which its own chain is valid.
package path

import (
	"crypto/x509"
	"errors"
	"fmt"
	"time"
)

// Answer is who answered at a server's address. The zero value is nobody.
type Answer uint8

// The answers.
const (
	Silent  Answer = 0 // nobody, or an error of the network
	Foreign Answer = 1 // somebody else
	Ours    Answer = 2 // the server itself
)

func (a Answer) String() string {
	switch a {
	case Foreign:
		return "foreign"
	case Ours:
		return "ours"
	}
	return "silent"
}

// Portal reports whether somebody else answers in place of the servers, and
// none of these does.
func Portal(answers []Answer) bool {
	foreign := false
	for _, a := range answers {
		if a == Ours {
			return false
		}
		foreign = foreign || a == Foreign
	}
	return foreign
}

// Tolerance is how far the laptop's clock may be off: an HTTP Date is of whole
// seconds.
const Tolerance = 5 * time.Second

// ErrBehind is wrapped by Correct's error for a time from before the floor.
var ErrBehind = errors.New("signed time is from before what is known to be past")

// Correct returns the right time when a signed time arrives that took trip to
// ask for, and whether the local clock has to be set. A time before the floor
// is refused: whoever signed it, it is not now.
func Correct(local, signed time.Time, trip time.Duration, floor time.Time) (right time.Time, set bool, err error) {
	right = signed.Add(trip/2 + time.Second/2)
	if right.Before(floor.Add(-Tolerance)) {
		return local, false, fmt.Errorf("%w: %s, known %s", ErrBehind, signed.UTC().Format(time.RFC3339), floor.UTC().Format(time.RFC3339))
	}
	return right, right.Sub(local).Abs() > Tolerance, nil
}

// Floor is the earliest that it can be: the moment when the youngest of the
// organisation's roots began.
func Floor(roots []*x509.Certificate) (floor time.Time) {
	for _, c := range roots {
		if c.NotBefore.After(floor) {
			floor = c.NotBefore
		}
	}
	return floor
}

// within reports whether a chain is valid at a moment, give or take Tolerance.
func within(chain []*x509.Certificate, at time.Time) error {
	for _, c := range chain {
		if at.Add(Tolerance).Before(c.NotBefore) || at.Add(-Tolerance).After(c.NotAfter) {
			return fmt.Errorf("signed time %s, but the signer's certificate is for %s to %s",
				at.UTC().Format(time.RFC3339), c.NotBefore.UTC().Format(time.RFC3339), c.NotAfter.UTC().Format(time.RFC3339))
		}
	}
	return nil
}

// verify judges a chain by roots at the earliest moment from floor on at which
// it can be valid, whatever the local clock says.
func verify(chain []*x509.Certificate, roots *x509.CertPool, name string, floor time.Time) error {
	if len(chain) == 0 {
		return errors.New("no certificate")
	}
	at, between := floor, x509.NewCertPool()
	for i, c := range chain {
		if c.NotBefore.After(at) {
			at = c.NotBefore
		}
		if i > 0 {
			between.AddCert(c)
		}
	}
	_, err := chain[0].Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: between, DNSName: name, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	return err
}
