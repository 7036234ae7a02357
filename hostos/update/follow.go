package update

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"time"

	"sekisho/attest"
	"sekisho/attest/gate"
)

// Source is where releases come from; gate.Client is one.
type Source interface {
	NextRelease(context.Context, gate.VolumeRequest) (gate.NextRelease, error)
	Image(ctx context.Context, offset int64) (io.ReadCloser, error)
	CheckUpdate(context.Context, gate.UpdateRequest) error
}

// Waits of Follow.
const (
	firstAsk = 10 * time.Second // after the running image proved good
	askGap   = time.Hour        // up to half as much again, so that laptops do not all ask at once
	brokeGap = 10 * time.Second // after a connection that brought nothing, doubled up to
	maxBroke = 10 * time.Minute
)

// maxTries is how often an update is tried that failed for a reason that need
// not be its own.
const maxTries = 3

// Follower takes the releases that the organisation gives.
type Follower struct {
	Running *Release
	Source  Source
	Slots   *Slots
	Say     func(format string, args ...any)
	// Now has it asked at once when something comes; it may be nil.
	Now <-chan struct{}
}

// Check is the judgement of signed policies that Slots.Stage wants.
func (f *Follower) Check(ctx context.Context, policy []byte) (*Release, error) {
	if err := f.Source.CheckUpdate(ctx, gate.UpdateRequest{Running: f.Running.Raw, Next: policy}); err != nil {
		return nil, err
	}
	return ParseRelease(policy)
}

// Follow asks for a release from time to time and stages what is offered, until
// ctx ends.
func (f *Follower) Follow(ctx context.Context) {
	for gap := firstAsk; f.await(ctx, gap); gap = askGap + rand.N(askGap/2) {
		n, err := f.Source.NextRelease(ctx, gate.VolumeRequest{Release: f.Running.Raw})
		if err != nil || n.Version == "" || !f.wanted(n.SHA256) {
			continue // attestd's log says why
		}
		f.Say("release %s is being fetched / リリース %[1]s をダウンロードしています", n.Version)
		body := &download{ctx: ctx, f: f, want: n}
		err = f.Slots.Stage(ctx, body, n.Size, func(policy []byte, sum attest.Digest) (*Release, error) {
			if sum != n.SHA256 {
				return nil, errors.New("the image is not the one of the manifest")
			}
			r, err := f.Check(ctx, policy)
			if err == nil && (r.Version != n.Version || r.Epoch != n.Epoch) {
				return nil, fmt.Errorf("the image is release %s of epoch %d, its manifest says %s of epoch %d", r.Version, r.Epoch, n.Version, n.Epoch)
			}
			return r, err
		})
		body.shut()
		if err != nil && ctx.Err() == nil {
			f.Say("warning: update to %s: %v", n.Version, err)
		} else if err == nil {
			f.Slots.Announce(f.Say)
		}
	}
}

// Announce says that an update waits for the next start.
func (s *Slots) Announce(say func(string, ...any)) {
	if t := s.Status().Trial; t != nil {
		say("release %s is in slot %s and is tried at the next start / リリース %[1]s の準備ができました。次回の起動時に試行します", t.Version, t.Slot)
	}
}

// wanted reports whether an image is neither under way nor has failed.
func (f *Follower) wanted(sum attest.Digest) bool {
	s, text := f.Slots.Status(), hex.EncodeToString(sum[:])
	if s.Trial != nil && s.Trial.SHA256 == text {
		return false
	}
	if s.Failed == nil || s.Failed.SHA256 != text {
		return true
	}
	// The power may have gone, or the laptop was switched off in its trial.
	own := s.Failed.Reason != FailedToStart && s.Failed.Reason != FailedRestart
	return !own && s.Failed.Tries < maxTries
}

// download reads an image. Where the connection breaks it goes on from there,
// as long as the same image is offered.
type download struct {
	ctx  context.Context
	f    *Follower
	want gate.NextRelease
	at   int64
	body io.ReadCloser // nil: not connected
	wait time.Duration // before the next connection; 0: the last one brought something
}

func (d *download) Read(b []byte) (int, error) {
	for d.at < d.want.Size {
		if d.body == nil {
			if err := d.connect(); err != nil {
				return 0, err
			}
		}
		n, err := d.body.Read(b[:min(int64(len(b)), d.want.Size-d.at)])
		d.at += int64(n)
		if err != nil {
			d.shut()
		}
		if n > 0 {
			d.wait = 0
			return n, nil
		}
	}
	return 0, io.EOF
}

// connect opens the rest of the image. After a connection that brought nothing
// it waits, the longer the oftener, and sees that the image is still offered.
func (d *download) connect() error {
	for {
		if d.wait > 0 {
			if !pause(d.ctx, d.wait) {
				return d.ctx.Err()
			}
			n, err := d.f.Source.NextRelease(d.ctx, gate.VolumeRequest{Release: d.f.Running.Raw})
			if err == nil && n.SHA256 != d.want.SHA256 {
				return errors.New("it is no longer offered")
			}
		}
		d.wait = min(max(2*d.wait, brokeGap), maxBroke)
		var err error
		if d.body, err = d.f.Source.Image(d.ctx, d.at); err == nil {
			return nil
		}
		d.body = nil
	}
}

func (d *download) shut() {
	if d.body != nil {
		d.body.Close()
		d.body = nil
	}
}

// await is pause until somebody asks.
func (f *Follower) await(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-f.Now:
	case <-ctx.Done():
	}
	return ctx.Err() == nil
}

// pause waits and reports whether ctx goes on.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
