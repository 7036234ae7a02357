package connectip

import (
	"sync"
	"time"

	"sekisho/netd/tunnel"
)

const (
	// queueMost and queueLeast bound the bytes that wait for the peer; packets
	// beyond are dropped, which tells the inner TCP to slow down. Between them
	// the bound is what the path takes within queueTime: the most of lately, for
	// which a measurement counts queueFade, so that a moment's loss does not make
	// the queue too short for the path to be filled again.
	queueMost  = 1 << 20
	queueLeast = 96 << 10
	queueTime  = 100 * time.Millisecond
	queueFade  = 4 * time.Second
	// queueBlocked is from which time on a write tells anything of the path.
	queueBlocked = 2 * time.Millisecond
	// controlMost is what capsules that are not dropped may come to: the peer's
	// own requests bound them, and a peer that asks without reading is cut.
	controlMost = 2 * queueMost
)

// outbox is the queue of one stream, in the form in which it goes out.
type outbox struct {
	mu     sync.Mutex
	data   []byte
	most   int
	closed bool
	wake   chan struct{}
}

// frame appends f as capsules, a train as one if trains are understood. It
// returns how many packets, of how many bytes together, it took and how many it
// had no room for; open is false when the outbox is closed.
func (o *outbox) frame(f tunnel.Frame, trains bool) (taken, bytes, dropped int, open bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed {
		return 0, 0, 0, false
	}
	full := func(n int) bool { return len(o.data) > 0 && len(o.data)+n+capsuleOverhead > o.most }
	if trains && f.TCP() {
		if full(len(f)) {
			return 0, 0, 1, true
		}
		o.data = appendCapsule(o.data, capsuleTrain, f)
		o.signal()
		return 1, len(f.Packet()), 0, true
	}
	var room [tunnel.MaxMTU]byte
	if err := f.Split(room[:], func(p []byte) {
		if len(p) > MaxPacket || full(len(p)) {
			dropped++
			return
		}
		o.data = appendPacket(o.data, p)
		taken++
		bytes += len(p)
	}); err != nil {
		dropped++
	}
	if taken > 0 {
		o.signal()
	}
	return taken, bytes, dropped, true
}

// control appends a capsule that is not dropped.
func (o *outbox) control(capsule []byte) {
	o.mu.Lock()
	if !o.closed && len(o.data) < controlMost {
		o.data = append(o.data, capsule...)
	}
	o.mu.Unlock()
	o.signal()
}

// take returns all that is queued and goes on with spare as the next buffer.
func (o *outbox) take(spare []byte) (data []byte, closed bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	data, o.data = o.data, spare[:0]
	return data, o.closed
}

// took adapts the queue to a path that took n bytes within t.
func (o *outbox) took(n int, t time.Duration) {
	if t < queueBlocked {
		return
	}
	fits := int(min(float64(n)/t.Seconds()*queueTime.Seconds(), queueMost))
	o.mu.Lock()
	fade := int(float64(o.most) * min(t.Seconds()/queueFade.Seconds(), 1))
	o.most = max(o.most-fade, fits, queueLeast)
	o.mu.Unlock()
}

func (o *outbox) close() {
	o.mu.Lock()
	o.closed = true
	o.mu.Unlock()
	o.signal()
}

func (o *outbox) signal() {
	select {
	case o.wake <- struct{}{}:
	default:
	}
}
