package report

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"math/big"
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/attest/verifier"
)

// issuer returns a CA of that organisation.
func issuer(t *testing.T, organization string) *verifier.Issuer {
	t.Helper()
	key := newKey(t)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, NotBefore: start.Add(-time.Hour), NotAfter: start.Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	ca, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	i, err := verifier.NewIssuer(ca, key, organization, 10*time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// TestAttackCertificateOfAnotherResult shows an affirming result with certificates that it
// was not made for: of another device, of an older result of the same device,
// at another organisation's gateway, after its end. The gateway's gate is the
// certificate; whoever also looks at the result finds the two bound together.
func TestAttackCertificateOfAnotherResult(t *testing.T) {
	key, city := newKey(t), issuer(t, org)
	type credential struct {
		token []byte
		cert  *x509.Certificate
	}
	issue := func(s *sample) credential {
		out := verifier.Appraise(s.in)
		_, token, err := Make(encoded(s.in), s.in, out, s.rec, org, 10*time.Minute, key)
		if err != nil {
			t.Fatal(err)
		}
		evidence, err := s.in.Evidence.Encode()
		if err != nil {
			t.Fatal(err)
		}
		cert, err := city.Issue(s.in.Device.ID, out.Key, ID(evidence), start)
		if err != nil {
			t.Fatal(err)
		}
		return credential{token, cert}
	}
	s := newSample(t, image)
	mine, other := issue(s), issue(newSample(t, image))
	older, err := city.Issue(s.in.Device.ID, mine.cert.PublicKey.(*ecdsa.PublicKey), ID([]byte("older")), start)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name  string
		token []byte
		cert  *x509.Certificate
		org   string
		at    time.Time
		ok    bool
	}{
		{"its own", mine.token, mine.cert, org, start, true},
		{"another device", mine.token, other.cert, org, start, false},
		{"another device's result", other.token, mine.cert, org, start, false},
		{"an older result's certificate", mine.token, older, org, start, false},
		{"another organisation's gateway", mine.token, mine.cert, "Other City", start, false},
		{"after its end", mine.token, mine.cert, org, start.Add(11 * time.Minute), false},
	} {
		if _, err := CheckCredential(c.token, &key.PublicKey, c.cert, c.org, c.at); (err == nil) != c.ok {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	// A gateway of another organisation does not know the issuer.
	for _, x := range []struct {
		ca *verifier.Issuer
		ok bool
	}{{city, true}, {issuer(t, "Other City"), false}} {
		roots := x509.NewCertPool()
		roots.AddCert(x.ca.CA())
		if _, err := mine.cert.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: start, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); (err == nil) != x.ok {
			t.Errorf("chain: %v", err)
		}
	}
	if _, err := city.Issue(attest.Digest{1}, &key.PublicKey, "not an id", start); err == nil {
		t.Error("a certificate for no result")
	}
}
