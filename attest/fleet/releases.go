package fleet

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.etcd.io/etcd/client/v3/concurrency"

	"sekisho/attest"
	"sekisho/attest/release"
)

// Paths of the admin API for releases.
const (
	AdminReleases = "/admin/v1/releases" // GET → []ReleaseInfo; POST ?percent= signed manifest → ReleaseInfo; POST /{version}?percent= → ReleaseInfo
	AdminImages   = "/admin/v1/images"   // PUT /{sha256} the image
)

const (
	maxReleases  = 64
	maxDownloads = 32 // of images at once
	imageTime    = 15 * time.Minute
)

// published is one release in the store, in the order of publishing.
type published struct {
	Manifest []byte    `json:"manifest"` // signed
	Percent  int       `json:"percent"`  // of the devices
	At       time.Time `json:"at"`
}

// ReleaseInfo is one published release.
type ReleaseInfo struct {
	Version string        `json:"version"`
	Epoch   uint64        `json:"epoch"`
	SHA256  attest.Digest `json:"sha256"`
	Size    int64         `json:"size"`
	Percent int           `json:"percent"`
	At      time.Time     `json:"published"`
	Expires time.Time     `json:"expires"`
	// Here: this verifier holds the image; others have to be given it too.
	Here bool `json:"here"`
}

func (k keys) releases() string { return string(k) + "releases" }

func (s *Service) releaseInfo(p published) (ReleaseInfo, error) {
	m, err := release.Read(p.Manifest)
	if err != nil {
		return ReleaseInfo{}, err
	}
	_, err = os.Stat(s.imagePath(m.SHA256))
	return ReleaseInfo{m.Version, m.Epoch, m.SHA256, m.Size, p.Percent, p.At, time.Unix(m.Expires, 0).UTC(), err == nil}, nil
}

func (s *Service) imagePath(d attest.Digest) string { return filepath.Join(s.Images, d.String()) }

// readReleases returns what is published, oldest first.
func (s *Service) readReleases(ctx context.Context) (list []published, err error) {
	err = s.Store.Read(ctx, func(t concurrency.STM) error {
		list, _, err = read[[]published](t, s.keys.releases())
		return err
	})
	return list, err
}

// Releases lists the published releases, oldest first.
func (s *Service) Releases(ctx context.Context) ([]ReleaseInfo, error) {
	list, err := s.readReleases(ctx)
	infos := []ReleaseInfo{}
	for _, p := range list {
		i, ierr := s.releaseInfo(p)
		err = errors.Join(err, ierr)
		infos = append(infos, i)
	}
	return infos, err
}

func checkPercent(percent int) error {
	if percent < 0 || percent > 100 {
		return fmt.Errorf("release: %d percent, want 0 to 100", percent)
	}
	return nil
}

// PublishRelease offers a release to so many percent of the devices. A nil
// error proves: enough policy keys have signed it, the policy in force accepts
// the image, and this verifier holds it.
func (s *Service) PublishRelease(ctx context.Context, data []byte, percent int) (ReleaseInfo, error) {
	if s.PolicyKeys == nil || s.Images == "" {
		return ReleaseInfo{}, errors.New("no policy_keys in the verifier's configuration: nobody's release is accepted")
	}
	m, err := release.Open(s.PolicyKeys, s.Organization, data, s.Now())
	if err = errors.Join(err, checkPercent(percent)); err != nil {
		return ReleaseInfo{}, err
	}
	enforced, _, _ := s.Policies.InForce(s.Now())
	if enforced == nil || !slices.ContainsFunc(enforced.Bundle.Accepted(s.Now()), func(v attest.ReferenceValues) bool { return accepts(v, m) }) {
		return ReleaseInfo{}, fmt.Errorf("release %s: the policy in force does not accept this image: laptops would be refused after the update; publish a policy with its reference values first", m.Version)
	}
	if st, err := os.Stat(s.imagePath(m.SHA256)); err != nil || st.Size() != m.Size {
		return ReleaseInfo{}, fmt.Errorf("release %s: this verifier does not hold the image %s", m.Version, m.SHA256)
	}
	p := published{data, percent, s.Now().UTC().Truncate(time.Second)}
	_, err = s.Store.Update(ctx, func(t concurrency.STM) error {
		list, _, err := read[[]published](t, s.keys.releases())
		if err != nil {
			return err
		}
		for _, old := range list {
			if o, err := release.Read(old.Manifest); err == nil && o.Version == m.Version {
				return fmt.Errorf("release %s was published already; give the new one another version", m.Version)
			}
		}
		if len(list) >= maxReleases {
			list = list[1:]
		}
		return write(t, s.keys.releases(), append(list, p))
	})
	if err != nil {
		return ReleaseInfo{}, err
	}
	return s.releaseInfo(p)
}

// accepts reports whether the reference values are those of the release.
func accepts(v attest.ReferenceValues, m *release.Manifest) bool {
	for i, d := range m.PCRs {
		if v.PCRs[i] != d {
			return false
		}
	}
	return true
}

// RollOut changes to how many percent of the devices a release is offered.
func (s *Service) RollOut(ctx context.Context, version string, percent int) (ReleaseInfo, error) {
	if err := checkPercent(percent); err != nil {
		return ReleaseInfo{}, err
	}
	var found published
	_, err := s.Store.Update(ctx, func(t concurrency.STM) error {
		list, _, err := read[[]published](t, s.keys.releases())
		if err != nil {
			return err
		}
		for i, p := range list {
			if m, err := release.Read(p.Manifest); err == nil && m.Version == version {
				list[i].Percent, found = percent, list[i]
				found.Percent = percent
				return write(t, s.keys.releases(), list)
			}
		}
		return fmt.Errorf("no release %.64q", version)
	})
	if err != nil {
		return ReleaseInfo{}, err
	}
	return s.releaseInfo(found)
}

// offer is the release that a device in this ring, which runs version, is to
// have next: the newest that is for it; nil if none.
func offer(list []published, version string, ring int, now time.Time) *published {
	position, running := map[string]int{}, -1
	manifests := make([]*release.Manifest, len(list))
	for i, p := range list {
		if m, err := release.Read(p.Manifest); err == nil {
			manifests[i], position[m.Version] = m, i
		}
	}
	if i, ok := position[version]; ok {
		running = i
	}
	for i := len(list) - 1; i > running; i-- {
		m := manifests[i]
		if m == nil || ring >= list[i].Percent || !now.Before(time.Unix(m.Expires, 0)) {
			continue
		}
		least, known := position[m.MinimumFrom]
		if m.MinimumFrom == "" || m.MinimumFrom == version || known && running >= least {
			return &list[i]
		}
	}
	return nil
}

// Update answers a device that asks for a newer release, with what lets it
// fetch the image. The device has signed the question with its credential.
func (s *Service) Update(ctx context.Context, req attest.UpdateRequest) (*attest.UpdateAnswer, error) {
	device, err := s.signedBy(req.Chain, attest.UpdateDigest(req.Version), req.Signature)
	if err != nil {
		return nil, err
	}
	if s.Images == "" {
		return &attest.UpdateAnswer{}, nil
	}
	list, err := s.readReleases(ctx)
	if err != nil {
		return nil, err
	}
	p := offer(list, req.Version, release.Ring(device), s.Now())
	if p == nil {
		return &attest.UpdateAnswer{}, nil
	}
	m, err := release.Read(p.Manifest)
	if err != nil {
		return nil, err
	}
	return &attest.UpdateAnswer{Manifest: p.Manifest, Token: s.imageToken(m.SHA256, s.Now().Add(s.Lifetime+imageTime).Unix())}, nil
}

// imageToken lets whoever has it fetch one image until a time, in seconds since
// 1970, from any of the organisation's verifiers.
func (s *Service) imageToken(d attest.Digest, until int64) string {
	h := hmac.New(sha256.New, s.NonceKey[:])
	h.Write([]byte("sekisho/image/1"))
	h.Write(d[:])
	h.Write(binary.BigEndian.AppendUint64(nil, uint64(until)))
	return strconv.FormatInt(until, 10) + "." + hex.EncodeToString(h.Sum(nil))
}

func (s *Service) tokenHolds(d attest.Digest, token string) bool {
	text, _, _ := strings.Cut(token, ".")
	until, err := strconv.ParseInt(text, 10, 64)
	return err == nil && s.Now().Unix() < until && hmac.Equal([]byte(token), []byte(s.imageToken(d, until)))
}

func (a *api) update(w http.ResponseWriter, r *http.Request) {
	var req attest.UpdateRequest
	if !a.decode(w, r, &req) {
		return
	}
	answer, err := a.service.Update(r.Context(), req)
	a.answer(w, r, "update", answer, err)
}

// image sends an image, or the rest of it that a range asks for, to a device
// that holds a token for it.
func (a *api) image(w http.ResponseWriter, r *http.Request) {
	var d attest.Digest
	token, bearer := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if err := d.UnmarshalText([]byte(r.PathValue("sha256"))); err != nil || !bearer || !a.service.tokenHolds(d, token) {
		reply(w, http.StatusForbidden, attest.Refuse(attest.ReasonSignatureInvalid, "no token for this image"))
		return
	}
	select {
	case a.downloads <- struct{}{}:
		defer func() { <-a.downloads }()
	default:
		reply(w, http.StatusServiceUnavailable, attest.Refuse(attest.ReasonBusy, "too many downloads; try again"))
		return
	}
	f, err := os.Open(a.service.imagePath(d))
	if err != nil {
		reply(w, http.StatusNotFound, attest.Refuse(attest.ReasonNone, "this verifier does not hold the image"))
		return
	}
	defer f.Close()
	if err := http.NewResponseController(w).SetWriteDeadline(time.Now().Add(imageTime)); err != nil {
		a.log.Warn("longer answer", "error", err)
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("ETag", `"`+d.String()+`"`)
	http.ServeContent(w, r, "", time.Time{}, f)
}

// PutImage stores an image under its SHA-256, which it must have.
func (s *Service) PutImage(d attest.Digest, image io.Reader) (err error) {
	if s.Images == "" {
		return errors.New("this verifier keeps no images: it has no policy_keys")
	}
	if err := os.MkdirAll(s.Images, 0o700); err != nil {
		return fmt.Errorf("image: %w", err)
	}
	f, err := os.CreateTemp(s.Images, ".new-*")
	if err != nil {
		return fmt.Errorf("image: %w", err)
	}
	defer os.Remove(f.Name()) // of no effect once renamed
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(f, h), io.LimitReader(image, release.MaxImage+1))
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("image: %w", err)
	}
	if n > release.MaxImage || attest.Digest(h.Sum(nil)) != d {
		return fmt.Errorf("image: %d bytes whose SHA-256 is not %s", n, d)
	}
	return os.Rename(f.Name(), s.imagePath(d))
}

func (a *admin) releaseRoutes() []route {
	return []route{
		{pattern: "GET " + AdminReleases, handler: func(w http.ResponseWriter, r *http.Request) {
			list, err := a.Releases(r.Context())
			answer(a, w, list, err)
		}},
		{pattern: "POST " + AdminReleases, handler: a.publishRelease},
		{pattern: "POST " + AdminReleases + "/{version}", handler: a.publishRelease},
		{pattern: "PUT " + AdminImages + "/{sha256}", handler: a.putImage},
	}
}

// publishRelease takes a new release, or the new percentage of an old one.
func (a *admin) publishRelease(w http.ResponseWriter, r *http.Request) {
	data, ok := a.body(w, r, release.MaxManifest)
	if !ok {
		return
	}
	percent, err := strconv.Atoi(r.URL.Query().Get("percent"))
	var i ReleaseInfo
	if version := r.PathValue("version"); err == nil && version != "" {
		i, err = a.RollOut(r.Context(), version, percent)
	} else if err == nil {
		i, err = a.PublishRelease(r.Context(), data, percent)
	}
	if err != nil {
		a.fail(w, http.StatusConflict, err)
		return
	}
	a.log.Info("release offered", "version", i.Version, "percent", i.Percent)
	reply(w, http.StatusOK, i)
}

func (a *admin) putImage(w http.ResponseWriter, r *http.Request) {
	c, until := http.NewResponseController(w), time.Now().Add(imageTime)
	var d attest.Digest
	err := errors.Join(d.UnmarshalText([]byte(r.PathValue("sha256"))), c.SetReadDeadline(until), c.SetWriteDeadline(until))
	if err == nil {
		err = a.PutImage(d, r.Body)
	}
	if err != nil {
		a.fail(w, http.StatusBadRequest, err)
		return
	}
	reply(w, http.StatusOK, struct{}{})
}

// PutImage gives the verifier an image; its SHA-256 is d.
func (a *Admin) PutImage(ctx context.Context, d attest.Digest, image io.Reader) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, "http://verifier"+AdminImages+"/"+d.String(), image)
	if err != nil {
		return err
	}
	patient := *a.http
	patient.Timeout = imageTime
	return adminAnswer(&patient, req, &struct{}{})
}

// PublishRelease offers a release to so many percent of the devices.
func (a *Admin) PublishRelease(ctx context.Context, manifest []byte, percent int) (i ReleaseInfo, err error) {
	return i, a.do(ctx, http.MethodPost, AdminReleases+"?percent="+strconv.Itoa(percent), manifest, &i)
}

// RollOut changes to how many percent of the devices a release is offered.
func (a *Admin) RollOut(ctx context.Context, version string, percent int) (i ReleaseInfo, err error) {
	return i, a.do(ctx, http.MethodPost, AdminReleases+"/"+version+"?percent="+strconv.Itoa(percent), nil, &i)
}

// Releases lists the published releases, oldest first.
func (a *Admin) Releases(ctx context.Context) (list []ReleaseInfo, err error) {
	return list, a.do(ctx, http.MethodGet, AdminReleases, nil, &list)
}
