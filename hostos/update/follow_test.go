package update

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"sekisho/attest"
	"sekisho/attest/gate"
)

// source offers one image over a connection that breaks after some bytes.
type source struct {
	image  []byte
	next   gate.NextRelease
	breaks int     // bytes of each connection; 0: it never breaks
	down   int     // connections that are refused first
	empty  int     // connections that bring nothing first
	from   []int64 // offsets that were asked for
	gone   bool    // the release is withdrawn once a connection broke
	asked  int
	check  error
}

func (s *source) NextRelease(context.Context, gate.VolumeRequest) (gate.NextRelease, error) {
	s.asked++
	if s.gone && len(s.from) > 0 {
		return gate.NextRelease{}, nil
	}
	return s.next, nil
}

func (s *source) Image(_ context.Context, offset int64) (io.ReadCloser, error) {
	if s.down > 0 || s.gone && len(s.from) > 0 {
		s.down--
		return nil, errors.New("verifier away")
	}
	s.from = append(s.from, offset)
	if s.empty > 0 {
		s.empty--
		return io.NopCloser(broken{}), nil
	}
	rest := s.image[offset:]
	if s.breaks == 0 || s.breaks >= len(rest) {
		return io.NopCloser(bytes.NewReader(rest)), nil
	}
	return io.NopCloser(io.MultiReader(bytes.NewReader(rest[:s.breaks]), broken{})), nil
}

func (s *source) CheckUpdate(context.Context, gate.UpdateRequest) error { return s.check }

type broken struct{}

func (broken) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }

// TestFollow: an offered image is fetched, from where a connection broke, and
// staged only if it is the one of the manifest; what failed is not tried for
// ever.
func TestFollow(t *testing.T) {
	image := program(`{"version":"2","epoch":17}`, 40<<10, 'n', true)
	sum := attest.Digest(sha256.Sum256(image))
	offer := gate.NextRelease{Version: "2", Epoch: 17, SHA256: sum, Size: int64(len(image))}
	other := offer
	other.SHA256 = attest.Digest{1}
	epoch := offer
	epoch.Epoch = 18
	failed := func(reason string, tries int) *Failure {
		return &Failure{Version: "2", SHA256: attest.Digest(sum).String(), Reason: reason, Tries: tries}
	}
	for name, c := range map[string]struct {
		source source
		failed *Failure
		staged bool
		asked  int64 // last offset
	}{
		"whole":            {source{next: offer}, nil, true, 0},
		"breaks":           {source{next: offer, breaks: 16 << 10, down: 3}, nil, true, 32 << 10},
		"brings nothing":   {source{next: offer, empty: 3}, nil, true, 0},
		"withdrawn":        {source{next: offer, breaks: 16 << 10, gone: true}, nil, false, 0},
		"another image":    {source{next: other}, nil, false, 0},
		"another epoch":    {source{next: epoch}, nil, false, 0},
		"refused":          {source{next: offer, check: errors.New("older")}, nil, false, 0},
		"nothing":          {source{}, nil, false, -1},
		"was refused":      {source{next: offer}, failed(FailedRefused, 1), false, -1},
		"was switched off": {source{next: offer}, failed(FailedRestart, 2), true, 0},
		"three times":      {source{next: offer}, failed(FailedRestart, 3), false, -1},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLaptop(t)
			l.install(t, program(`{}`, 4<<10, 'o', true))
			if err := save(l, Record{Good: SlotA, Failed: c.failed}); err != nil {
				t.Fatal(err)
			}
			synctest.Test(t, func(t *testing.T) {
				ctx, stop := context.WithTimeout(t.Context(), 10*time.Minute)
				defer stop()
				s, _, err := l.begin(SlotA, 1)
				if err != nil {
					t.Fatal(err)
				}
				src := c.source
				src.image = image
				f := Follower{Running: &Release{Version: "1", Raw: []byte("{}")}, Source: &src, Slots: s, Say: t.Logf}
				f.Follow(ctx)
				trial := s.Status().Trial
				if (trial != nil && trial.Stage == Armed) != c.staged || (l.vars["BootNext"] != nil) != c.staged {
					t.Errorf("trial %+v, next boot %x", trial, l.vars["BootNext"])
				}
				if c.staged && !bytes.Equal(l.content(t, SlotB), image) {
					t.Error("the slot holds another image")
				}
				last := int64(-1)
				if len(src.from) > 0 {
					last = src.from[len(src.from)-1]
				}
				if last < c.asked || c.asked < 0 && last >= 0 || src.asked == 0 {
					t.Errorf("offsets %v, want up to %d; asked %d times", src.from, c.asked, src.asked)
				}
			})
		})
	}
}
