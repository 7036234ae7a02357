// Package cryptrec fixes the algorithms of every TLS connection of this
// project to those on the CRYPTREC e-Government Recommended Ciphers List
// (2023 list: AES, GCM, SHA-2, ECDSA, ECDH), with ML-KEM beside ECDH as the
// hybrid key agreement that every connection must have. Both ends use it, and
// both ends check the outcome.
package cryptrec

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	_ "unsafe" // for the linkname below
)

// suites13 is crypto/tls's list of TLS 1.3 suites for machines with AES
// instructions. crypto/tls offers AES-128-GCM first and has no setting for it;
// the variable is push-marked for linking in crypto/tls/defaults.go.
//
//go:linkname suites13 crypto/tls.defaultCipherSuitesTLS13
var suites13 []uint16

// suites13NoAES is the same list for machines without AES instructions.
//
//go:linkname suites13NoAES crypto/tls.defaultCipherSuitesTLS13NoAES
var suites13NoAES []uint16

// forced is evaluated before any package that imports this one can make a
// connection, which is why it is a package-level initialiser and no function
// that a caller could forget.
var forced = func() bool {
	suites13 = []uint16{tls.TLS_AES_256_GCM_SHA384}
	suites13NoAES = []uint16{tls.TLS_AES_256_GCM_SHA384}
	return true
}()

// ErrNotListed is returned by Check for a connection that negotiated anything
// outside the list.
var ErrNotListed = errors.New("tls connection negotiated an algorithm outside the list in force")

// KeyAgreement is the least that a connection's keys may be agreed with. Every
// value of it is a hybrid: who records a connection today must break ECDH and
// ML-KEM both to read it. The zero value, of configurations that say nothing,
// takes either hybrid.
type KeyAgreement uint8

// The key agreements, by the policy's choice.
const (
	P256MLKEM768  KeyAgreement = 0 // SecP256r1MLKEM768 or stronger
	P384MLKEM1024 KeyAgreement = 1 // SecP384r1MLKEM1024 only
)

var keyAgreements = []string{P256MLKEM768: "p256-mlkem768", P384MLKEM1024: "p384-mlkem1024"}

func (k KeyAgreement) String() string {
	if int(k) < len(keyAgreements) {
		return keyAgreements[k]
	}
	return fmt.Sprintf("KeyAgreement(%d)", uint8(k))
}

// MarshalText implements encoding.TextMarshaler.
func (k KeyAgreement) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (k *KeyAgreement) UnmarshalText(text []byte) error {
	i := slices.Index(keyAgreements, string(text))
	if i < 0 {
		return fmt.Errorf("key agreement %q: want one of %q", text, keyAgreements)
	}
	*k = KeyAgreement(i)
	return nil
}

// Curves lists the key agreements offered and accepted, preferred first. One
// that is not known has none.
func (k KeyAgreement) Curves() []tls.CurveID {
	switch k {
	case P256MLKEM768:
		return []tls.CurveID{tls.SecP256r1MLKEM768, tls.SecP384r1MLKEM1024}
	case P384MLKEM1024:
		return []tls.CurveID{tls.SecP384r1MLKEM1024}
	}
	return nil
}

// Config returns a new TLS configuration with the algorithms in force and
// nothing else set: the caller adds certificates and roots, and calls Check
// after each handshake.
func (k KeyAgreement) Config() *tls.Config {
	return &tls.Config{
		MinVersion:       tls.VersionTLS13,
		MaxVersion:       tls.VersionTLS13,
		CurvePreferences: k.Curves(),
		// Sessions are not resumed: every connection proves the certificate again.
		SessionTicketsDisabled: true,
	}
}

// Check reports whether the finished handshake used only listed algorithms.
// A nil error proves: TLS 1.3, TLS_AES_256_GCM_SHA384, a key agreement of
// k.Curves, and an ECDSA P-256 or P-384 leaf key at the peer if it showed a
// certificate.
func (k KeyAgreement) Check(s tls.ConnectionState) error {
	switch {
	case !s.HandshakeComplete:
		return fmt.Errorf("%w: handshake not complete", ErrNotListed)
	case s.Version != tls.VersionTLS13:
		return fmt.Errorf("%w: %s", ErrNotListed, tls.VersionName(s.Version))
	case s.CipherSuite != tls.TLS_AES_256_GCM_SHA384:
		return fmt.Errorf("%w: %s", ErrNotListed, tls.CipherSuiteName(s.CipherSuite))
	case !slices.Contains(k.Curves(), s.CurveID):
		return fmt.Errorf("%w: key agreement %s, want at least %s", ErrNotListed, s.CurveID, k)
	}
	if len(s.PeerCertificates) > 0 {
		return checkKey(s.PeerCertificates[0])
	}
	return nil
}

// Config is that of the zero KeyAgreement.
func Config() *tls.Config { return P256MLKEM768.Config() }

// Check is that of the zero KeyAgreement.
func Check(s tls.ConnectionState) error { return P256MLKEM768.Check(s) }

func checkKey(c *x509.Certificate) error {
	k, ok := c.PublicKey.(*ecdsa.PublicKey)
	if !ok {
		return fmt.Errorf("%w: certificate key of type %T", ErrNotListed, c.PublicKey)
	}
	if k.Curve != elliptic.P256() && k.Curve != elliptic.P384() {
		return fmt.Errorf("%w: ecdsa over %s", ErrNotListed, k.Curve.Params().Name)
	}
	return nil
}

// Algorithm is one line of the list in force.
type Algorithm struct {
	Use   string `json:"use"`   // what it is used for
	Name  string `json:"name"`  // its name in TLS
	Basis string `json:"basis"` // where it is approved
}

// List returns the algorithms in force where k is asked for, for people and auditors.
func (k KeyAgreement) List() []Algorithm {
	list := []Algorithm{
		{"protocol", "TLS 1.3", "RFC 8446"},
		{"record protection", "TLS_AES_256_GCM_SHA384", "CRYPTREC: AES-256, GCM, SHA-384"},
	}
	basis := map[tls.CurveID]string{
		tls.SecP256r1MLKEM768:  "CRYPTREC: ECDH P-256; with ML-KEM-768 (FIPS 203)",
		tls.SecP384r1MLKEM1024: "CRYPTREC: ECDH P-384; with ML-KEM-1024 (FIPS 203)",
	}
	for _, c := range k.Curves() {
		list = append(list, Algorithm{"key agreement", c.String(), basis[c]})
	}
	return append(list,
		Algorithm{"signature", "ecdsa_secp256r1_sha256", "CRYPTREC: ECDSA P-256, SHA-256"},
		Algorithm{"signature", "ecdsa_secp384r1_sha384", "CRYPTREC: ECDSA P-384, SHA-384"})
}
