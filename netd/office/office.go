// Package office proves that the LAN behind an uplink is one of the
// organisation's offices, and that nobody else can pass for one.
//
// The proof is a beacon's: a server inside the LAN that shows a certificate of
// the organisation's office CA for its site (TLS 1.3, mutual: the laptop shows
// its own short-lived certificate), and answers a fresh nonce with a statement
// signed by that certificate's key, over that very connection. Names, SSIDs,
// addresses and hardware addresses prove nothing and are not asked for.
//
// Against relays, which pass the bytes of a true beacon on from elsewhere:
//
//   - the connection is bound to the interface of the uplink and to its address;
//   - every packet has to arrive with TTL 255, so no router was on its way
//     (RFC 5082);
//   - both ends say in the signed exchange which addresses and hardware
//     addresses they see, and these have to agree: what opens a connection of
//     its own, or translates addresses, differs;
//   - the shortest of several round trips is bounded.
//
// What is left to a relay is a transparent copy of the LAN's lowest layer over
// a distance that costs less than the bound: a longer cable.
package office

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"time"

	"sekisho/attest"
)

const (
	// NonceSize is the size of a Question's nonce in bytes.
	NonceSize = 32
	// maxMessage bounds a message of either end in bytes.
	maxMessage = 16 << 10
	// maxNetworks bounds Statement.Networks.
	maxNetworks = 64
	// MaxLife is the longest that a statement is believed.
	MaxLife = 10 * time.Second

	// domain sets our signatures apart from any other of the same key, and
	// label our use of the connection's exporter (RFC 8446, section 7.5).
	domain = "sekisho/office-statement/1"
	label  = "EXPORTER-sekisho-office"
)

// ErrRefused is wrapped by errors that say that there is a beacon, or what
// poses as one, and that it is not to be believed, or does not believe us.
var ErrRefused = errors.New("not proven to be the office")

// Question asks a beacon for a Statement.
type Question struct {
	Nonce []byte `json:"nonce"`
	// Laptop and Hardware are the addresses that the laptop's interface has,
	// Beacon the address that it opened its connection to.
	Laptop   netip.AddrPort `json:"laptop"`
	Hardware string         `json:"hardware"`
	Beacon   netip.AddrPort `json:"beacon"`
}

// Statement is what a beacon says of the LAN.
type Statement struct {
	Site  string `json:"site"`
	Nonce []byte `json:"nonce"`
	// Laptop and LaptopHardware are where the beacon sees the laptop.
	Laptop         netip.AddrPort `json:"laptop"`
	LaptopHardware string         `json:"laptop_hardware"`
	// Beacon and BeaconHardware are the beacon's own addresses there.
	Beacon         netip.AddrPort `json:"beacon"`
	BeaconHardware string         `json:"beacon_hardware"`
	// Networks are reached over the LAN directly; all else stays in the tunnel.
	Networks []netip.Prefix `json:"networks"`
	// Life is how long this holds, in milliseconds.
	Life int `json:"life_ms"`
}

// Answer carries a signed Statement, or says why there is none.
type Answer struct {
	Statement []byte `json:"statement,omitempty"` // a Statement in JSON
	Signature []byte `json:"signature,omitempty"` // ASN.1 ECDSA
	Refused   string `json:"refused,omitempty"`
}

// digest is what is signed: the statement, bound to the connection.
func digest(state tls.ConnectionState, statement []byte) ([]byte, error) {
	channel, err := state.ExportKeyingMaterial(label, nil, 32)
	if err != nil {
		return nil, fmt.Errorf("bind to the connection: %w", err)
	}
	h := sha256.New()
	io.WriteString(h, domain)
	h.Write(channel)
	h.Write(statement)
	return h.Sum(nil), nil
}

// sign answers with s over the connection of that state.
func sign(s Statement, state tls.ConnectionState, key *ecdsa.PrivateKey) (Answer, error) {
	data, err := json.Marshal(s)
	if err != nil {
		return Answer{}, err
	}
	sum, err := digest(state, data)
	if err != nil {
		return Answer{}, err
	}
	signature, err := ecdsa.SignASN1(rand.Reader, key, sum)
	return Answer{Statement: data, Signature: signature}, err
}

// Verify returns the statement in a. A nil error proves: the holder of the
// connection's certificate, which names site and nothing else, said it over
// this connection in answer to q; it sees the laptop at the very addresses that
// the laptop has, and itself has those at which the laptop sees it.
func Verify(a Answer, q Question, state tls.ConnectionState, site, beaconHardware string) (Statement, error) {
	var s Statement
	no := func(format string, args ...any) (Statement, error) {
		return Statement{}, fmt.Errorf("%w: %s", ErrRefused, fmt.Sprintf(format, args...))
	}
	if a.Refused != "" {
		return no("the beacon says: %.200q", a.Refused)
	}
	if len(state.PeerCertificates) == 0 {
		return no("no certificate")
	}
	leaf := state.PeerCertificates[0]
	if err := names(leaf, site); err != nil {
		return no("%v", err)
	}
	key, ok := leaf.PublicKey.(*ecdsa.PublicKey)
	if !ok {
		return no("certificate key of type %T", leaf.PublicKey)
	}
	sum, err := digest(state, a.Statement)
	if err != nil {
		return Statement{}, err
	}
	if !ecdsa.VerifyASN1(key, sum, a.Signature) {
		return no("statement is not signed by the beacon for this connection")
	}
	if err := json.Unmarshal(a.Statement, &s); err != nil {
		return no("statement: %v", err)
	}
	life := time.Duration(s.Life) * time.Millisecond
	switch {
	case s.Site != site:
		return no("statement is about site %.64q, want %q", s.Site, site)
	case len(q.Nonce) != NonceSize || string(s.Nonce) != string(q.Nonce):
		return no("statement answers another nonce")
	case s.Laptop != q.Laptop || s.LaptopHardware != q.Hardware:
		return no("the beacon sees us at %s (%.64s), we are %s (%s): relayed", s.Laptop, s.LaptopHardware, q.Laptop, q.Hardware)
	case s.Beacon != q.Beacon || s.BeaconHardware != beaconHardware:
		return no("the beacon is %s (%.64s), we see it at %s (%s): relayed", s.Beacon, s.BeaconHardware, q.Beacon, beaconHardware)
	case life <= 0 || life > MaxLife:
		return no("statement for %v, want up to %v", life, MaxLife)
	case len(s.Networks) > maxNetworks:
		return no("%d networks, at most %d", len(s.Networks), maxNetworks)
	}
	for _, n := range s.Networks {
		if err := CheckNetwork(n); err != nil {
			return no("%v", err)
		}
	}
	return s, nil
}

// CheckNetwork reports whether n may be reached over an office's LAN: a
// network of unicast addresses, not all of them.
func CheckNetwork(n netip.Prefix) error {
	if !n.IsValid() || n != n.Masked() || !n.Addr().Is4() || n.Bits() < 8 ||
		n.Addr().IsLoopback() || n.Addr().IsMulticast() || n.Addr().IsLinkLocalUnicast() || n.Addr().As4()[0] == 0 || n.Addr().As4()[0] >= 240 {
		return fmt.Errorf("network %s: want an IPv4 network of unicast addresses, /8 or smaller", n)
	}
	return nil
}

// names reports whether c names site and nothing else by URI.
func names(c *x509.Certificate, site string) error {
	if len(c.URIs) != 1 || c.URIs[0].String() != attest.SiteURI(site) {
		return fmt.Errorf("certificate names %v, want %s", c.URIs, attest.SiteURI(site))
	}
	return nil
}

// write sends one message: a line of JSON.
func write(w io.Writer, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_, err = w.Write(append(data, '\n'))
	return err
}

// lines reads messages, each at most maxMessage bytes.
type lines struct {
	r   io.Reader
	buf []byte
}

func (l *lines) read(v any) error {
	for {
		for i, b := range l.buf {
			if b == '\n' {
				err := json.Unmarshal(l.buf[:i], v)
				l.buf = append(l.buf[:0], l.buf[i+1:]...)
				return err
			}
		}
		if len(l.buf) >= maxMessage {
			return fmt.Errorf("message of over %d bytes", maxMessage)
		}
		var chunk [2048]byte
		n, err := l.r.Read(chunk[:])
		l.buf = append(l.buf, chunk[:n]...)
		if err != nil && n == 0 {
			return err
		}
	}
}
