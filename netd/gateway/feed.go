package gateway

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"

	"sekisho/attest"
	"sekisho/attest/cryptrec"
	"sekisho/attest/gate"
)

// FeedConfig says where the gateway hears of revoked devices: from the
// organisation's verifiers (docs/attest.md, Revocations).
type FeedConfig struct {
	Verifiers    []attest.Endpoint `json:"verifiers"`    // tried in turn
	Organization string            `json:"organization"` // as in the verifiers' configuration
	CA           string            `json:"ca"`           // PEM file: of the verifiers' server certificates
	Certificate  string            `json:"certificate"`  // PEM file: ours, for client authentication, of their gateway_ca
	Key          string            `json:"key"`          // PEM file
	Signer       string            `json:"signer"`       // PEM file: their report key, from attestctl report key
}

func readSmall(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(data) > maxFile {
		err = fmt.Errorf("%s: over %d bytes", path, maxFile)
	}
	return data, err
}

// open reads the files that c names.
func (c *FeedConfig) open(log *slog.Logger) (*gate.Revocations, error) {
	if len(c.Verifiers) == 0 || c.Organization == "" {
		return nil, errors.New("revocations: want at least one of verifiers, and organization")
	}
	ca, err := readSmall(c.CA)
	if err != nil {
		return nil, fmt.Errorf("revocations: ca: %w", err)
	}
	t := cryptrec.Config()
	if t.RootCAs = x509.NewCertPool(); !t.RootCAs.AppendCertsFromPEM(ca) {
		return nil, fmt.Errorf("revocations: ca %s: no certificate in it", c.CA)
	}
	pair, err := tls.LoadX509KeyPair(c.Certificate, c.Key)
	if err != nil {
		return nil, fmt.Errorf("revocations: certificate: %w", err)
	}
	t.Certificates = []tls.Certificate{pair}
	data, err := readSmall(c.Signer)
	if err != nil {
		return nil, fmt.Errorf("revocations: signer: %w", err)
	}
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, fmt.Errorf("revocations: signer %s: no PEM in it", c.Signer)
	}
	public, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("revocations: signer %s: %w", c.Signer, err)
	}
	key, ok := public.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, fmt.Errorf("revocations: signer %s: %T, want ECDSA on P-256", c.Signer, public)
	}
	return gate.NewRevocations(gate.Feed{Verifiers: c.Verifiers, TLS: t, Signer: key, Organization: c.Organization, Log: log}), nil
}

// follow begins to hear of revocations if the configuration says where. After
// an error nobody is admitted.
func (s *Server) follow(ctx context.Context, parts *sync.WaitGroup) error {
	c := s.config.Revocations
	if c == nil || s.Revocations != nil {
		return nil
	}
	feed, err := c.open(s.log)
	if err != nil {
		s.Revocations = gate.NewRevocations(gate.Feed{})
		return err
	}
	s.Revocations = feed
	parts.Go(func() { feed.Run(ctx) })
	return nil
}
