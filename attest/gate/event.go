package gate

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	"sekisho/attest"
)

// ErrNoEvents is returned by Client.Record where attestd keeps no log of
// run-time events: trying again is of no use.
var ErrNoEvents = errors.New("attestd keeps no log of run-time events")

// MeasureTime bounds how long measuring an event may take: a TPM that is opened
// for it may need most of a minute for its keys. Who gives up early and asks
// again has the event measured twice.
const MeasureTime = 3 * time.Minute

// Record has attestd measure an event of the host domain's run time into the
// TPM. A nil error means that it is measured and that a new quote follows.
// Only root may do this. An event that was answered by another error may have
// been measured; recording it again shows it twice.
func (c *Client) Record(ctx context.Context, e attest.RunEvent) error {
	ctx, cancel := context.WithTimeout(ctx, MeasureTime)
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

// VolumeRequest asks attestd for what the image's signed policies allow: to
// make the key of a new volume, or to raise the rollback counter.
type VolumeRequest struct {
	Release json.RawMessage `json:"release"` // the image's signed policies
}

// NewVolume is a volume in the making. All of it is secret but the id.
type NewVolume struct {
	ID       []byte `json:"id"`
	Key      []byte `json:"key"`
	Recovery string `json:"recovery"` // recovery key, to be shown once
}

// BindRequest ties the volume in the making to its header.
type BindRequest struct {
	ID     []byte        `json:"id"`
	Header attest.Digest `json:"header"`
}

// RecoverRequest asks for a volume's key by its recovery key.
type RecoverRequest struct {
	UnlockRequest
	Recovery string `json:"recovery"` // secret
}

// BoundVolume is what stands on the disk beside an encrypted volume.
type BoundVolume struct {
	Volume []byte `json:"volume"`
}

// RecoverResponse is the key, a secret, and the volume sealed anew to this
// TPM, if that could be done.
type RecoverResponse struct {
	Key    []byte `json:"key"`
	Volume []byte `json:"volume,omitempty"`
}

// volumeTimeout bounds a request about a volume: a discrete TPM may take
// most of a minute to count up to the first epoch.
const volumeTimeout = 2 * time.Minute

// Codes of KeyRefused: what keeps a key shut until somebody does something.
const (
	CodeSecureBoot = "pcr-7"       // Secure Boot is off, or its keys are others
	CodeImage      = "pcr-11"      // not the image or command line that was signed
	CodeUsed       = "pcr-15"      // a key was used already in this boot
	CodeRolledBack = "rolled-back" // older than a release that this device has run
	CodeOtherTPM   = "other-tpm"   // not the TPM that sealed, or it was cleared
	CodeHeader     = "header"      // not the header that the key belongs to
	CodeNoEscrow   = "no-escrow"   // the organisation has no escrow key
	CodePolicy     = "no-policy"   // the image has no usable signed policies
	CodeRecovery   = "recovery"    // not the volume's recovery key
	CodeRefused    = "refused"     // the TPM refused and nothing shows why
)

// KeyRefused is attestd's answer when there is no key. Without codes trying
// again may help.
type KeyRefused struct {
	Codes  []string `json:"codes"`
	Detail string   `json:"detail"`
}

func (k *KeyRefused) Error() string { return k.Detail }

// ErrNotEscrowed: the recovery key could not be handed to the organisation
// yet. Try again.
var ErrNotEscrowed = errors.New("the recovery key is not in the organisation's hands yet")

// Unlock returns the key of a sealed volume. A nil error means that this boot
// is one that the release signed, that the header is the volume's own, and
// that the use is measured. The error, a *KeyRefused, says what differs. Only
// root may do this, once in a boot.
func (c *Client) Unlock(ctx context.Context, r UnlockRequest) ([]byte, error) {
	var k UnlockResponse
	err := c.ask(ctx, "/v1/unlock", r, &k)
	return k.Key, err
}

// NewVolume has attestd make a key and seal it, with the rollback counter that
// goes with it. Nothing of it lasts until BindVolume.
func (c *Client) NewVolume(ctx context.Context, r VolumeRequest) (v NewVolume, err error) {
	return v, c.ask(ctx, "/v1/volume", r, &v)
}

// BindVolume returns the volume for its header. A nil error means that the
// organisation has the recovery key in escrow and that the use of the key is
// measured; ErrNotEscrowed, that the verifier has not affirmed this laptop yet
// or does not answer.
func (c *Client) BindVolume(ctx context.Context, r BindRequest) ([]byte, error) {
	var v BoundVolume
	err := c.ask(ctx, "/v1/volume/bind", r, &v)
	return v.Volume, err
}

// Recover is Unlock by the recovery key instead of by policy.
func (c *Client) Recover(ctx context.Context, r RecoverRequest) (k RecoverResponse, err error) {
	return k, c.ask(ctx, "/v1/volume/recover", r, &k)
}

// RaiseRollback has attestd raise the rollback counter to the epoch of the
// running image. Only for an image that has proved good; root alone.
func (c *Client) RaiseRollback(ctx context.Context, r VolumeRequest) error {
	return c.ask(ctx, "/v1/rollback", r, &struct{}{})
}

// UpdateRequest asks whether a release may follow the running one.
type UpdateRequest struct {
	Running []byte `json:"running"` // the running image's signed policies
	Next    []byte `json:"next"`    // those of the image that is to follow
}

// CheckUpdate asks attestd whether the keys of this laptop would open for the
// next release; root alone. *KeyRefused: they would not, or it is older than
// what this device has run.
func (c *Client) CheckUpdate(ctx context.Context, r UpdateRequest) error {
	return c.ask(ctx, "/v1/release", r, &struct{}{})
}

// NextRelease is a release that is to follow the running one; no Version: there
// is none.
type NextRelease struct {
	Version string        `json:"version"`
	Epoch   uint64        `json:"epoch"`
	SHA256  attest.Digest `json:"sha256"` // of the image
	Size    int64         `json:"size"`   // bytes
}

// NextRelease has attestd ask the verifiers for the release that is to follow
// the running one; root alone.
func (c *Client) NextRelease(ctx context.Context, r VolumeRequest) (n NextRelease, err error) {
	return n, c.ask(ctx, "/v1/update", r, &n)
}

// Image opens the image of the NextRelease at an offset in bytes. A connection
// that breaks is an error of Read; the rest can be asked for.
func (c *Client) Image(ctx context.Context, offset int64) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://attestd/v1/update/image?offset="+strconv.FormatInt(offset, 10), nil)
	if err != nil {
		return nil, err
	}
	long := *c.http
	long.Timeout = 0 // ctx ends it
	resp, err := long.Do(req)
	if err != nil {
		return nil, fmt.Errorf("attestd: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 400))
		return nil, errors.Join(fmt.Errorf("attestd: image: http status %d: %s", resp.StatusCode, bytes.TrimSpace(text)), resp.Body.Close())
	}
	return resp.Body, nil
}

// ask posts a request about a volume.
func (c *Client) ask(ctx context.Context, path string, question, answer any) error {
	ctx, cancel := context.WithTimeout(ctx, volumeTimeout)
	defer cancel()
	body, err := json.Marshal(question)
	if err != nil {
		return err
	}
	code, text, err := c.do(ctx, http.MethodPost, path, body)
	switch {
	case err != nil:
		return err
	case code == http.StatusServiceUnavailable:
		return fmt.Errorf("%w: %.400s", ErrNotEscrowed, bytes.TrimSpace(text))
	case code == http.StatusForbidden:
		var k KeyRefused
		if err := json.Unmarshal(text, &k); err != nil {
			return fmt.Errorf("attestd: POST %s: %.400s", path, bytes.TrimSpace(text))
		}
		return &k
	case code != http.StatusOK:
		return fmt.Errorf("attestd: POST %s: http status %d: %.400s", path, code, bytes.TrimSpace(text))
	}
	if err := json.Unmarshal(text, answer); err != nil {
		return fmt.Errorf("attestd: POST %s: %w", path, err)
	}
	return nil
}
