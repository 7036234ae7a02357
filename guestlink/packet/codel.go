package packet

import (
	"math"
	"time"

	"sekisho/guestlink"
)

// codelBacklog is how many bytes of a flow may wait without being a standing
// queue: what one write and the next take (RFC 8289, section 4.4, has one packet,
// which is as long as a write here). Where a machine is so slow that its
// processes wait for the processor, everything waits for longer than codelTarget.
const codelBacklog = 2 * guestlink.MaxBatch

// Parameters of CoDel (RFC 8289, section 4.4) in nanoseconds.
const (
	codelTarget   = int64(5 * time.Millisecond)
	codelInterval = int64(100 * time.Millisecond)
)

// codel decides which packets of one flow are dropped when they stood in the
// queue for too long (RFC 8289, section 5).
type codel struct {
	firstAbove int64 // when the sojourn time will have been above target for an interval; 0: it is not
	dropNext   int64
	count      int // drops since dropping began
	lastCount  int
	dropping   bool
}

// above reports whether a packet that waited for sojourn, with rest bytes
// behind it, is one of a standing queue.
func (c *codel) above(now, sojourn int64, rest int) bool {
	if sojourn < codelTarget || rest < codelBacklog {
		c.firstAbove = 0
		return false
	}
	if c.firstAbove == 0 {
		c.firstAbove = now + codelInterval
		return false
	}
	return now >= c.firstAbove
}

// next is the control law: the more drops, the shorter between them.
func (c *codel) next(t int64) int64 {
	return t + int64(float64(codelInterval)/math.Sqrt(float64(c.count)))
}

// dequeue takes the head of f, dropping by the control law.
func (f *flowQueue) dequeue(now int64, drop func(*slot)) *slot {
	c := &f.codel
	s := f.pop()
	if s == nil {
		c.dropping = false
		return nil
	}
	bad := c.above(now, now-s.at, f.bytes)
	if c.dropping {
		if !bad {
			c.dropping = false
			return s
		}
		for c.dropping && now >= c.dropNext {
			drop(s)
			c.count++
			if s = f.pop(); s == nil {
				c.dropping = false
				return nil
			}
			if !c.above(now, now-s.at, f.bytes) {
				c.dropping = false
			} else {
				c.dropNext = c.next(c.dropNext)
			}
		}
		return s
	}
	if !bad {
		return s
	}
	drop(s)
	c.dropping = true
	// Soon after the last time: go on near the rate that controlled it.
	if delta := c.count - c.lastCount; delta > 1 && now-c.dropNext < 16*codelInterval {
		c.count = delta
	} else {
		c.count = 1
	}
	c.lastCount, c.dropNext = c.count, c.next(now)
	return f.pop()
}
