package office

import (
	"testing"
	"time"
	"unsafe"
)

// TestDecision plays rounds against a clock: g a good round, f a good but slow
// one, r a refusal, and . silence, each followed by Every. It compares when the
// office is open.
func TestDecision(t *testing.T) {
	for _, c := range []struct{ name, rounds, open string }{
		{"nothing heard", "....", "----"},
		{"four in a row", "ggggg", "---OO"},
		{"slow", "ffffffffffff", "------------"},
		{"one fast among slow", "fffgffff", "---OOOOO"},
		{"three lost", "gggg...gggg", "---OOOOOOOO"},
		{"silence", "gggg......", "---OOOOO--"},
		{"refusal", "ggggrg", "---O--"},
		{"relay takes over", "ggggffffffffff", "---OOOOOOOO---"},
		{"comes again after the pause", "ggggrggggg", "---O----OO"},
		{"twice lost waits twice as long", "ggggrggggrggggggg", "---O----O----OOOO"},
		{"refused before it opened", "gggrgggg", "-------O"},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := Decision{Bound: 5 * time.Millisecond}
			now, got := time.Unix(1e9, 0), ""
			for _, r := range c.rounds {
				switch r {
				case 'g':
					d.Good(now, time.Millisecond, Life)
				case 'f':
					d.Good(now, 20*time.Millisecond, Life)
				case 'r':
					d.Refused(now)
				}
				if _, open := d.Open(now); open {
					got += "O"
				} else {
					got += "-"
				}
				now = now.Add(Every)
			}
			if got != c.open {
				t.Errorf("%s\ngot  %s\nwant %s", c.rounds, got, c.open)
			}
		})
	}
}

// TestSuspended: the monotonic clock has stood still for eight hours, and the
// laptop may be anywhere.
func TestSuspended(t *testing.T) {
	now := time.Now()
	later := now.Add(Every)
	// Wall clock seconds are above 30 bits of nanoseconds (time.Time).
	*(*uint64)(unsafe.Pointer(&later)) += 8 * 3600 << 30
	if later.Sub(now) != Every || later.Round(0).Sub(now.Round(0)) != 8*time.Hour+Every {
		t.Fatalf("%s is not eight hours of suspend after %s", later, now)
	}
	d := Decision{Bound: time.Second}
	for range enter {
		d.Good(now, time.Millisecond, Life)
	}
	until, open := d.Open(now)
	if !open || Over(until, now) {
		t.Fatal("not open before")
	}
	if _, open := d.Open(later); open || !Over(until, later) {
		t.Error("still open after a suspend")
	}
	if !Over(now.Add(Life), now.Add(Life)) {
		t.Error("the end itself is not over")
	}
}

// TestDecisionDoesNotFlap: a beacon that answers every other second for an hour
// opens the office a bounded number of times.
func TestDecisionDoesNotFlap(t *testing.T) {
	d := Decision{Bound: time.Second}
	now, opened, was := time.Unix(1e9, 0), 0, false
	for i := range 3600 * 2 {
		if i/6%2 == 0 { // three seconds there, three seconds refused
			d.Good(now, time.Millisecond, Life)
		} else {
			d.Refused(now)
		}
		_, open := d.Open(now)
		if open && !was {
			opened++
		}
		was = open
		now = now.Add(Every)
	}
	if opened == 0 || opened > 70 { // the pause grows to a minute
		t.Errorf("opened %d times in an hour", opened)
	}
}
