package verifier

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"

	"sekisho/attest"
)

// NetworkPrefix begins the name of a device in the certificate of its network
// identity. It is not DevicePrefix: no gate knows it.
const NetworkPrefix = "urn:sekisho:network:"

// Bounds of the lifetime of a network identity's certificate. It has to outlast
// the time that a laptop lies in a drawer: the next one is fetched through the
// network that it opens.
const (
	MinNetworkLifetime = 24 * time.Hour
	MaxNetworkLifetime = 2 * 366 * 24 * time.Hour
)

// NetworkIssuer signs the certificates by which laptops are let into networks
// that ask for 802.1X. Its CA is not the Issuer's: what it signs lives long, for
// a key in software, and opens nothing but a port of a switch.
type NetworkIssuer struct {
	ca           *x509.Certificate
	key          crypto.Signer
	organization string
	lifetime     time.Duration
}

// NewNetworkIssuer returns a NetworkIssuer that signs with ca and its key.
// device is the CA of the credentials, whose key it must not have.
func NewNetworkIssuer(ca *x509.Certificate, key crypto.Signer, device *x509.Certificate, organization string, lifetime time.Duration) (*NetworkIssuer, error) {
	pub, ok := key.Public().(*ecdsa.PublicKey)
	switch {
	case !ok || !pub.Equal(ca.PublicKey):
		return nil, fmt.Errorf("network CA's key is not the ECDSA key of %q", ca.Subject)
	case !ca.IsCA:
		return nil, fmt.Errorf("certificate of %q is not a CA's", ca.Subject)
	case pub.Equal(device.PublicKey):
		return nil, errors.New("network CA has the key of the devices' CA: gates would open for its certificates; make another CA")
	case lifetime < MinNetworkLifetime || lifetime > MaxNetworkLifetime:
		return nil, fmt.Errorf("network certificates for %s: want %s to %s", lifetime, MinNetworkLifetime, MaxNetworkLifetime)
	}
	return &NetworkIssuer{ca, key, organization, lifetime}, nil
}

// Issue certifies the key of a request (PKCS #10, DER) for device and returns
// the certificate in DER. Of the request only the key is taken, which has
// signed it: the name is the device's.
func (i *NetworkIssuer) Issue(device attest.Digest, request []byte, now time.Time) ([]byte, error) {
	csr, err := x509.ParseCertificateRequest(request)
	if err != nil {
		return nil, fmt.Errorf("network request: %w", err)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, fmt.Errorf("network request: %w", err)
	}
	key, ok := csr.PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, fmt.Errorf("network request: key of type %T, want ECDSA on P-256", csr.PublicKey)
	}
	until := now.Add(i.lifetime)
	if i.ca.NotAfter.Before(until) {
		until = i.ca.NotAfter
	}
	if !now.Before(until) {
		return nil, fmt.Errorf("network CA %q lapsed at %s", i.ca.Subject, i.ca.NotAfter.UTC().Format(time.RFC3339))
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{ // its serial number is random
		Subject:               pkix.Name{CommonName: device.String(), Organization: []string{i.organization}},
		NotBefore:             now.Add(-backdate),
		NotAfter:              until,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		URIs:                  []*url.URL{{Scheme: "urn", Opaque: strings.TrimPrefix(NetworkPrefix, "urn:") + device.String()}},
	}, i.ca, key, i.key)
	if err != nil {
		return nil, fmt.Errorf("network certificate: %w", err)
	}
	return der, nil
}
