package verifier

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"strings"
	"time"

	"sekisho/attest"
)

// Bounds of a certificate's lifetime: long enough for a round trip, short
// enough that it need not be revoked.
const (
	MinLifetime = 5 * time.Second
	MaxLifetime = 24 * time.Hour
	backdate    = time.Minute // for clocks that are a little behind
)

// DevicePrefix begins the name of a device in its certificate.
const DevicePrefix = "urn:sekisho:device:"

// DeviceURI is the name of a device in its certificate's subject alternative
// name.
func DeviceURI(device attest.Digest) *url.URL {
	return &url.URL{Scheme: "urn", Opaque: strings.TrimPrefix(DevicePrefix, "urn:") + device.String()}
}

// Issuer signs the certificates that affirming results stand for.
type Issuer struct {
	ca           *x509.Certificate
	key          crypto.Signer
	organization string
	lifetime     time.Duration
}

// NewIssuer returns an Issuer that signs with ca and its key.
func NewIssuer(ca *x509.Certificate, key crypto.Signer, organization string, lifetime time.Duration) (*Issuer, error) {
	switch {
	case lifetime < MinLifetime || lifetime > MaxLifetime:
		return nil, fmt.Errorf("certificate lifetime %s: want %s to %s", lifetime, MinLifetime, MaxLifetime)
	case organization == "":
		return nil, errors.New("organization is empty")
	case !ca.IsCA:
		return nil, fmt.Errorf("certificate of %q is not a CA's", ca.Subject)
	}
	if pub, ok := key.Public().(*ecdsa.PublicKey); !ok || !pub.Equal(ca.PublicKey) {
		return nil, fmt.Errorf("CA key is not the ECDSA key of %q", ca.Subject)
	}
	return &Issuer{ca, key, organization, lifetime}, nil
}

// ResultID names the result of one evidence, and with it its report: the
// first 128 bits of its SHA-256. No two are alike, for each evidence has a
// nonce of its own.
func ResultID(evidence []byte) string {
	sum := sha256.Sum256(evidence)
	return hex.EncodeToString(sum[:16])
}

// Issue certifies key for device. The certificate is for client
// authentication only and lapses by itself. Its serial number is the id of the
// result that it stands for, so it can be shown for no other one.
func (i *Issuer) Issue(device attest.Digest, key *ecdsa.PublicKey, result string, now time.Time) (*x509.Certificate, error) {
	serial, ok := new(big.Int).SetString(result, 16)
	if !ok || len(result) != 32 || serial.Sign() == 0 {
		return nil, fmt.Errorf("issue: result id %.64q, want 32 hexadecimal digits", result)
	}
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: device.String(), Organization: []string{i.organization}},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(i.lifetime),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		URIs:                  []*url.URL{DeviceURI(device)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, i.ca, key, i.key)
	if err != nil {
		return nil, fmt.Errorf("issue: %w", err)
	}
	return x509.ParseCertificate(der)
}

// CA returns the certificate that signs.
func (i *Issuer) CA() *x509.Certificate { return i.ca }
