package fleet

import (
	"math"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"sekisho/attest"
	"sekisho/attest/verifier"
)

// crowd is what became of laptops that came to a ramp.
type crowd struct {
	took   []time.Duration // from first try to verdict, in order of coming
	asked  int             // times that they asked for a challenge
	most   int             // evidence that waited at once
	served time.Duration   // until the last one
}

// come has n laptops come at the same time to a verifier that judges rate of
// them a second, and obey it. Each needs a time for its TPM.
func come(t *testing.T, n int, rate float64) (c crowd) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		r := newRamp([verifier.NonceKeySize]byte{1}, time.Now)
		begin := time.Now()
		done := make(chan int)
		took := make([]time.Duration, n)
		asked := make([]int, n)
		judge := make(chan chan struct{}, n)
		go func() {
			for next := range judge {
				time.Sleep(time.Duration(float64(time.Second) / rate)) // a verifier of that speed, in the test's time
				r.leave()
				close(next)
			}
		}()
		most := make(chan int, n)
		for i := range n {
			go func() {
				device, ticket := attest.Digest{byte(i), byte(i >> 8)}, []byte(nil)
				for {
					var wait time.Duration
					asked[i]++
					if wait, ticket = r.admit(device, ticket); wait == 0 {
						break
					}
					time.Sleep(wait)
				}
				time.Sleep(time.Second) // the TPM signs
				r.enter()
				verdict := make(chan struct{})
				judge <- verdict
				_, _, line := r.state()
				most <- line
				<-verdict
				took[i] = time.Since(begin)
				done <- i
			}()
		}
		for range n {
			<-done
			c.most = max(c.most, <-most)
		}
		close(judge)
		c.took, c.served = took, time.Since(begin)
		for _, n := range asked {
			c.asked += n
		}
	})
	return c
}

// TestRamp has crowds of several sizes come to verifiers of several speeds:
// all are served, in about the time that the verifier's speed makes possible,
// and the line before it stays short.
func TestRamp(t *testing.T) {
	for _, c := range []struct {
		n    int
		rate float64
		line int
	}{
		{100, 1000, 128},  // no crowd at all
		{3000, 1000, 256}, // as fast as a verifier of two processors
		{10000, 1000, 256},
		{3000, 100, 9 * 100}, // slower than the ramp believes at first: still within maxLine
	} {
		got := come(t, c.n, c.rate)
		least := time.Duration(float64(c.n)/c.rate*float64(time.Second)) + time.Second
		slices.Sort(got.took)
		t.Logf("%d at %.0f/s: %v, possible %v; half within %v; %.2f questions each; line %d", c.n, c.rate, got.served.Round(time.Millisecond), least, got.took[c.n/2].Round(time.Millisecond), float64(got.asked)/float64(c.n), got.most)
		if got.served > 2*least+4*time.Second {
			t.Errorf("%d laptops at %.0f/s took %v, %v is possible", c.n, c.rate, got.served, least)
		}
		if got.most > c.line {
			t.Errorf("%d laptops at %.0f/s: %d waited with their evidence, want at most %d", c.n, c.rate, got.most, c.line)
		}
		if got.asked > 8*c.n {
			t.Errorf("%d laptops asked %d times", c.n, got.asked)
		}
	}
}

// TestRampTickets: a ticket is good for its device, from its time on and for a
// minute, with each verifier of the organisation.
func TestRampTickets(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	clock := func() time.Time { return now }
	r, other, stranger := newRamp([verifier.NonceKeySize]byte{1}, clock), newRamp([verifier.NonceKeySize]byte{1}, clock), newRamp([verifier.NonceKeySize]byte{2}, clock)
	fill := func(r *ramp) (wait time.Duration, ticket []byte) {
		for wait < 5*time.Second {
			wait, ticket = r.admit(attest.Digest{7}, nil)
		}
		return wait, ticket
	}
	wait, ticket := fill(r)
	fill(other)
	fill(stranger)
	if again, same := r.admit(attest.Digest{7}, ticket); again > wait || again < wait-time.Second || string(same) != string(ticket) {
		t.Errorf("too early: %v, want %v", again, wait)
	}
	now = now.Add(wait)
	if w, _ := r.admit(attest.Digest{7}, ticket); w != 0 {
		t.Errorf("in time: %v", w)
	}
	if w, _ := other.admit(attest.Digest{7}, ticket); w != 0 {
		t.Errorf("with another verifier: %v", w)
	}
	fill(r)
	bad := slices.Clone(ticket)
	bad[0] ^= 1
	for name, w := range map[string]time.Duration{
		"another device's": first(r.admit(attest.Digest{8}, ticket)),
		"a changed one":    first(r.admit(attest.Digest{7}, bad)),
		"half of one":      first(r.admit(attest.Digest{7}, ticket[:8])),
		"of another key":   first(stranger.admit(attest.Digest{7}, ticket)),
	} {
		if w == 0 && name != "of another key" {
			t.Errorf("%s ticket was taken", name)
		}
	}
	if _, ok := stranger.due(attest.Digest{7}, ticket, now); ok {
		t.Error("a ticket of another organisation is good")
	}
	now = now.Add(rampGap)
	if _, ok := r.due(attest.Digest{7}, ticket, now); ok {
		t.Error("an old ticket is good")
	}
	// However many come, nobody is sent away for longer than rampFar.
	for range 100 * rampMost {
		if w, _ := r.admit(attest.Digest{9}, nil); w > rampFar {
			t.Fatalf("sent away for %v", w)
		}
	}
	if rate, _, _ := r.state(); math.IsNaN(rate) || rate < rampLeast || rate > rampMost {
		t.Errorf("pace %v", rate)
	}
}

func first(w time.Duration, _ []byte) time.Duration { return w }
