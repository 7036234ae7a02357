package connectip

import "time"

// Carriage names what carries a session.
type Carriage uint8

// The carriages. The zero value is none.
const (
	TLS   Carriage = 1 // TLS on TCP
	HTTP3 Carriage = 2 // HTTP/3 on UDP
)

func (c Carriage) String() string {
	switch c {
	case TLS:
		return "TLS on TCP"
	case HTTP3:
		return "HTTP/3"
	}
	return "none"
}

func (c Carriage) other() Carriage {
	if c == HTTP3 {
		return TLS
	}
	return HTTP3
}

// Sample is what a carriage has seen of its path since the last Sample.
type Sample struct {
	Sent, Lost  uint64        // outer packets
	RTT, Jitter time.Duration // smoothed, and its mean deviation
	Carried     uint64        // bytes of inner packets so far, both ways
	Dropped     uint64        // inner packets that found no room so far
}

const (
	// sampleEvery is how often a chooser takes a step.
	sampleEvery = time.Second
	// A path is rough if rough of a thousand packets are lost, of at least
	// enough, or if the round trip deviates by more than roughJitter and a third.
	roughPerMille = 5
	enough        = 100
	roughJitter   = 15 * time.Millisecond
	// bulk is the rate in bytes a second from which on throughput counts more
	// than the delay of single packets: TCP's own repair keeps the inner flows
	// fast where datagrams would hand each loss on to them.
	bulk = 256 << 10
	// So are crowded inner packets in a second that HTTP/3 has no room for,
	// whatever the rate is: quic-go yields to each loss, and what is dropped
	// meanwhile keeps the inner flows below bulk for ever.
	crowded = 10
	// A path counts as rough after roughFor such seconds of the last window, and
	// as clean after cleanFor without one; cleanFor doubles up to cleanMost with
	// each return, so that a path on the edge is not walked back and forth.
	window    = 10
	roughFor  = 3
	cleanFor  = 60 * time.Second
	cleanMost = 16 * time.Minute
	// A carriage that could not be opened is not tried again for this long.
	retryFirst = time.Minute
	retryMost  = 16 * time.Minute
)

// chooser says which carriage suits the path: TLS on clean paths and for bulk,
// HTTP/3 where packets get lost or late and nobody moves much. It is pure; step
// is called every sampleEvery.
type chooser struct {
	now     Carriage
	rough   [window]bool
	i       int
	sent    uint64
	lost    uint64
	carried uint64
	dropped uint64
	rate    uint64 // bytes a second, smoothed
	clean   time.Duration
	need    time.Duration // clean that it takes to go back to TLS
	hold    time.Duration // until the other carriage may be tried
	retry   time.Duration
}

// at tells the chooser which carriage a new session has.
func (c *chooser) at(now Carriage) {
	*c = chooser{now: now, need: max(c.need, cleanFor), hold: c.hold, retry: c.retry}
}

// failed tells the chooser that the carriage it chose could not be opened.
func (c *chooser) failed() {
	c.retry = min(max(2*c.retry, retryFirst), retryMost)
	c.hold = c.retry
}

// step takes a sample and returns the carriage to be used.
func (c *chooser) step(s Sample) Carriage {
	c.hold = max(0, c.hold-sampleEvery)
	if c.carried != 0 && s.Carried >= c.carried {
		c.rate = (3*c.rate + s.Carried - c.carried) / 4
	}
	crowd := s.Dropped >= c.dropped+crowded
	c.carried, c.dropped = s.Carried, s.Dropped
	c.sent += s.Sent
	c.lost += s.Lost
	lossy := false
	if c.sent >= enough {
		lossy = c.lost*1000 >= c.sent*roughPerMille
		c.sent, c.lost = 0, 0
	}
	c.rough[c.i%window] = lossy || s.Jitter > roughJitter && s.Jitter > s.RTT/3
	c.i++
	n := 0
	for _, r := range c.rough {
		if r {
			n++
		}
	}
	c.clean += sampleEvery
	if n > 0 {
		c.clean = 0
	}
	switch {
	case c.hold > 0:
	case c.now == TLS && n >= roughFor && c.rate < bulk:
		return HTTP3
	case c.now == HTTP3 && c.rate >= bulk:
		return TLS
	case c.now == HTTP3 && crowd:
		c.hold = retryFirst // what waits there has to show its rate first
		return TLS
	case c.now == HTTP3 && c.clean >= c.need:
		c.need = min(2*c.need, cleanMost)
		return TLS
	}
	return c.now
}
