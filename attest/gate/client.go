package gate

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"time"
)

const (
	maxBody  = 64 << 10         // bytes of any answer of attestd
	maxChain = 8                // certificates in a credential
	timeout  = 10 * time.Second // of one call that does not wait
	// logonTimeout is of a call that may make an RSA key, for which a
	// discrete TPM takes up to a minute.
	logonTimeout = 90 * time.Second
	longPoll     = 40 * time.Second // of one long poll: attestd answers within 25 s
)

// ErrNoCredential is returned by Client.Credential while no affirming result
// is in force.
var ErrNoCredential = errors.New("no credential in force")

// Client talks to attestd. It is safe for concurrent use.
type Client struct {
	http *http.Client
}

// NewClient returns a client of the attestd that listens on the unix socket at
// path socket. It does not connect yet.
func NewClient(socket string) *Client {
	var d net.Dialer
	return &Client{&http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return d.DialContext(ctx, "unix", socket)
		},
		MaxIdleConns:    4,
		IdleConnTimeout: time.Minute,
	}}}
}

// Status returns the present status. An error means that nothing is known, so
// every gate stays shut.
func (c *Client) Status(ctx context.Context) (Status, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	return c.status(ctx, "/v1/status")
}

// Wait returns the status once its version is above after, or the unchanged
// one when attestd's long poll ends (25 s): callers loop.
func (c *Client) Wait(ctx context.Context, after uint64) (Status, error) {
	ctx, cancel := context.WithTimeout(ctx, longPoll)
	defer cancel()
	return c.status(ctx, "/v1/status?after="+strconv.FormatUint(after, 10))
}

func (c *Client) status(ctx context.Context, path string) (Status, error) {
	code, body, err := c.do(ctx, http.MethodGet, path, nil)
	if err != nil {
		return Status{}, err
	}
	if code != http.StatusOK {
		return Status{}, fmt.Errorf("attestd: GET %s: http status %d", path, code)
	}
	return ParseStatus(body)
}

// Credential returns the certificate in force with its chain. Its private key
// is a crypto.Signer whose signatures the TPM makes, one call to attestd each,
// and which fails once the credential lapses. ErrNoCredential: none in force.
func (c *Client) Credential(ctx context.Context) (*tls.Certificate, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	code, body, err := c.do(ctx, http.MethodGet, "/v1/credential", nil)
	switch {
	case err != nil:
		return nil, err
	case code == http.StatusNotFound:
		return nil, ErrNoCredential
	case code != http.StatusOK:
		return nil, fmt.Errorf("attestd: GET /v1/credential: http status %d", code)
	}
	return c.parseCredential(body)
}

func (c *Client) parseCredential(data []byte) (*tls.Certificate, error) {
	var cert tls.Certificate
	for {
		var b *pem.Block
		if b, data = pem.Decode(data); b == nil {
			break
		}
		if b.Type != "CERTIFICATE" || len(cert.Certificate) == maxChain {
			return nil, fmt.Errorf("attestd: credential: block %q after %d certificates, want at most %d certificates", b.Type, len(cert.Certificate), maxChain)
		}
		cert.Certificate = append(cert.Certificate, b.Bytes)
	}
	if len(cert.Certificate) == 0 {
		return nil, errors.New("attestd: credential: no certificate in the answer")
	}
	leaf, err := x509.ParseCertificate(cert.Certificate[0])
	if err != nil {
		return nil, fmt.Errorf("attestd: credential: %w", err)
	}
	pub, ok := leaf.PublicKey.(*ecdsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("attestd: credential: key of type %T, want ECDSA", leaf.PublicKey)
	}
	cert.Leaf = leaf
	cert.PrivateKey = &signer{c, pub}
	cert.SupportedSignatureAlgorithms = []tls.SignatureScheme{tls.ECDSAWithP256AndSHA256}
	return &cert, nil
}

// signer is the credential's key behind attestd.
type signer struct {
	client *Client
	pub    *ecdsa.PublicKey
}

func (s *signer) Public() crypto.PublicKey { return s.pub }

// Sign returns an ASN.1 ECDSA signature over a SHA-256 digest.
func (s *signer) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if opts.HashFunc() != crypto.SHA256 || len(digest) != crypto.SHA256.Size() {
		return nil, fmt.Errorf("attestd: sign: %d byte digest of %v, want SHA-256", len(digest), opts.HashFunc())
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	req, err := json.Marshal(SignRequest{digest})
	if err != nil {
		return nil, err
	}
	code, body, err := s.client.do(ctx, http.MethodPost, "/v1/sign", req)
	if err != nil {
		return nil, err
	}
	if code != http.StatusOK {
		return nil, fmt.Errorf("attestd: sign: http status %d: %.200s", code, bytes.TrimSpace(body))
	}
	var answer SignResponse
	if err := json.Unmarshal(body, &answer); err != nil {
		return nil, fmt.Errorf("attestd: sign: %w", err)
	}
	if !ecdsa.VerifyASN1(s.pub, digest, answer.Signature) {
		return nil, errors.New("attestd: sign: the signature is not by the credential's key; fetch the credential again")
	}
	return answer.Signature, nil
}

// SignRequest is the body of POST /v1/sign.
type SignRequest struct {
	Digest []byte `json:"digest"` // SHA-256, 32 bytes
}

// SignResponse is the answer to SignRequest.
type SignResponse struct {
	Signature []byte `json:"signature"` // ASN.1 ECDSA
}

func (c *Client) do(ctx context.Context, method, path string, body []byte) (int, []byte, error) {
	return c.doUpTo(ctx, method, path, body, maxBody)
}

// doUpTo sends one request and reads an answer of at most most bytes.
func (c *Client) doUpTo(ctx context.Context, method, path string, body []byte, most int64) (int, []byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://attestd"+path, bytes.NewReader(body))
	if err != nil {
		return 0, nil, fmt.Errorf("attestd: %w", err)
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return 0, nil, fmt.Errorf("attestd: %w", err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, most+1))
	if err != nil {
		return 0, nil, fmt.Errorf("attestd: %s %s: %w", method, path, err)
	}
	if int64(len(answer)) > most {
		return 0, nil, fmt.Errorf("attestd: %s %s: answer over %d bytes", method, path, most)
	}
	return resp.StatusCode, answer, nil
}
