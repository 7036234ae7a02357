package path

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/attest/cryptrec"
)

func TestPortal(t *testing.T) {
	for _, c := range []struct {
		answers []Answer
		want    bool
	}{
		{nil, false}, {[]Answer{Silent, Silent}, false}, {[]Answer{Silent, Foreign}, true},
		{[]Answer{Foreign, Ours}, false}, {[]Answer{Ours, Silent}, false}, {[]Answer{Foreign, Foreign}, true},
	} {
		if got := Portal(c.answers); got != c.want {
			t.Errorf("%v: %v", c.answers, got)
		}
	}
}

func TestCorrect(t *testing.T) {
	now := time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	floor := now.AddDate(0, -1, 0)
	for name, c := range map[string]struct {
		local, signed time.Time
		set           bool
		err           error
	}{
		"right":            {now, now, false, nil},
		"a little off":     {now.Add(3 * time.Second), now, false, nil},
		"1970":             {time.Unix(0, 0), now, true, nil},
		"ten years on":     {now.AddDate(10, 0, 0), now, true, nil},
		"a day back":       {now.AddDate(0, 0, -1), now, true, nil},
		"old time, signed": {now, floor.AddDate(0, -1, 0), false, ErrBehind},
		"1970, signed":     {now, time.Unix(0, 0), false, ErrBehind},
	} {
		right, set, err := Correct(c.local, c.signed, 20*time.Millisecond, floor)
		if set != c.set || !errors.Is(err, c.err) {
			t.Errorf("%s: set %v, %v", name, set, err)
		}
		if err == nil && right.Sub(now).Abs() > time.Second {
			t.Errorf("%s: right time %s", name, right)
		}
	}
}

// pki makes a CA and a server certificate of it, both valid for a span.
func pki(t *testing.T, from, to time.Time) (*x509.CertPool, tls.Certificate, *x509.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "City CA"}, NotBefore: from, NotAfter: to, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), NotBefore: from, NotAfter: to, DNSNames: []string{"verifier.test"}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	der, err = x509.CreateCertificate(rand.Reader, leaf, root, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(root)
	return pool, tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, root
}

// TestAsk asks a true server, portals that pose as one, and nobody. The true
// server's certificate is of another time than the local clock's: of last year,
// as a clock ten years ahead sees it.
func TestAsk(t *testing.T) {
	year := time.Now().AddDate(-1, 0, 0)
	roots, own, root := pki(t, year, year.AddDate(0, 6, 0))
	right := year.AddDate(0, 1, 0) // by the server's clock
	says := func(at time.Time) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Date", at.UTC().Format(http.TimeFormat)) })
	}
	_, other, _ := pki(t, year, time.Now().AddDate(1, 0, 0))
	serve := func(h http.Handler, certificate *tls.Certificate) string {
		s := httptest.NewUnstartedServer(h)
		s.Config.ErrorLog = log.New(io.Discard, "", 0)
		if certificate == nil {
			s.Start()
		} else {
			s.TLS = cryptrec.Config()
			s.TLS.Certificates = []tls.Certificate{*certificate}
			s.StartTLS()
		}
		t.Cleanup(s.Close)
		return s.Listener.Addr().String()
	}
	fakes204 := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	hangsUp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer hangsUp.Close()
	go func() {
		for {
			c, err := hangsUp.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	for name, c := range map[string]struct {
		address string
		want    Answer
	}{
		"ours":                       {serve(says(right), &own), Ours},
		"portal with a certificate":  {serve(fakes204, &other), Foreign},
		"portal that fakes 204":      {serve(fakes204, nil), Foreign},
		"portal that redirects":      {serve(http.RedirectHandler("http://portal/", http.StatusFound), nil), Foreign},
		"nobody":                     {closed.Addr().String(), Silent},
		"somebody who only hangs up": {hangsUp.Addr().String(), Silent},
	} {
		p := Prober{Roots: roots, Floor: Floor([]*x509.Certificate{root})}
		r := p.Ask(t.Context(), attest.Endpoint{Address: netip.MustParseAddrPort(c.address), ServerName: "verifier.test"}, true)
		if r.Answer != c.want {
			t.Errorf("%s: %s (%s), want %s", name, r.Answer, r.What, c.want)
		}
		if signed := !r.Time.IsZero(); signed != (c.want == Ours) || signed && r.Time.Sub(right).Abs() > Tolerance {
			t.Errorf("%s: time %s", name, r.Time)
		}
	}
	// A time at which the signer's chain is not valid is none.
	for _, at := range []time.Time{year.AddDate(0, 0, -1), year.AddDate(0, 7, 0), {}} {
		p := Prober{Roots: roots, Floor: Floor([]*x509.Certificate{root})}
		r := p.Ask(t.Context(), attest.Endpoint{Address: netip.MustParseAddrPort(serve(says(at), &own)), ServerName: "verifier.test"}, true)
		if r.Answer != Ours || !r.Time.IsZero() || r.What == "" {
			t.Errorf("signed %s: %+v", at, r)
		}
	}
	// A chain that had lapsed before what is known to be past is not ours.
	p := Prober{Roots: roots, Floor: time.Now()}
	if r := p.Ask(t.Context(), attest.Endpoint{Address: netip.MustParseAddrPort(serve(http.NotFoundHandler(), &own)), ServerName: "verifier.test"}, true); r.Answer != Silent || !r.Time.IsZero() {
		t.Errorf("a lapsed chain: %+v", r)
	}
}
