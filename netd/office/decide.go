package office

import (
	"slices"
	"time"
)

const (
	// Every is how often a proven office is asked again over the open connection.
	Every = 500 * time.Millisecond
	// Life is how long a statement holds: three answers may be lost.
	Life = 2200 * time.Millisecond
	// enter is how many statements in a row make an office.
	enter = 4
	// window is of how many round trips the shortest counts.
	window = 8
	// After a loss, a new proof counts only after a pause that doubles from
	// firstHold to maxHold with each loss that follows an opening within calm.
	firstHold = time.Second
	maxHold   = time.Minute
	calm      = 2 * time.Minute
)

// Decision says whether the LAN counts as the office. It follows from the
// rounds alone; the zero value is closed. Opening takes several good rounds in
// a row and the pause after an earlier loss; closing takes silence for Life,
// one refusal, or round trips that all exceed the bound. So neither a lost
// packet nor a beacon that comes and goes makes the laptop flap.
type Decision struct {
	Bound time.Duration // of the shortest round trip in the window

	trips  []time.Duration // of the last good rounds, window at most
	row    int             // good rounds since the last loss
	until  time.Time       // end of the last statement
	open   bool
	opened time.Time
	hold   time.Duration
	closed time.Time // of the last loss
}

// Good notes a verified statement that took trip and holds for life.
func (d *Decision) Good(now time.Time, trip, life time.Duration) {
	d.settle(now)
	d.trips = append(d.trips, trip)
	d.trips = slices.Delete(d.trips, 0, max(0, len(d.trips)-window))
	d.row++
	d.until = now.Add(min(life, Life))
	near := slices.Min(d.trips) <= d.Bound
	switch {
	case d.open && !near && len(d.trips) == window:
		d.lose(now)
	case !d.open && near && d.row >= enter && now.Sub(d.closed) >= d.hold:
		d.open, d.opened = true, now
	}
}

// Refused notes a beacon that is not to be believed, or a LAN that has
// changed: the office is lost at once.
func (d *Decision) Refused(now time.Time) {
	d.settle(now)
	if d.open {
		d.lose(now)
	}
	d.row, d.trips, d.until = 0, nil, time.Time{}
}

// Open reports whether the LAN is the office at now, and until when if nothing
// more is heard.
func (d *Decision) Open(now time.Time) (until time.Time, open bool) {
	d.settle(now)
	if !d.open {
		return time.Time{}, false
	}
	return d.until, true
}

// Over reports whether a moment has come by either clock: the monotonic one
// stands still while the machine is suspended, and the other is set
// (clock_gettime(2)). Whoever wakes up is in another LAN until it is proven.
func Over(until, now time.Time) bool {
	return !now.Before(until) || !now.Round(0).Before(until.Round(0))
}

// settle closes what has run out of time.
func (d *Decision) settle(now time.Time) {
	if !d.until.IsZero() && Over(d.until, now) {
		if d.open {
			d.lose(now)
		}
		d.row, d.trips, d.until = 0, nil, time.Time{}
	}
}

func (d *Decision) lose(now time.Time) {
	if now.Sub(d.opened) < calm {
		d.hold = min(max(2*d.hold, firstHold), maxHold)
	} else {
		d.hold = firstHold
	}
	d.open, d.closed = false, now
	d.row, d.trips, d.until = 0, nil, time.Time{}
}
