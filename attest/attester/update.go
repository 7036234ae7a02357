package attester

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	"sekisho/attest"
	"sekisho/attest/gate"
	"sekisho/attest/policy"
	"sekisho/attest/release"
	"sekisho/attest/seal"
)

// imageTime bounds the sending of an image, or of what is left of it.
const imageTime = 15 * time.Minute

// offered is the release that a verifier offered last, and what lets us fetch
// its image.
type offered struct {
	manifest *release.Manifest
	token    string
}

// ring returns the keys that sign the organisation's releases.
func (a *Attester) ring() (*policy.Keyring, error) {
	u := a.Organization.Updates
	if u == nil {
		return nil, errors.New("update: the organisation names no keys for releases")
	}
	keys, err := u.PublicKeys()
	if err != nil {
		return nil, err
	}
	return policy.NewKeyring(u.Threshold, keys...)
}

// NextRelease asks the verifiers for a release that is to follow the running
// one; nil if there is none. What it returns is signed by enough of the
// organisation's keys, has not expired, and is not of an older epoch than
// running is.
func (a *Attester) NextRelease(ctx context.Context, running []byte) (*release.Manifest, error) {
	ring, err := a.ring()
	if err != nil {
		return nil, err
	}
	now, _, err := seal.ReadRelease(running)
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	chain := a.chain
	a.mu.Unlock()
	req := attest.UpdateRequest{Version: now.Version}
	for _, c := range chain {
		req.Chain = append(req.Chain, c.Raw)
	}
	digest := attest.UpdateDigest(req.Version)
	if req.Signature, err = a.Sign(digest[:]); err != nil {
		return nil, err
	}
	var errs []error
	for _, r := range a.remotes {
		var answer attest.UpdateAnswer
		if err := r.callJSON(ctx, attest.PathUpdate, req, &answer); err != nil {
			errs = append(errs, err)
			continue
		}
		if len(answer.Manifest) == 0 {
			return nil, nil
		}
		m, err := release.Open(ring, a.Organization.Name, answer.Manifest, a.Now())
		if err != nil {
			return nil, err
		}
		if m.Epoch < now.Epoch || m.Version == now.Version {
			return nil, fmt.Errorf("update: the verifier offers %s of epoch %d after %s of epoch %d", m.Version, m.Epoch, now.Version, now.Epoch)
		}
		a.mu.Lock()
		a.offer = &offered{m, answer.Token}
		a.mu.Unlock()
		return m, nil
	}
	return nil, errors.Join(errs...)
}

// Image opens the offered image at offset, from the first verifier that has it.
func (a *Attester) Image(ctx context.Context, offset int64) (io.ReadCloser, error) {
	a.mu.Lock()
	o := a.offer
	a.mu.Unlock()
	if o == nil || offset < 0 || offset >= o.manifest.Size {
		return nil, errors.New("update: no image was offered, or it has no such part; ask for a release first")
	}
	var errs []error
	for _, r := range a.remotes {
		body, err := r.image(ctx, o, offset)
		if err == nil {
			return body, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

// image asks one verifier for the rest of an image (RFC 9110, section 14).
func (r *remote) image(ctx context.Context, o *offered, offset int64) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+r.endpoint.Address.String()+attest.PathImage+"/"+o.manifest.SHA256.String(), nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+o.token)
	want := http.StatusOK
	if offset > 0 {
		req.Header.Set("Range", "bytes="+strconv.FormatInt(offset, 10)+"-")
		want = http.StatusPartialContent
	}
	long := *r.http
	long.Timeout = imageTime
	resp, err := long.Do(req)
	if err != nil {
		return nil, &unreachable{r.endpoint.Address.String(), errors.Unwrap(err)}
	}
	if resp.StatusCode != want || resp.ContentLength != o.manifest.Size-offset {
		return nil, errors.Join(fmt.Errorf("verifier %s: image: http status %d, %d bytes", r.endpoint.Address, resp.StatusCode, resp.ContentLength), resp.Body.Close())
	}
	return resp.Body, nil
}

func (a *Attester) serveNext(w http.ResponseWriter, r *http.Request) {
	var req gate.VolumeRequest
	if !decodeVolume(w, r, &req) {
		return
	}
	m, err := a.NextRelease(r.Context(), req.Release)
	if err != nil {
		a.Log.Warn("update", "error", err)
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	if m == nil {
		m = &release.Manifest{}
	}
	writeJSON(w, gate.NextRelease{Version: m.Version, Epoch: m.Epoch, SHA256: m.SHA256, Size: m.Size})
}

// serveImage passes the image on as the verifier sends it. A connection that
// breaks ends the answer early, and init asks for the rest.
func (a *Attester) serveImage(w http.ResponseWriter, r *http.Request) {
	a.patient(w, imageTime)
	offset, err := strconv.ParseInt(r.URL.Query().Get("offset"), 10, 64)
	if err != nil {
		http.Error(w, "offset: want a number of bytes", http.StatusBadRequest)
		return
	}
	body, err := a.Image(r.Context(), offset)
	if err != nil {
		a.Log.Warn("update", "error", err)
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	defer body.Close()
	w.Header().Set("Content-Type", "application/octet-stream")
	if _, err := io.Copy(w, body); err != nil {
		a.Log.Warn("update: image", "error", err)
		panic(http.ErrAbortHandler) // so that the end is not taken for the image's
	}
}
