// Package ek judges certificates of endorsement keys: as TPMs keep them, by the
// makers' certificates that we pin. It does no I/O.
//
// Issuers are found by the raw bytes of their names, because not every maker
// writes DER (Nuvoton). Every pinned certificate is an anchor by itself, a
// maker's intermediate as well as its root. Between the TPM's certificate and
// an anchor there may be CAs that the TPM brings along, as Intel's of one chip
// each: those are bound by all that X.509 binds a CA with.
package ek

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"slices"
	"strings"
	"time"

	"sekisho/attest"
	"sekisho/attest/tpm"
)

// Bounds in bytes: of a certificate as a TPM keeps it, of that with the CAs
// behind it, and of their text (PEM).
const (
	MaxCertificate = 4 << 10
	MaxChain       = 16 << 10
	MaxText        = 64 << 10
)

// maxChain bounds the certificates of a chain.
const maxChain = 8

// Certificate is a certificate of a TPM.
type Certificate struct {
	*x509.Certificate
	Received []byte              // byte for byte, as it came
	Header   bool                // the TCG's NV header stood in front
	Sent     []*x509.Certificate // CAs that came behind it
	Rest     int                 // bytes behind all of them
}

// Parse reads a certificate as TPMs keep it: with or without the TCG's header
// (PC Client Implementation Specification for TPM 1.2, section 7.3.2), and with
// padding behind it; or as PEM. CAs may follow in the same form. Its key may be
// of a kind that cannot be used: then PublicKey is nil and KeyType says which.
func Parse(raw []byte) (*Certificate, error) {
	if len(raw) > MaxText {
		return nil, fmt.Errorf("certificate of over %d bytes", MaxText)
	}
	c := &Certificate{Received: bytes.Clone(raw)}
	if b, more := pem.Decode(raw); b != nil {
		for raw = b.Bytes; ; raw = append(raw, b.Bytes...) {
			if b, more = pem.Decode(more); b == nil {
				break
			}
		}
	}
	if len(raw) > MaxChain {
		return nil, fmt.Errorf("certificates of %d bytes, at most %d", len(raw), MaxChain)
	}
	const header = 7 // tag 0x1001, type, length, tag 0x1002
	if len(raw) > header && bytes.HasPrefix(raw, []byte{0x10, 0x01}) {
		raw, c.Header = raw[header:], true
	}
	var outer asn1.RawValue
	rest, err := asn1.Unmarshal(raw, &outer)
	if err != nil {
		return nil, fmt.Errorf("certificate: %w", err)
	}
	if len(outer.FullBytes) > MaxCertificate {
		return nil, fmt.Errorf("certificate of %d bytes, at most %d", len(outer.FullBytes), MaxCertificate)
	}
	if c.Certificate, err = x509.ParseCertificate(outer.FullBytes); err != nil {
		return nil, fmt.Errorf("certificate: %w", err)
	}
	for len(c.Sent) < maxChain {
		after, err := asn1.Unmarshal(bytes.TrimLeft(rest, "\x00\xff"), &outer) // padding of the one before
		if err != nil {
			break
		}
		ca, err := x509.ParseCertificate(outer.FullBytes)
		if err != nil {
			break
		}
		c.Sent, rest = append(c.Sent, ca), after
	}
	c.Rest = len(rest)
	return c, nil
}

// KeyType names the certificate's key.
func (c *Certificate) KeyType() string {
	switch k := c.PublicKey.(type) {
	case *rsa.PublicKey:
		return fmt.Sprintf("RSA %d", k.N.BitLen())
	case *ecdsa.PublicKey:
		return "ECC " + k.Curve.Params().Name
	case nil:
		return c.algorithm()
	}
	return c.PublicKeyAlgorithm.String()
}

// algorithm names a key that crypto/x509 does not read (RFC 4055, section 1.2).
func (c *Certificate) algorithm() string {
	var spki struct {
		Algorithm struct {
			ID         asn1.ObjectIdentifier
			Parameters asn1.RawValue `asn1:"optional"`
		}
		Key asn1.BitString
	}
	if _, err := asn1.Unmarshal(c.RawSubjectPublicKeyInfo, &spki); err != nil {
		return "unreadable"
	}
	switch id := spki.Algorithm.ID.String(); id {
	case "1.2.840.113549.1.1.7":
		return "RSAES-OAEP (TPM 1.2)"
	case "1.2.840.113549.1.1.10":
		return "RSASSA-PSS"
	default:
		return "algorithm " + id
	}
}

// isIDevID reports whether c is the certificate of a device identity: it names
// a hardware module (IEEE 802.1AR, section 8.10.4; RFC 4108, section 5).
func (c *Certificate) isIDevID() bool {
	alternative, module := asn1.ObjectIdentifier{2, 5, 29, 17}, []byte{0x06, 0x08, 0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x08, 0x04}
	for _, e := range c.Extensions {
		if e.Id.Equal(alternative) && bytes.Contains(e.Value, module) {
			return true
		}
	}
	return false
}

// endorsement is tcg-kp-EKCertificate (TCG EK Credential Profile, extended key
// usage): not every maker has it, but who names uses and not this one has
// certified something else.
var endorsement = asn1.ObjectIdentifier{2, 23, 133, 8, 1}

func forEndorsement(c *x509.Certificate) bool {
	return len(c.ExtKeyUsage)+len(c.UnknownExtKeyUsage) == 0 || slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageAny) ||
		slices.ContainsFunc(c.UnknownExtKeyUsage, endorsement.Equal)
}

// usages lists the extended key usages.
func (c *Certificate) usages() string {
	var list []string
	for _, u := range c.ExtKeyUsage {
		list = append(list, u.String())
	}
	for _, u := range c.UnknownExtKeyUsage {
		list = append(list, u.String())
	}
	return strings.Join(list, ", ")
}

// Kind is what a certificate is for. The zero value is unknown.
type Kind string

// The kinds.
const (
	KindEK     Kind = "ek"     // endorsement key
	KindIDevID Kind = "idevid" // device identity; a good one, but no TPM enrols with it
	KindCA     Kind = "ca"
)

// Kind tells what c is for. What is neither a CA's nor a device identity is
// taken for an endorsement key, which the chain must then bear out. Intel's
// certificates of endorsement keys since the 11th generation say that they are
// a CA's, and that their key is for endorsement and may sign no certificates:
// that is none (RFC 5280, section 4.2.1.3).
func (c *Certificate) Kind() Kind {
	mayNotSign := c.KeyUsage != 0 && c.KeyUsage&x509.KeyUsageCertSign == 0
	switch {
	case c.IsCA && !(mayNotSign && slices.ContainsFunc(c.UnknownExtKeyUsage, endorsement.Equal)):
		return KindCA
	case c.isIDevID():
		return KindIDevID
	}
	return KindEK
}

// Link is one certificate of a chain.
type Link struct {
	Subject     string    `json:"subject"`
	Issuer      string    `json:"issuer"`
	Fingerprint string    `json:"sha256"`
	NotAfter    time.Time `json:"notAfter"`
}

// Report is what Judge found. The zero value refuses.
type Report struct {
	Accepted bool            `json:"-"`
	Verdict  string          `json:"verdict"` // "pass" or "refuse"
	Kind     Kind            `json:"kind"`
	KeyType  string          `json:"keyType"`
	Header   bool            `json:"nvHeader"`
	Sent     int             `json:"sent"` // CAs that came with it
	Rest     int             `json:"trailingBytes"`
	Instance *Instance       `json:"instance,omitempty"` // of a virtual TPM of Google's cloud
	Chain    []Link          `json:"chain"`              // the certificate first, the anchor last
	Findings []attest.Remark `json:"findings"`
}

func (r *Report) find(s attest.Severity, code attest.Reason, ja, en string, a ...any) {
	r.Findings = append(r.Findings, attest.NewRemark(s, code, attest.Say(ja, en, a...)))
}

// Judge judges a certificate by the pinned ones. Accepted proves: the
// certificate is no CA's, nor for another use; its key is of a kind that an
// endorsement key can be used with, or it is a device identity; it is signed by
// a pinned certificate, or by a CA beside it that one has signed, and so on.
// Expiry is a warning: makers' certificates expire while their TPMs live on.
func Judge(c *Certificate, roots *Roots, now time.Time) *Report {
	r := &Report{Kind: c.Kind(), KeyType: c.KeyType(), Header: c.Header, Sent: len(c.Sent), Rest: c.Rest, Instance: c.instance(), Findings: []attest.Remark{}}
	block, warn := attest.SeverityBlock, attest.SeverityWarn
	switch {
	case r.Kind == KindCA:
		r.find(block, attest.ReasonEKUntrusted, "%q の証明書は CA のもので、エンドースメント鍵のものではありません。", "certificate of %q is a CA's and no endorsement key's", c.Subject)
	case r.Kind == KindIDevID:
		r.find(warn, attest.ReasonEKAttributes, "種類 %s の鍵を持つ機器識別用の証明書です。エンドースメント鍵のものではなく、TPM の登録には使えません。", "certificate of a device identity with a key of type %s; it is no endorsement key's and no TPM enrols with it", r.KeyType)
	case c.PublicKey == nil:
		r.find(block, attest.ReasonEKAttributes, "種類 %s の鍵は使用できません。この TPM は登録できません。", "key of type %s cannot be used; this TPM cannot enrol", r.KeyType)
	case !forEndorsement(c.Certificate):
		r.find(block, attest.ReasonEKAttributes, "別の用途の証明書で（拡張鍵用途 %s）、エンドースメント鍵のものではありません。", "certificate is for another use (extended key usage %s) and no endorsement key's", c.usages())
	case c.KeyUsage != 0 && c.KeyUsage&(x509.KeyUsageKeyEncipherment|x509.KeyUsageKeyAgreement) == 0:
		r.find(warn, attest.ReasonEKAttributes, "署名用の鍵で、エンドースメント用ではありません。証明鍵の証明書かもしれません。", "key is for signing, not for endorsement: perhaps an attestation key's certificate")
	}
	if now.Before(c.NotBefore) {
		r.find(block, attest.ReasonEKUntrusted, "証明書の有効期間は %s からです。時計を確認してください。", "certificate is valid from %s; check the clock", c.NotBefore.UTC().Format(time.DateOnly))
	}
	if now.After(c.NotAfter) {
		r.find(warn, attest.ReasonEKUntrusted, "証明書の有効期限は %s に切れています。", "certificate expired on %s", c.NotAfter.UTC().Format(time.DateOnly))
	}
	chain, err := roots.chain(c)
	for i, link := range chain {
		r.Chain = append(r.Chain, newLink(link))
		if i > 0 && now.After(link.NotAfter) {
			r.find(warn, attest.ReasonEKUntrusted, "発行者 %q の証明書の有効期限は %s に切れています。", "certificate of its issuer %q expired on %s", link.Subject, link.NotAfter.UTC().Format(time.DateOnly))
		}
	}
	if err != nil {
		r.find(block, attest.ReasonEKUntrusted, "%q が発行した証明書を検証できません（%v）。信頼するなら CA を ek_roots に加えてください。", "certificate by %q: %v; add its CA to ek_roots if you trust it", chain[len(chain)-1].Issuer, err)
	}
	r.Accepted, r.Verdict = true, "pass"
	for _, f := range r.Findings {
		if f.Severity == block {
			r.Accepted, r.Verdict = false, "refuse"
		}
	}
	return r
}

func newLink(c *x509.Certificate) Link {
	h := sha256.Sum256(c.Raw)
	return Link{c.Subject.String(), c.Issuer.String(), hex.EncodeToString(h[:]), c.NotAfter.UTC()}
}

// Check judges an endorsement key that wants to enrol. A nil error proves: the
// key is of a TCG template; the certificate is for that very key and is
// accepted by Judge. Errors are *attest.Refusal.
func Check(key *tpm.Public, raw []byte, roots *Roots, now time.Time) error {
	if err := key.CheckEK(); err != nil {
		return attest.Refuse(attest.ReasonEKAttributes, "%v", err)
	}
	if len(raw) == 0 {
		return attest.Refuse(attest.ReasonEKMissing, "the TPM has no EK certificate that this verifier can use")
	}
	c, err := Parse(raw)
	if err != nil {
		return attest.Refuse(attest.ReasonEKUntrusted, "EK %v", err)
	}
	report := Judge(c, roots, now)
	if report.Kind == KindIDevID {
		return attest.Refuse(attest.ReasonEKUntrusted, "%s", report.Findings[0].Sentence.EN)
	}
	public, err := key.Key()
	if err != nil {
		return attest.Refuse(attest.ReasonEKAttributes, "endorsement key: %v", err)
	}
	if k, ok := public.(interface{ Equal(crypto.PublicKey) bool }); report.Kind == KindEK && c.PublicKey != nil && (!ok || !k.Equal(c.PublicKey)) {
		return attest.Refuse(attest.ReasonEKMismatch, "EK certificate is for another key")
	}
	for _, f := range report.Findings {
		if f.Severity == attest.SeverityBlock {
			return attest.Refuse(f.Code, "EK %s", f.Sentence.EN)
		}
	}
	return nil
}
