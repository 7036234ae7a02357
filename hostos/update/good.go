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
	r := Release{Raw: data}
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, fmt.Errorf("signed policies: %s: %w", path, err)
	}
	return &r, nil
}

// Good finds out whether the running image is good, and what follows.
type Good struct {
	Release *Release
	// InTunnel reports whether attestation affirmed this boot and the tunnel
	// is open.
	InTunnel func(context.Context) bool
	// Raise raises the rollback counter to the release's epoch; gate.Client
	// has it.
	Raise func(context.Context, gate.VolumeRequest) error
	Say   func(format string, args ...any)
}

// Watch waits until the running image has proved good and only then raises the
// rollback counter: until then the image before it must be able to open the
// disk. A raise that the power cuts short goes on at the next boot. It returns
// when the counter is raised, cannot be, or ctx ends.
func (g *Good) Watch(ctx context.Context) {
	if !wait(ctx, lookGap, func() bool { return g.InTunnel(ctx) }) {
		return
	}
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
