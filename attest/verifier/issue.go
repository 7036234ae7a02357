package verifier

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	encodingasn1 "encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"strings"
	"time"

	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"

	"sekisho/attest"
)

// Bounds of a certificate's lifetime: long enough for a round trip, short
// enough that it need not be revoked.
const (
	MinLifetime = 5 * time.Second
	MaxLifetime = 24 * time.Hour
	backdate    = Backdate
)

// Backdate is how long before its issue a certificate is in force, for clocks
// that are a little behind.
const Backdate = time.Minute

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

	// Of every certificate alike, in DER:
	hash       crypto.Hash
	algorithm  []byte // AlgorithmIdentifier of the signature
	subject    []byte // organisation, a RelativeDistinguishedName
	extensions []byte // all but the name
}

// NewIssuer returns an Issuer that signs with ca and its key, after a first
// certificate that shows that it can.
func NewIssuer(ca *x509.Certificate, key crypto.Signer, organization string, lifetime time.Duration) (*Issuer, error) {
	switch {
	case lifetime < MinLifetime || lifetime > MaxLifetime:
		return nil, fmt.Errorf("certificate lifetime %s: want %s to %s", lifetime, MinLifetime, MaxLifetime)
	case organization == "":
		return nil, errors.New("organization is empty")
	case !ca.IsCA:
		return nil, fmt.Errorf("certificate of %q is not a CA's", ca.Subject)
	}
	pub, ok := key.Public().(*ecdsa.PublicKey)
	if !ok || !pub.Equal(ca.PublicKey) {
		return nil, fmt.Errorf("CA key is not the ECDSA key of %q", ca.Subject)
	}
	i := &Issuer{ca: ca, key: key, organization: organization, lifetime: lifetime}
	return i, i.learn(pub)
}

// template is the certificate of a device.
func (i *Issuer) template(device attest.Digest, serial *big.Int, now time.Time) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: device.String(), Organization: []string{i.organization}},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(i.lifetime),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		URIs:                  []*url.URL{DeviceURI(device)},
	}
}

// learn has crypto/x509 make a certificate, and keeps what every other one has
// alike.
func (i *Issuer) learn(pub *ecdsa.PublicKey) error {
	der, err := x509.CreateCertificate(rand.Reader, i.template(attest.Digest{}, big.NewInt(1), i.ca.NotBefore), i.ca, pub, i.key)
	if err != nil {
		return fmt.Errorf("issuer: %w", err)
	}
	sample, err := x509.ParseCertificate(der)
	if err != nil {
		return fmt.Errorf("issuer: %w", err)
	}
	switch sample.SignatureAlgorithm {
	case x509.ECDSAWithSHA256:
		i.hash = crypto.SHA256
	case x509.ECDSAWithSHA384:
		i.hash = crypto.SHA384
	case x509.ECDSAWithSHA512:
		i.hash = crypto.SHA512
	default:
		return fmt.Errorf("issuer: CA key on an unknown curve: it signs with %s", sample.SignatureAlgorithm)
	}
	var c, tbs, algorithm, name, organization cryptobyte.String
	outer := cryptobyte.String(der)
	inner := cryptobyte.String(sample.RawSubject)
	if !outer.ReadASN1(&c, asn1.SEQUENCE) || !c.ReadASN1(&tbs, asn1.SEQUENCE) || !c.ReadASN1Element(&algorithm, asn1.SEQUENCE) ||
		!inner.ReadASN1(&name, asn1.SEQUENCE) || !name.ReadASN1Element(&organization, asn1.SET) {
		return errors.New("issuer: crypto/x509 made a certificate that cannot be read")
	}
	i.algorithm, i.subject = algorithm, organization
	for _, e := range sample.Extensions {
		if e.Id.Equal(subjectAltName) {
			continue
		}
		data, err := encodingasn1.Marshal(e)
		if err != nil {
			return fmt.Errorf("issuer: %w", err)
		}
		i.extensions = append(i.extensions, data...)
	}
	return nil
}

// ResultID names the result of one evidence, and with it its report: the
// first 128 bits of its SHA-256. No two are alike, for each evidence has a
// nonce of its own.
func ResultID(evidence []byte) string {
	sum := sha256.Sum256(evidence)
	return hex.EncodeToString(sum[:16])
}

// Object identifiers (RFC 5280, section 4.2.1.6; appendix A.1).
var (
	subjectAltName = encodingasn1.ObjectIdentifier{2, 5, 29, 17}
	commonName     = encodingasn1.ObjectIdentifier{2, 5, 4, 3}
)

// Issue certifies key for device and returns the certificate in DER. It is for
// client authentication only and lapses by itself. Its serial number is the id
// of the result that it stands for, so it can be shown for no other one.
//
// The bytes are those of x509.CreateCertificate, but for what that does again
// each time and costs more than all the rest: it verifies the signature that
// it has just made. Whoever is shown the certificate verifies it.
func (i *Issuer) Issue(device attest.Digest, key *ecdsa.PublicKey, result string, now time.Time) ([]byte, error) {
	serial, ok := new(big.Int).SetString(result, 16)
	if !ok || len(result) != 32 || serial.Sign() == 0 {
		return nil, fmt.Errorf("issue: result id %.64q, want 32 hexadecimal digits", result)
	}
	if now.After(i.ca.NotAfter) {
		return nil, fmt.Errorf("issue: the CA certificate of %q expired on %s; nobody accepts what it signs, give the verifier a new one", i.ca.Subject, i.ca.NotAfter.UTC().Format(time.DateOnly))
	}
	spki, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return nil, fmt.Errorf("issue: %w", err)
	}
	tbs, err := i.tbs(device, serial, spki, now)
	if err != nil {
		return nil, fmt.Errorf("issue: %w", err)
	}
	sig, err := crypto.SignMessage(i.key, rand.Reader, tbs, i.hash)
	if err != nil {
		return nil, fmt.Errorf("issue: %w", err)
	}
	b := cryptobyte.NewBuilder(make([]byte, 0, len(tbs)+256))
	b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes(tbs)
		b.AddBytes(i.algorithm)
		b.AddASN1BitString(sig)
	})
	der, err := b.Bytes()
	if err != nil {
		return nil, fmt.Errorf("issue: %w", err)
	}
	return der, nil
}

// tbs is the part of a certificate that is signed (RFC 5280, section 4.1).
func (i *Issuer) tbs(device attest.Digest, serial *big.Int, spki []byte, now time.Time) ([]byte, error) {
	when := func(b *cryptobyte.Builder, t time.Time) { // RFC 5280, section 4.1.2.5
		if t = t.UTC(); t.Year() < 2050 {
			b.AddASN1UTCTime(t)
		} else {
			b.AddASN1GeneralizedTime(t)
		}
	}
	b := cryptobyte.NewBuilder(make([]byte, 0, 768))
	b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1(asn1.Tag(0).ContextSpecific().Constructed(), func(b *cryptobyte.Builder) { b.AddASN1Int64(2) }) // v3
		b.AddASN1BigInt(serial)
		b.AddBytes(i.algorithm)
		b.AddBytes(i.ca.RawSubject)
		b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
			when(b, now.Add(-backdate))
			when(b, now.Add(i.lifetime))
		})
		b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddBytes(i.subject)
			b.AddASN1(asn1.SET, func(b *cryptobyte.Builder) {
				b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
					b.AddASN1ObjectIdentifier(commonName)
					b.AddASN1(asn1.PrintableString, func(b *cryptobyte.Builder) { b.AddBytes([]byte(device.String())) })
				})
			})
		})
		b.AddBytes(spki)
		b.AddASN1(asn1.Tag(3).ContextSpecific().Constructed(), func(b *cryptobyte.Builder) {
			b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
				b.AddBytes(i.extensions)
				b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
					b.AddASN1ObjectIdentifier(subjectAltName)
					b.AddASN1(asn1.OCTET_STRING, func(b *cryptobyte.Builder) {
						b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
							b.AddASN1(asn1.Tag(6).ContextSpecific(), func(b *cryptobyte.Builder) { b.AddBytes([]byte(DevicePrefix + device.String())) })
						})
					})
				})
			})
		})
	})
	return b.Bytes()
}

// CA returns the certificate that signs.
func (i *Issuer) CA() *x509.Certificate { return i.ca }
