package uplink

import (
	"cmp"
	"slices"
	"time"

	"sekisho/netd"
)

// Candidate is a link with all that the choice rests on.
type Candidate struct {
	netd.Uplink
	Index int // the kernel's, for an order among equals
	Place int // in the organisation's order, from 0
	// Settle is how long it has to be sound (Uplink.Since) before it takes over
	// from one that is sound too. It grows with every loss.
	Settle time.Duration
}

// The classes of candidates, best first.
const (
	sound   = 0 // a lease, and as far as is known packets come back
	dead    = 1 // a lease, but nothing comes back
	waiting = 2 // carrier, and no sound lease
	unable  = 3 // no carrier, or not allowed
)

func (c Candidate) class() int {
	switch {
	case !c.Carrier, c.Reason == netd.ReasonNotAllowed:
		return unable
	case !c.Usable():
		return waiting
	case c.Health == netd.HealthDead:
		return dead
	}
	return sound
}

// Choose returns the name of the uplink to use, empty if there is no
// candidate. present is the one in use. It is pure, and its rules are:
//
//   - a sound one before a dead one, before one that waits for a lease;
//   - among equals the organisation's order;
//   - a sound present one is left only for one that stands before it in the
//     order, has been seen to reach a gateway, and has been sound for its Settle.
//
// So a present one that is lost is left at once, a better one that flaps is
// never taken, and two that are dead are not swapped back and forth.
func Choose(candidates []Candidate, present string, now time.Time) string {
	if len(candidates) == 0 {
		return ""
	}
	order := func(a, b Candidate) int {
		return cmp.Or(a.class()-b.class(), a.Place-b.Place, a.Index-b.Index)
	}
	i := slices.IndexFunc(candidates, func(c Candidate) bool { return c.Name == present })
	if i < 0 || candidates[i].class() > dead {
		return slices.MinFunc(candidates, order).Name
	}
	p := candidates[i]
	if p.class() == dead {
		best := slices.MinFunc(candidates, order)
		if best.class() < p.class() {
			return best.Name
		}
		return present
	}
	ripe := slices.DeleteFunc(slices.Clone(candidates), func(c Candidate) bool {
		return c.class() != sound || c.Place >= p.Place || c.Health != netd.HealthGood || now.Sub(c.Since) < c.Settle
	})
	if len(ripe) == 0 {
		return present
	}
	return slices.MinFunc(ripe, order).Name
}
