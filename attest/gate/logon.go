package gate

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"

	"sekisho/attest"
)

// ErrShut is returned by Client.UseLogonKey while the gate for logon is shut.
var ErrShut = errors.New("the gate for logon is shut")

// MaxLogonState bounds what Client.SaveLogonState keeps, in bytes.
const MaxLogonState = 96 << 10

// CreateLogonKey is the body of POST /v1/logon/keys: a new key of the card.
type CreateLogonKey struct {
	Kind      string `json:"kind"`      // attest.LogonRSA2048 or attest.LogonP256
	Agreement bool   `json:"agreement"` // it agrees on secrets instead of signing
}

// LogonKey is a key of the card as it is kept outside of the TPM, with the
// proof that it is in it.
type LogonKey struct {
	Key        json.RawMessage `json:"key"`         // wrapped by the TPM; of use to this TPM alone
	Public     []byte          `json:"public"`      // SubjectPublicKeyInfo
	AK         []byte          `json:"ak"`          // attestation key, TPMT_PUBLIC
	Certify    []byte          `json:"certify"`     // TPM2_Certify of the key
	CertifySig []byte          `json:"certify_sig"` // by AK
	Area       []byte          `json:"area"`        // TPMT_PUBLIC
	Storage    []byte          `json:"storage"`     // TPM Name of the storage key above it
	Bound      bool            `json:"bound"`       // to the release's signed policy, not to the TPM alone
}

// CardRequest is a certificate request for the card's key, with the proof that
// the key is in the laptop's TPM: what logind prints and attestctl checks.
type CardRequest struct {
	CSR        []byte `json:"csr"`         // PEM, PKCS #10
	Key        []byte `json:"key"`         // TPMT_PUBLIC
	Storage    []byte `json:"storage"`     // TPM Name of the storage key above it
	AK         []byte `json:"ak"`          // attestation key, TPMT_PUBLIC
	Certify    []byte `json:"certify"`     // TPM2_Certify of the key by AK
	CertifySig []byte `json:"certify_sig"` // its signature
	Bound      bool   `json:"bound"`       // the key is bound to the release's policy
}

// MaxCardRequest bounds a CardRequest's JSON in bytes.
const MaxCardRequest = 64 << 10

// ParseCardRequest reads a CardRequest of which no part is missing. It judges
// none of them.
func ParseCardRequest(data []byte) (*CardRequest, error) {
	if len(data) > MaxCardRequest {
		return nil, fmt.Errorf("card request: %d bytes, at most %d", len(data), MaxCardRequest)
	}
	var r CardRequest
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, fmt.Errorf("card request: %w; print it with: logind request -json", err)
	}
	for name, field := range map[string][]byte{"csr": r.CSR, "key": r.Key, "storage": r.Storage, "certify": r.Certify, "certify_sig": r.CertifySig} {
		if len(field) == 0 {
			return nil, fmt.Errorf("card request: no %s; print it with: logind request -json", name)
		}
	}
	return &r, nil
}

// UseLogonKey is the body of POST /v1/logon/use.
type UseLogonKey struct {
	Key       json.RawMessage       `json:"key"`
	Operation attest.LogonOperation `json:"operation"`
	Input     []byte                `json:"input"`
}

// LogonOutput is the answer to UseLogonKey.
type LogonOutput struct {
	Output []byte `json:"output"`
}

// LogonState is the body of PUT /v1/logon/state and the answer to GET: what
// logind remembers over boots, encrypted on the disk under a key that the TPM
// keeps. It is personal data.
type LogonState struct {
	State []byte `json:"state"`
}

// CreateLogonKey has attestd make a key of the card in the TPM. Only logind and
// root may do this.
func (c *Client) CreateLogonKey(ctx context.Context, r CreateLogonKey) (k LogonKey, err error) {
	_, err = c.logon(ctx, http.MethodPost, "/v1/logon/keys", r, &k)
	return k, err
}

// UseLogonKey does one operation with a key of the card. ErrShut: no affirming
// result is in force. Whether a finger matched is for the caller to know.
func (c *Client) UseLogonKey(ctx context.Context, r UseLogonKey) ([]byte, error) {
	var out LogonOutput
	code, err := c.logon(ctx, http.MethodPost, "/v1/logon/use", r, &out)
	if code == http.StatusForbidden {
		return nil, ErrShut
	}
	return out.Output, err
}

// LogonState returns what SaveLogonState saved last; nil when nothing was.
func (c *Client) LogonState(ctx context.Context) ([]byte, error) {
	var s LogonState
	code, err := c.logon(ctx, http.MethodGet, "/v1/logon/state", nil, &s)
	if code == http.StatusNotFound {
		return nil, nil
	}
	return s.State, err
}

// SaveLogonState keeps state over power cuts: once it has returned nil.
func (c *Client) SaveLogonState(ctx context.Context, state []byte) error {
	_, err := c.logon(ctx, http.MethodPut, "/v1/logon/state", LogonState{state}, nil)
	return err
}

// ReportLogon hands what is new of the card to a verifier, signed with the
// credential in force, and returns its answer. attestd says which device it is.
// ErrShut: no affirming result is in force, so nothing was sent.
func (c *Client) ReportLogon(ctx context.Context, n attest.LogonNews) (a attest.LogonAnswer, err error) {
	code, err := c.logon(ctx, http.MethodPost, "/v1/logon/report", n, &a)
	if code == http.StatusForbidden {
		return a, ErrShut
	}
	return a, err
}

// logon is one request. out is read from the answer unless it is nil.
func (c *Client) logon(ctx context.Context, method, path string, in, out any) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, logonTimeout)
	defer cancel()
	var body []byte
	if in != nil {
		var err error
		if body, err = json.Marshal(in); err != nil {
			return 0, err
		}
	}
	code, answer, err := c.doUpTo(ctx, method, path, body, 2*MaxLogonState)
	if err != nil {
		return 0, err
	}
	if code/100 != 2 {
		return code, fmt.Errorf("attestd: %s %s: http status %d: %.400s", method, path, code, bytes.TrimSpace(answer))
	}
	if out != nil {
		if err := json.Unmarshal(answer, out); err != nil {
			return code, fmt.Errorf("attestd: %s %s: %w", method, path, err)
		}
	}
	return code, nil
}
