package update

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"sekisho/attest/gate"
)

// maxRelease bounds the file of the image's signed policies in bytes.
const maxRelease = 64 << 10

// Waits of Watch.
const (
	lookGap  = time.Second
	raiseGap = 5 * time.Second
)

// Release is what the host domain reads of its image's signed policies; the
// TPM alone knows whether they are worth anything.
type Release struct {
	Image   string `json:"image"`
	Version string `json:"version"`
	Epoch   uint64 `json:"epoch"`
	Raw     []byte `json:"-"` // as the file holds it
}

// ReadRelease reads the running image's signed policies.
func ReadRelease(path string) (*Release, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("signed policies: %w", err)
	}
	if info.Size() > maxRelease {
		return nil, fmt.Errorf("signed policies: %s has %d bytes, at most %d", path, info.Size(), maxRelease)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("signed policies: %w", err)
	}
	r, err := ParseRelease(data)
	if err != nil {
		return nil, fmt.Errorf("signed policies: %s: %w", path, err)
	}
	return r, nil
}

// ParseRelease reads signed policies; nothing in them is proven by that.
func ParseRelease(data []byte) (*Release, error) {
	r := Release{Raw: data}
	return &r, json.Unmarshal(data, &r)
}

// Proof is what is known of the running image.
type Proof struct {
	Uplink bool // there is a way to the organisation's servers
	// Good: attestation affirmed this boot, the tunnel is open, and so is the
	// work domain's disk.
	Good bool
	// Refused: attestation or the disk's key has refused the image.
	Refused bool
}

// Good finds out whether the running image is good, and what follows.
type Good struct {
	Release *Release // nil: an image without policies, which raises nothing
	Look    func(context.Context) Proof
	// Slots are nil where there are no two.
	Slots *Slots
	// Trial: the running slot is not the good one and is to become it.
	Trial bool
	// Limit is how long a trial may take while there is an uplink.
	Limit time.Duration
	// Restart restarts the laptop after a trial was given up.
	Restart func()
	// Raise raises the rollback counter to the release's epoch; gate.Client
	// has it.
	Raise func(context.Context, gate.VolumeRequest) error
	Say   func(format string, args ...any)
}

// refusedTime is for how long without a break a trial must be refused to be
// given up: the first refusals may be the verifier's that has no connection to
// its store.
const refusedTime = time.Minute

// Watch waits until the running image has proved good. Only then its slot
// becomes the one that the firmware starts, and only after that the rollback
// counter is raised: until then the image before it must be able to open the
// disk. A raise that the power cuts short goes on at the next boot. It returns
// when the counter is raised, cannot be, a trial was given up, or ctx ends.
func (g *Good) Watch(ctx context.Context) {
	reason := ""
	var linked, refused time.Duration
	last := time.Now()
	if !wait(ctx, lookGap, func() bool {
		p := g.Look(ctx)
		now := time.Now()
		passed := now.Sub(last)
		last = now
		if p.Good || !g.Trial {
			return p.Good
		}
		if p.Uplink {
			linked += passed
		}
		if refused += passed; !p.Refused {
			refused = 0
		}
		switch {
		case refused >= refusedTime:
			reason = FailedRefused
		case linked >= g.Limit:
			reason = FailedTime
		}
		return reason != ""
	}) {
		return
	}
	if reason != "" {
		g.Say("this image did not prove good (%s); restarting into the one before it / このイメージは正常と確認できません。前のイメージに戻ります", reason)
		if err := g.Slots.GiveUp(reason); err != nil {
			g.Say("warning: slots: %v", err)
		}
		g.Restart()
		return
	}
	if g.Trial && !wait(ctx, raiseGap, func() bool {
		err := g.Slots.MarkGood()
		if err != nil { // the counter must wait: the firmware starts the other slot
			g.Say("warning: slots: %v", err)
		}
		return err == nil
	}) {
		return
	}
	if g.Release != nil {
		g.raise(ctx)
	}
}

// raise raises the rollback counter.
func (g *Good) raise(ctx context.Context) {
	g.Say("release %s is good; raising the rollback counter to %d / リリース %[1]s は正常です", g.Release.Version, g.Release.Epoch)
	var err error
	done := wait(ctx, raiseGap, func() bool {
		err = g.Raise(ctx, gate.VolumeRequest{Release: g.Release.Raw})
		var no *gate.KeyRefused
		return err == nil || errors.As(err, &no) && len(no.Codes) > 0
	})
	switch {
	case err == nil && done:
		g.Say("rollback counter at %d: no older release opens the disk / 古いリリースではディスクを開けません", g.Release.Epoch)
	case done:
		g.Say("warning: rollback counter: %v", err)
	}
}

// wait looks at a condition until it holds or ctx ends.
func wait(ctx context.Context, gap time.Duration, holds func() bool) bool {
	tick := time.NewTicker(gap)
	defer tick.Stop()
	for !holds() {
		select {
		case <-ctx.Done():
			return false
		case <-tick.C:
		}
	}
	return true
}
