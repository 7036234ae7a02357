package attest

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"
)

// TestFirst: an address that is silent holds up the next for attemptDelay, one
// that fails not at all, and what opens too late is discarded.
func TestFirst(t *testing.T) {
	a, b := netip.MustParseAddrPort("[2001:db8::1]:443"), netip.MustParseAddrPort("192.0.2.1:443")
	broken := errors.New("broken")
	for name, c := range map[string]struct {
		after     map[netip.AddrPort]time.Duration // until it opens; negative: fails after that
		deaf      bool                             // what is cancelled opens all the same
		want      netip.AddrPort
		took      time.Duration
		discarded int
	}{
		"first opens":          {map[netip.AddrPort]time.Duration{a: 100 * time.Millisecond, b: 0}, false, a, 100 * time.Millisecond, 0},
		"first is silent":      {map[netip.AddrPort]time.Duration{a: time.Hour, b: 10 * time.Millisecond}, false, b, 260 * time.Millisecond, 0},
		"first fails":          {map[netip.AddrPort]time.Duration{a: -10 * time.Millisecond, b: 10 * time.Millisecond}, false, b, 20 * time.Millisecond, 0},
		"both fail":            {map[netip.AddrPort]time.Duration{a: -10 * time.Millisecond, b: -10 * time.Millisecond}, false, netip.AddrPort{}, 20 * time.Millisecond, 0},
		"second opens in vain": {map[netip.AddrPort]time.Duration{a: 300 * time.Millisecond, b: 100 * time.Millisecond}, true, a, 350 * time.Millisecond, 1},
	} {
		synctest.Test(t, func(t *testing.T) {
			start, discarded := time.Now(), 0
			got, err := First(t.Context(), []netip.AddrPort{a, b}, func(ctx context.Context, at netip.AddrPort) (netip.AddrPort, error) {
				d := c.after[at]
				if c.deaf {
					ctx = context.WithoutCancel(ctx)
				}
				select {
				case <-ctx.Done():
					return netip.AddrPort{}, ctx.Err()
				case <-time.After(d.Abs()):
				}
				if d < 0 {
					return netip.AddrPort{}, broken
				}
				return at, nil
			}, func(netip.AddrPort) { discarded++ })
			if got != c.want || (err != nil) == c.want.IsValid() || discarded != c.discarded {
				t.Errorf("%s: %s, %v, %d discarded", name, got, err, discarded)
			}
			if err != nil && !errors.Is(err, broken) {
				t.Errorf("%s: %v", name, err)
			}
			if took := time.Since(start); took != c.took {
				t.Errorf("%s: took %v, want %v", name, took, c.took)
			}
		})
	}
}
