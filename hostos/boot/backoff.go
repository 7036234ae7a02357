package boot

import "time"

// Back-off of a service that ends: each wait is twice the last one, and a run
// of stableRun starts again at the first.
const (
	firstWait   = 100 * time.Millisecond
	longestWait = 10 * time.Second
	stableRun   = 30 * time.Second
)

// nextWait returns how long to wait before a restart, given the wait before
// (0 for none yet) and how long the service ran.
func nextWait(last, ran time.Duration) time.Duration {
	if last == 0 || ran >= stableRun {
		return firstWait
	}
	return min(2*last, longestWait)
}
