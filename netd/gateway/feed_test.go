package gateway

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"math/big"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"sekisho/attest"
)

// TestFeedConfig: a gateway whose feed cannot be opened admits nobody; one
// whose feed is open admits nobody before it has heard a word.
func TestFeedConfig(t *testing.T) {
	dir := t.TempDir()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	write := func(name, kind string, der []byte, err error) string {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour)}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	pair := write("cert", "CERTIFICATE", cert, err)
	private, err := x509.MarshalPKCS8PrivateKey(key)
	keyFile := write("key", "PRIVATE KEY", private, err)
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	signer := write("signer", "PUBLIC KEY", public, err)
	good := FeedConfig{
		Verifiers: []attest.Endpoint{{Address: netip.MustParseAddrPort("127.0.0.1:1"), ServerName: "v"}}, Organization: "o",
		CA: pair, Certificate: pair, Key: keyFile, Signer: signer,
	}
	for name, change := range map[string]func(*FeedConfig){
		"":                func(*FeedConfig) {},
		"no verifier":     func(c *FeedConfig) { c.Verifiers = nil },
		"no organisation": func(c *FeedConfig) { c.Organization = "" },
		"no ca":           func(c *FeedConfig) { c.CA = signer },
		"no key":          func(c *FeedConfig) { c.Key = pair },
		"no signer":       func(c *FeedConfig) { c.Signer = pair },
		"no file":         func(c *FeedConfig) { c.Signer = dir + "/absent" },
	} {
		c := good
		change(&c)
		s := New(&Config{Revocations: &c}, nil, nil, nil, slog.New(slog.DiscardHandler))
		var parts sync.WaitGroup
		ctx, cancel := context.WithCancel(t.Context())
		if err := s.follow(ctx, &parts); (err == nil) != (name == "") {
			t.Errorf("%s: %v", name, err)
		}
		if s.Revocations == nil || s.Revocations.Heard() == nil {
			t.Errorf("%s: somebody is admitted", name)
		}
		cancel()
		parts.Wait()
	}
}
