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
	if err := Check(tls.ConnectionState{}); !errors.Is(err, ErrNotListed) {
		t.Errorf("Check of the zero state: %v, want ErrNotListed", err)
	}
}
