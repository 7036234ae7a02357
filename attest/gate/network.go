package gate

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
)

// MaxNetworkState bounds what Client.SaveNetworkState keeps, in bytes.
const MaxNetworkState = 32 << 10

// NetworkState is the body of PUT /v1/network/state and the answer to GET: what
// netd needs to get into networks, before anything else works. attestd keeps it
// encrypted, under a key that the TPM gives to the organisation's releases
// alone. It is secret.
type NetworkState struct {
	State []byte `json:"state"`
}

// NetworkRequest is the body of POST /v1/network/certificate.
type NetworkRequest struct {
	Request []byte `json:"request"` // PKCS #10, DER
}

// NetworkCertificate is the answer to NetworkRequest.
type NetworkCertificate struct {
	Certificate []byte `json:"certificate"` // DER
}

// NetworkState returns what SaveNetworkState saved last; nil when nothing was.
// A *KeyRefused with codes says why this boot may not have it; any other error
// may go away by itself.
func (c *Client) NetworkState(ctx context.Context) ([]byte, error) {
	var s NetworkState
	code, err := c.network(ctx, http.MethodGet, "/v1/network/state", nil, &s)
	if code == http.StatusNotFound {
		return nil, nil
	}
	return s.State, err
}

// SaveNetworkState keeps state over power cuts: once it has returned nil. Of
// what was kept before nothing is left then. Errors are as NetworkState's.
func (c *Client) SaveNetworkState(ctx context.Context, state []byte) error {
	_, err := c.network(ctx, http.MethodPut, "/v1/network/state", NetworkState{state}, nil)
	return err
}

// NetworkCertificate has a verifier certify the key of a request (PKCS #10,
// DER) as this laptop's network identity, and returns the certificate in DER.
// ErrNoCredential: none is in force, and nobody was asked.
func (c *Client) NetworkCertificate(ctx context.Context, request []byte) ([]byte, error) {
	var answer NetworkCertificate
	code, err := c.network(ctx, http.MethodPost, "/v1/network/certificate", NetworkRequest{request}, &answer)
	if code == http.StatusConflict {
		return nil, ErrNoCredential
	}
	return answer.Certificate, err
}

// network is one request. out is read from the answer unless it is nil.
func (c *Client) network(ctx context.Context, method, path string, in, out any) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, volumeTimeout)
	defer cancel()
	var body []byte
	if in != nil {
		var err error
		if body, err = json.Marshal(in); err != nil {
			return 0, err
		}
	}
	code, answer, err := c.do(ctx, method, path, body)
	if err != nil {
		return 0, err
	}
	var refused KeyRefused
	switch {
	case code == http.StatusForbidden && json.Unmarshal(answer, &refused) == nil:
		return code, &refused
	case code != http.StatusOK:
		return code, fmt.Errorf("attestd: %s %s: http status %d: %.400s", method, path, code, bytes.TrimSpace(answer))
	case out == nil:
		return code, nil
	}
	if err := json.Unmarshal(answer, out); err != nil {
		return code, fmt.Errorf("attestd: %s %s: %w", method, path, err)
	}
	return code, nil
}
