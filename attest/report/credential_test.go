package report

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/veraison/go-cose"

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
		return credential{token, certify(t, city, s.in.Device.ID, out.Key, ID(evidence))}
	}
	s := newSample(t, image)
	mine, other := issue(s), issue(newSample(t, image))
	older := certify(t, city, s.in.Device.ID, mine.cert.PublicKey.(*ecdsa.PublicKey), ID([]byte("older")))
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

func certify(t *testing.T, by *verifier.Issuer, device attest.Digest, key *ecdsa.PublicKey, result string) *x509.Certificate {
	t.Helper()
	der, err := by.Issue(device, key, result, start)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// TestSign: what we sign is to go-cose a message of its own making.
func TestSign(t *testing.T) {
	key := newKey(t)
	v, err := cose.NewVerifier(cose.AlgorithmES256, &key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	for _, external := range []string{"", reportExternal, strings.Repeat("x", 300)} {
		for _, n := range []int{1, 23, 24, 255, 256, 65535, 65536, 100000} {
			data, err := sign(bytes.Repeat([]byte{7}, n), reportType, external, key)
			if err != nil {
				t.Fatal(err)
			}
			m := cose.NewSign1Message()
			if err := m.UnmarshalCBOR(data); err != nil {
				t.Fatal(err)
			}
			if err := m.Verify([]byte(external), v); err != nil {
				t.Error(n, err)
			}
			if m.Payload[0]++; m.Verify([]byte(external), v) == nil {
				t.Errorf("%d bytes: another payload passes", n)
			}
			m.Payload[0]--
			if again, err := m.MarshalCBOR(); err != nil || !bytes.Equal(again, data) {
				t.Errorf("%d bytes: another encoding than go-cose's, %v", n, err)
			}
		}
	}
}
