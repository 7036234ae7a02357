package connectip

import (
	"sync"
	"time"

	"sekisho/netd/tunnel"
)

const (
	// queueFirst is the bound before anything is known of the path.
	queueFirst = 1 << 20
	// queueMost and queueLeast bound the bytes that wait for the peer; packets
	// beyond are dropped, which tells the inner TCP to slow down. Between them
	// the bound is what the path takes within queueTime: the most of lately, for
	// which a measurement counts queueFade, so that a moment's loss does not make
	// the queue too short for the path to be filled again.
	queueMost  = 4 << 20
	queueLeast = 96 << 10
	queueTime  = 100 * time.Millisecond
	queueFade  = 4 * time.Second
	// queueBlocked is from which time on a write tells anything of the path.
	queueBlocked = 2 * time.Millisecond
	// controlMost is what capsules that are not dropped may come to: the peer's
	// own requests bound them, and a peer that asks without reading is cut.
	controlMost = queueMost + 1<<20
)

// outBuffers are what outboxes hold their bytes in, shared by all streams of
// the process: an idle one has none.
var outBuffers = sync.Pool{New: func() any { return new([]byte) }}

// outbox is the queue of one stream, in the form in which it goes out. There is
// a writer only while there is something to write.
type outbox struct {
	mu      sync.Mutex
	data    *[]byte // nil if nothing is queued
	most    int
	closed  bool
	writer  func() // starts one; nil while the stream does not run
	writing bool
}

// run makes start the way to start a writer, and starts one if it has to.
func (o *outbox) run(start func()) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.writer = start
	if o.data != nil || o.closed {
		o.write()
	}
}

// stop ends the starting of writers.
func (o *outbox) stop() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.writer = nil
}

// write sees to it that there is a writer. o.mu is held.
func (o *outbox) write() {
	if !o.writing && o.writer != nil {
		o.writing = true
		o.writer()
	}
}

// room is where to append. o.mu is held.
func (o *outbox) room() *[]byte {
	if o.data == nil {
		o.data = outBuffers.Get().(*[]byte)
	}
	return o.data
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
	data := o.room()
	full := func(n int) bool { return len(*data) > 0 && len(*data)+n+capsuleOverhead > o.most }
	if trains && f.TCP() {
		if full(len(f)) {
			return 0, 0, 1, true
		}
		*data = appendCapsule(*data, capsuleTrain, f)
		o.write()
		return 1, len(f.Packet()), 0, true
	}
	var room [tunnel.MaxMTU]byte
	if err := f.Split(room[:], func(p []byte) {
		if len(p) > MaxPacket || full(len(p)) {
			dropped++
			return
		}
		*data = appendPacket(*data, p)
		taken++
		bytes += len(p)
	}); err != nil {
		dropped++
	}
	if taken > 0 {
		o.write()
	}
	return taken, bytes, dropped, true
}

// control appends a capsule that is not dropped.
func (o *outbox) control(capsule []byte) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed {
		return
	}
	if data := o.room(); len(*data) < controlMost {
		*data = append(*data, capsule...)
	}
	o.write()
}

// take returns all that is queued, and how much may be: what the path takes
// within queueTime. A writer that gets nothing is none any more.
func (o *outbox) take() (data *[]byte, most int, closed bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	data, o.data = o.data, nil
	if data == nil && !o.closed {
		o.writing = false
	}
	return data, o.most, o.closed
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
	defer o.mu.Unlock()
	o.closed = true
	o.write()
}
