package gate

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"net/http"
	"path/filepath"
	"testing"
	"time"
)

func TestOpen(t *testing.T) {
	now := time.Unix(1000, 0)
	for _, state := range []string{"", StateNoTPM, StateUnenrolled, StateEnrolling, StateAttesting, StateAffirming, StateRefused, StateUnreachable, "unknown"} {
		for _, end := range []time.Time{{}, now.Add(-1), now, now.Add(time.Minute)} {
			for g := Gate(0); g <= 5; g++ {
				until, open := Open(Status{State: state, NotAfter: end}, g, now)
				want := state == StateAffirming && end.After(now) && g >= Tunnel && g <= Credential
				if open != want || open && !until.Equal(end) {
					t.Errorf("%q until %v, gate %v: %v, want %v", state, end, g, open, want)
				}
			}
		}
	}
}

func TestGateNames(t *testing.T) {
	for g := Tunnel; g <= Credential; g++ {
		if back, err := ParseGate(g.String()); err != nil || back != g {
			t.Errorf("%d → %q → %d, %v", g, g, back, err)
		}
	}
	if _, err := ParseGate("gate(0)"); err == nil {
		t.Error("the zero gate has a name")
	}
}

// serve runs h as attestd.
func serve(t *testing.T, h http.Handler) *Client {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: h}
	done := make(chan struct{})
	go func() {
		srv.Serve(l)
		close(done)
	}()
	t.Cleanup(func() {
		srv.Close()
		<-done
	})
	return NewClient(socket)
}

func TestClient(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, r *http.Request) {
		json.NewEncoder(w).Encode(Status{Version: 8, State: StateAffirming, Detail: r.URL.Query().Get("after")})
	})
	mux.HandleFunc("GET /v1/credential", func(w http.ResponseWriter, _ *http.Request) {
		pem.Encode(w, &pem.Block{Type: "CERTIFICATE", Bytes: der})
	})
	signWith := key
	mux.HandleFunc("POST /v1/sign", func(w http.ResponseWriter, r *http.Request) {
		var req SignRequest
		if json.NewDecoder(r.Body).Decode(&req) != nil || len(req.Digest) != 32 {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		sig, _ := ecdsa.SignASN1(rand.Reader, signWith, req.Digest)
		json.NewEncoder(w).Encode(SignResponse{sig})
	})
	c := serve(t, mux)
	s, err := c.Status(t.Context())
	if err != nil || s.Version != 8 || s.Detail != "" {
		t.Errorf("status: %+v, %v", s, err)
	}
	if s, err = c.Wait(t.Context(), 7); err != nil || s.Detail != "7" {
		t.Errorf("wait: %+v, %v", s, err)
	}
	cert, err := c.Credential(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256([]byte("message"))
	key2 := cert.PrivateKey.(crypto.Signer)
	sig, err := key2.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil || !ecdsa.VerifyASN1(&key.PublicKey, digest[:], sig) {
		t.Errorf("sign: %v", err)
	}
	if _, err := key2.Sign(rand.Reader, digest[:20], crypto.SHA1); err == nil {
		t.Error("a SHA-1 digest was signed")
	}
	if signWith, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	if _, err := key2.Sign(rand.Reader, digest[:], crypto.SHA256); err == nil {
		t.Error("a signature by another key was passed on")
	}
}

func TestClientFailsClosed(t *testing.T) {
	for name, h := range map[string]http.HandlerFunc{
		"error":    func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) },
		"rubbish":  func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte("rubbish")) },
		"too long": func(w http.ResponseWriter, _ *http.Request) { w.Write(make([]byte, maxBody+1)) },
	} {
		c := serve(t, h)
		if s, err := c.Status(t.Context()); err == nil || s.State != "" {
			t.Errorf("%s: status %+v, %v", name, s, err)
		}
		if _, err := c.Credential(t.Context()); err == nil {
			t.Errorf("%s: a credential", name)
		}
	}
	if _, err := serve(t, http.NotFoundHandler()).Credential(t.Context()); !errors.Is(err, ErrNoCredential) {
		t.Errorf("no credential: %v", err)
	}
	if _, err := NewClient(filepath.Join(t.TempDir(), "none")).Status(context.Background()); err == nil {
		t.Error("a status of nobody")
	}
}

func FuzzParseStatus(f *testing.F) {
	f.Add([]byte(`{"version":1,"state":"affirming","not_after":"2026-11-21T10:00:00Z"}`))
	f.Fuzz(func(t *testing.T, data []byte) { ParseStatus(data) })
}

func FuzzParseCredential(f *testing.F) {
	f.Add([]byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"))
	f.Fuzz(func(t *testing.T, data []byte) { new(Client).parseCredential(data) })
}
