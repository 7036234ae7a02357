package cryptrec

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"math/big"
	"net"
	"testing"
	"time"
)

func handshake(t *testing.T, client, server *tls.Config) (tls.ConnectionState, tls.ConnectionState, error) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"peer"}}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, _ := x509.ParseCertificate(der)
	server.Certificates = []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}
	client.RootCAs = x509.NewCertPool()
	client.RootCAs.AddCert(leaf)
	client.ServerName = "peer"
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	b, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	deadline := time.Now().Add(10 * time.Second)
	a.SetDeadline(deadline)
	b.SetDeadline(deadline)
	s := tls.Server(b, server)
	done := make(chan error, 1)
	go func() { done <- s.Handshake() }()
	c := tls.Client(a, client)
	if err := c.Handshake(); err != nil {
		a.Close()
		<-done
		return tls.ConnectionState{}, tls.ConnectionState{}, err
	}
	if err := <-done; err != nil {
		return tls.ConnectionState{}, tls.ConnectionState{}, err
	}
	return c.ConnectionState(), s.ConnectionState(), nil
}

func TestHandshakeUsesTheList(t *testing.T) {
	c, s, err := handshake(t, Config(), Config())
	if err != nil {
		t.Fatal(err)
	}
	for name, st := range map[string]tls.ConnectionState{"client": c, "server": s} {
		if err := Check(st); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if st.CipherSuite != tls.TLS_AES_256_GCM_SHA384 || st.CurveID != tls.SecP256r1MLKEM768 {
			t.Errorf("%s negotiated %s with %s", name, tls.CipherSuiteName(st.CipherSuite), st.CurveID)
		}
	}
}

func TestPeerOutsideTheListIsRefused(t *testing.T) {
	only := func(c tls.CurveID) *tls.Config {
		return &tls.Config{MinVersion: tls.VersionTLS13, CurvePreferences: []tls.CurveID{c}}
	}
	if _, _, err := handshake(t, only(tls.X25519), Config()); err == nil {
		t.Error("a client that offers only X25519 was accepted")
	}
	if _, _, err := handshake(t, &tls.Config{MaxVersion: tls.VersionTLS12}, Config()); err == nil {
		t.Error("a client of TLS 1.2 was accepted")
	}
	// Two ends that agree on something else: the check after the handshake is the belt.
	c, _, err := handshake(t, only(tls.X25519), only(tls.X25519))
	if err != nil {
		t.Fatal(err)
	}
	if err := Check(c); !errors.Is(err, ErrNotListed) {
		t.Errorf("Check of an X25519 session: %v, want ErrNotListed", err)
	}
	for _, plain := range []tls.CurveID{tls.CurveP256, tls.CurveP384, tls.X25519MLKEM768} {
		if _, _, err := handshake(t, only(plain), Config()); err == nil {
			t.Errorf("a client that offers only %s was accepted", plain)
		}
		client, server, err := handshake(t, only(plain), only(plain))
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(Check(client), Check(server)); !errors.Is(err, ErrNotListed) {
			t.Errorf("Check of a session by %s: %v, want ErrNotListed", plain, err)
		}
	}
	if err := Check(tls.ConnectionState{}); !errors.Is(err, ErrNotListed) {
		t.Errorf("Check of the zero state: %v, want ErrNotListed", err)
	}
}

// TestPolicyOfP384: two ends of the policy agree by P-384 and ML-KEM-1024; one
// of them and a peer that takes either do too; one that offers less is refused,
// by the handshake and by the check after it.
func TestPolicyOfP384(t *testing.T) {
	for name, ends := range map[string][2]KeyAgreement{
		"both": {P384MLKEM1024, P384MLKEM1024}, "client": {P384MLKEM1024, P256MLKEM768}, "server": {P256MLKEM768, P384MLKEM1024},
	} {
		c, s, err := handshake(t, ends[0].Config(), ends[1].Config())
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if err := errors.Join(P384MLKEM1024.Check(c), P384MLKEM1024.Check(s)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	lesser := &tls.Config{MinVersion: tls.VersionTLS13, CurvePreferences: []tls.CurveID{tls.SecP256r1MLKEM768}}
	if _, _, err := handshake(t, lesser.Clone(), P384MLKEM1024.Config()); err == nil {
		t.Error("a client that offers only P-256 with ML-KEM-768 was accepted")
	}
	c, s, err := handshake(t, Config(), Config())
	if err != nil {
		t.Fatal(err)
	}
	if err := P384MLKEM1024.Check(c); !errors.Is(err, ErrNotListed) {
		t.Errorf("client's Check of a session by %s: %v", c.CurveID, err)
	}
	if err := P384MLKEM1024.Check(s); !errors.Is(err, ErrNotListed) {
		t.Errorf("server's Check of a session by %s: %v", s.CurveID, err)
	}
	if unknown := KeyAgreement(9); len(unknown.Curves()) != 0 || unknown.Check(c) == nil {
		t.Error("an unknown key agreement is not closed")
	}
}

func TestKeyAgreementText(t *testing.T) {
	for _, k := range []KeyAgreement{P256MLKEM768, P384MLKEM1024} {
		text, _ := k.MarshalText()
		var got KeyAgreement
		if err := got.UnmarshalText(text); err != nil || got != k {
			t.Errorf("%s read back as %s, %v", text, got, err)
		}
		for _, a := range k.List() {
			if a.Basis == "" {
				t.Errorf("%s without a basis", a.Name)
			}
		}
	}
	var k KeyAgreement
	for _, bad := range []string{"", "p256", "P384-MLKEM1024", "KeyAgreement(9)"} {
		if err := k.UnmarshalText([]byte(bad)); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}
