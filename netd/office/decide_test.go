package office

import (
	"testing"
	"time"
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
