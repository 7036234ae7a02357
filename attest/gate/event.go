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

// ErrNoEvents is returned by Client.Record where attestd keeps no log of
// run-time events: trying again is of no use.
var ErrNoEvents = errors.New("attestd keeps no log of run-time events")

// Record has attestd measure an event of the host domain's run time into the
// TPM. A nil error means that it is measured and that a new quote follows.
// Only root may do this. An event that was answered by another error may have
// been measured; recording it again shows it twice.
func (c *Client) Record(ctx context.Context, e attest.RunEvent) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	body, err := json.Marshal(e)
	if err != nil {
		return err
	}
	code, answer, err := c.do(ctx, http.MethodPost, "/v1/events", body)
	switch {
	case err != nil:
		return err
	case code == http.StatusNotFound:
		return ErrNoEvents
	case code != http.StatusOK:
		return fmt.Errorf("attestd: POST /v1/events: http status %d: %.200s", code, answer)
	}
	return nil
}

// UnlockRequest asks attestd for the key of a sealed volume.
type UnlockRequest struct {
	Volume  []byte          `json:"volume"`  // as it stands on the disk (attest/seal.Volume)
	Header  attest.Digest   `json:"header"`  // SHA-256 of the encrypted volume's header
	Release json.RawMessage `json:"release"` // the image's signed policies (attest/seal.Release)
}

// UnlockResponse is the key. It is a secret.
type UnlockResponse struct {
	Key []byte `json:"key"`
}

// Unlock returns the key of a sealed volume. A nil error means that this boot
// is one that the release signed, that the header is the volume's own, and
// that the use is measured. The error says what differs. Only root may do
// this, once in a boot.
func (c *Client) Unlock(ctx context.Context, r UnlockRequest) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	body, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	code, answer, err := c.do(ctx, http.MethodPost, "/v1/unlock", body)
	if err != nil {
		return nil, err
	}
	if code != http.StatusOK {
		return nil, fmt.Errorf("attestd: POST /v1/unlock: %.800s", bytes.TrimSpace(answer))
	}
	var k UnlockResponse
	if err := json.Unmarshal(answer, &k); err != nil {
		return nil, fmt.Errorf("attestd: POST /v1/unlock: %w", err)
	}
	return k.Key, nil
}
