package ek

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	_ "embed" // the bundle
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// MaxBundle bounds a file of pinned certificates, in bytes.
const MaxBundle = 2 << 20

// Roots are pinned certificates. Nil pins none.
type Roots struct {
	bySubject map[string][]*x509.Certificate
	n         int
}

// NewRoots pins certificates.
func NewRoots(certs ...*x509.Certificate) *Roots {
	r := &Roots{bySubject: make(map[string][]*x509.Certificate)}
	for _, c := range certs {
		r.add(c)
	}
	return r
}

// Len is the number of certificates.
func (r *Roots) Len() int { return r.n }

// AddAll pins what other pins.
func (r *Roots) AddAll(other *Roots) {
	for _, same := range other.bySubject {
		for _, c := range same {
			r.add(c)
		}
	}
}

func (r *Roots) add(c *x509.Certificate) {
	name := string(c.RawSubject)
	if !slices.ContainsFunc(r.bySubject[name], c.Equal) {
		r.bySubject[name] = append(r.bySubject[name], c)
		r.n++
	}
}

// AddPEM pins the certificates in data. All must be readable, and there must be
// one.
func (r *Roots) AddPEM(data []byte) error {
	if len(data) > MaxBundle {
		return fmt.Errorf("EK roots: %d bytes, at most %d", len(data), MaxBundle)
	}
	n := 0
	for rest := data; ; n++ {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			break
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return fmt.Errorf("EK root %d: %w", n+1, err)
		}
		r.add(c)
	}
	if n == 0 {
		return fmt.Errorf("EK roots: no PEM certificate in %d bytes", len(data))
	}
	return nil
}

// Add pins what is in a file: certificates in PEM, or one in DER.
func (r *Roots) Add(data []byte) error {
	if b, _ := pem.Decode(data); b != nil {
		return r.AddPEM(data)
	}
	c, err := x509.ParseCertificate(data)
	if err != nil {
		return fmt.Errorf("EK root: %w", err)
	}
	r.add(c)
	return nil
}

// chain builds a path from a TPM's certificate, over CAs that came with it, to
// a pinned one, and on as far as issuers are pinned. An error means that it
// reaches none.
func (r *Roots) chain(leaf *Certificate) ([]*x509.Certificate, error) {
	c, path, anchored := leaf.Certificate, []*x509.Certificate{leaf.Certificate}, false
	for len(path) < maxChain && !bytes.Equal(c.RawIssuer, c.RawSubject) {
		issuer, err := r.issuer(c)
		switch {
		case issuer != nil && !anchored && !mayIssue(issuer, len(path)-1):
			return path, fmt.Errorf("%q may not have %d CAs below it", issuer.Subject, len(path)-1)
		case issuer != nil:
			anchored = true
		case anchored:
			return path, nil
		default:
			if issuer = leaf.sentIssuer(c, len(path)-1); issuer == nil {
				return path, err
			}
		}
		path, c = append(path, issuer), issuer
	}
	if !anchored {
		return path, errors.New("it is signed by itself, or leads to no pinned CA")
	}
	return path, nil
}

// sentIssuer finds the CA that signed c among those that came with it, for
// which below CAs stand between it and the TPM's certificate. Nobody has vouched
// for it yet: it must be all that X.509 asks of a CA (RFC 5280, section 6.1.4),
// for this use.
func (leaf *Certificate) sentIssuer(c *x509.Certificate, below int) *x509.Certificate {
	for _, s := range leaf.Sent {
		if bytes.Equal(s.RawSubject, c.RawIssuer) && s.BasicConstraintsValid && s.IsCA && mayIssue(s, below) && len(s.UnhandledCriticalExtensions) == 0 &&
			(s.KeyUsage == 0 || s.KeyUsage&x509.KeyUsageCertSign != 0) && forEndorsement(s) &&
			s.CheckSignature(c.SignatureAlgorithm, c.RawTBSCertificate, c.Signature) == nil {
			return s
		}
	}
	return nil
}

// mayIssue reports whether a CA may have that many CAs below it (RFC 5280,
// section 4.2.1.9).
func mayIssue(ca *x509.Certificate, below int) bool {
	return below == 0 || ca.MaxPathLen < 0 || below <= ca.MaxPathLen
}

// issuer finds the pinned certificate that signed c, by the raw bytes of its
// name. The parser of crypto/x509 still reads SHA-1 signatures of TPM 1.2 times;
// Certificate.CheckSignature verifies them.
func (r *Roots) issuer(c *x509.Certificate) (*x509.Certificate, error) {
	if r == nil {
		return nil, errors.New("no CA is pinned")
	}
	err := errors.New("its issuer is not pinned")
	for _, p := range r.bySubject[string(c.RawIssuer)] {
		if !p.IsCA {
			err = errors.New("its issuer is no CA")
			continue
		}
		if bad := p.CheckSignature(c.SignatureAlgorithm, c.RawTBSCertificate, c.Signature); bad != nil {
			err = fmt.Errorf("signature of its issuer: %w", bad)
			continue
		}
		return p, nil
	}
	return nil, err
}

// bundle is the bundle of TPM makers' certificates that this program was built
// with. The committed file holds none; make build puts the real one in its
// place (docs/attest.md).
//
//go:embed bundle.pem
var bundle []byte

// BuiltIn returns the certificates that this program was built with.
func BuiltIn() (*Roots, error) {
	r, err := ParseBundle(bundle)
	if err != nil {
		return nil, err
	}
	if r.Len() == 0 {
		return nil, errors.New("this program was built without the certificates of TPM makers; name them, or build it where ../shared/corpus/attest/vendor-roots is")
	}
	return r, nil
}

// Lines of a bundle that stand before its certificates.
const (
	bundleTitle  = "# certificates of TPM makers"
	bundleDate   = "# date: "
	bundleDigest = "# sha256: " // over the DER of all certificates, in order
)

// FormatBundle writes certificates as a bundle: sorted, each once, with date
// and digest.
func FormatBundle(r *Roots, date time.Time) []byte {
	var all []*x509.Certificate
	for _, same := range r.bySubject {
		all = append(all, same...)
	}
	slices.SortFunc(all, func(a, b *x509.Certificate) int { return bytes.Compare(a.Raw, b.Raw) })
	h := sha256.New()
	var body bytes.Buffer
	for _, c := range all {
		h.Write(c.Raw)
		pem.Encode(&body, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
	}
	head := fmt.Sprintf("%s\n%s%s\n# count: %d\n%s%x\n", bundleTitle, bundleDate, date.UTC().Format(time.DateOnly), len(all), bundleDigest, h.Sum(nil))
	return append([]byte(head), body.Bytes()...)
}

// ParseBundle reads what FormatBundle wrote. The digest must be right: it
// guards against a damaged file, not against one who can write it.
func ParseBundle(data []byte) (*Roots, error) {
	if len(data) > MaxBundle {
		return nil, fmt.Errorf("bundle of %d bytes, at most %d", len(data), MaxBundle)
	}
	if !bytes.HasPrefix(data, []byte(bundleTitle+"\n")) {
		return nil, errors.New("not a bundle of TPM makers' certificates; attestctl ek bundle makes one")
	}
	want := ""
	for line := range strings.Lines(string(data)) {
		if v, ok := strings.CutPrefix(line, bundleDigest); ok {
			want = strings.TrimSpace(v)
		}
		if !strings.HasPrefix(line, "#") {
			break
		}
	}
	r, h := NewRoots(), sha256.New()
	for {
		var b *pem.Block
		if b, data = pem.Decode(data); b == nil {
			break
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return nil, fmt.Errorf("bundle: %w", err)
		}
		h.Write(c.Raw)
		r.add(c)
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != want {
		return nil, fmt.Errorf("bundle: SHA-256 of its certificates is %s, it says %.64q", got, want)
	}
	return r, nil
}
