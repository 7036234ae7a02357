package packet

import (
	"hash/maphash"
	"sync"
	"time"

	"sekisho/guestlink"
)

const (
	// maxPendingControl bounds the control frames that wait for a write.
	maxPendingControl = 4 * guestlink.MaxControl
	// flowQueues is the number of queues that flows are spread over.
	flowQueues = 256
	// quantum is how many bytes of a flow go before another has its turn.
	quantum = 8 << 10
	// alone is the length in bytes from which a frame is written from where it
	// lies, rather than copied into a batch.
	alone = 16 << 10
	// apart is how long after the last one, in nanoseconds, a short frame is no
	// part of a burst, which goes in batches.
	apart = 100_000
)

// queue holds what waits for the link: control frames, which go first, and
// packets by FQ-CoDel (RFC 8290). A flow that sends little passes those that
// flood; a flow that floods loses its own oldest packets. put never waits, so
// that nothing queues where its order cannot be chosen. What finds nothing
// before it and room in the connection goes at once (direct), which saves waking
// the writer.
type queue struct {
	pool    *pool
	direct  *directWriter // nil: all goes by the writer
	limit   int           // bytes in a batch
	now     func() int64  // monotonic nanoseconds
	dropped func(n int)   // a packet was dropped
	sent    func(n int)   // a packet of n bytes goes into a batch
	seed    maphash.Seed  // which flows share a queue is not for the guest to choose
	mu      sync.Mutex    // guards all below
	changed *sync.Cond    //
	control []byte        //
	flows   []flowQueue   //
	fresh   flowList      // flows that have just begun to send
	backlog flowList      //
	pending *slot         // dequeued, did not fit into the batch
	busy    bool          // somebody writes to the connection
	rest    *slot         // of which a part went directly, up to done
	done    int
	last    int64 // when the last packet came
	closed  bool
}

// flowQueue is one queue of packets.
type flowQueue struct {
	head, tail *slot
	bytes      int
	deficit    int
	listed     bool
	next       *flowQueue
	codel      codel
}

func (f *flowQueue) push(s *slot) {
	s.next = nil
	if f.tail == nil {
		f.head = s
	} else {
		f.tail.next = s
	}
	f.tail = s
	f.bytes += s.n
}

func (f *flowQueue) pop() *slot {
	s := f.head
	if s == nil {
		return nil
	}
	if f.head = s.next; f.head == nil {
		f.tail = nil
	}
	s.next = nil
	f.bytes -= s.n
	return s
}

// flowList is a list of flows that have packets.
type flowList struct{ head, tail *flowQueue }

func (l *flowList) push(f *flowQueue) {
	f.next = nil
	if l.tail == nil {
		l.head = f
	} else {
		l.tail.next = f
	}
	l.tail = f
}

func (l *flowList) pop() {
	f := l.head
	if l.head = f.next; l.head == nil {
		l.tail = nil
	}
	f.next = nil
}

func newQueue(p *pool, direct *directWriter, limit int, dropped, sent func(int)) *queue {
	began := time.Now()
	q := &queue{
		pool: p, direct: direct, limit: limit, dropped: dropped, sent: sent, seed: maphash.MakeSeed(),
		now:   func() int64 { return int64(time.Since(began)) + 1 },
		flows: make([]flowQueue, flowQueues),
	}
	q.changed = sync.NewCond(&q.mu)
	return q
}

// put takes the frame in s, whose packet is given for its flow. It reports
// false, and leaves s to the caller, when the queue is closed.
func (q *queue) put(s *slot, packet []byte) bool {
	var key [64]byte
	f := &q.flows[maphash.Bytes(q.seed, guestlink.FlowKey(key[:0], packet))%flowQueues]
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return false
	}
	s.at = q.now()
	burst := s.n < alone && s.at-q.last < apart
	q.last = s.at
	if q.direct != nil && !burst && !q.busy && q.idle() {
		q.send(s)
		return true
	}
	f.push(s)
	if !f.listed {
		f.listed, f.deficit = true, quantum
		q.fresh.push(f)
	}
	q.changed.Signal()
	return true
}

// idle reports whether nothing waits.
func (q *queue) idle() bool {
	return len(q.control) == 0 && q.pending == nil && q.fresh.head == nil && q.backlog.head == nil
}

// send writes s directly, without the lock, and leaves the rest to the writer.
func (q *queue) send(s *slot) {
	q.busy = true
	q.mu.Unlock()
	n := q.direct.write(s.buf[:s.n])
	q.mu.Lock()
	q.sent(s.size)
	if n < s.n && !q.closed {
		q.rest, q.done = s, n
		q.changed.Signal()
		return
	}
	q.pool.put(s)
	q.free()
}

// written says that what take returned is written.
func (q *queue) written() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.free()
}

// free ends a write. Who waits for the connection gets it.
func (q *queue) free() {
	q.busy = false
	if !q.idle() || q.closed {
		q.changed.Signal()
	}
}

// evict drops the oldest packet of the longest flow, to make room. It reports
// false when nothing waits.
func (q *queue) evict() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	longest := &q.flows[0]
	for i := range q.flows {
		if q.flows[i].bytes > longest.bytes {
			longest = &q.flows[i]
		}
	}
	s := longest.pop()
	if s == nil {
		return false
	}
	q.drop(s)
	return true
}

func (q *queue) drop(s *slot) {
	q.dropped(s.size)
	q.pool.put(s)
}

// putControl queues a complete control frame and never waits. It reports false
// when the queue is closed or the other end has not read for too long.
func (q *queue) putControl(frame []byte) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed || len(q.control)+len(frame) > maxPendingControl {
		return false
	}
	q.control = append(q.control, frame...)
	q.changed.Signal()
	return true
}

// take waits for frames and returns what to write next: a batch built in
// buffer, or one long frame in its slot, which goes back by pool.put. It
// returns nil when the queue is closed. Call written when it is written.
func (q *queue) take(buffer []byte) (batch []byte, own *slot) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for ; !q.closed; q.changed.Wait() {
		if s := q.rest; s != nil {
			q.rest = nil
			return s.buf[q.done:s.n], s
		}
		if q.busy {
			continue
		}
		if batch, own = q.collect(buffer[:0]); len(batch) > 0 {
			q.busy = true
			return batch, own
		}
	}
	return nil, nil
}

// collect makes a batch of what waits.
func (q *queue) collect(batch []byte) ([]byte, *slot) {
	if len(q.control) > 0 {
		batch = append(batch, q.control...)
		q.control = q.control[:0]
		return batch, nil
	}
	for s := q.next(); s != nil; s = q.next() {
		if len(batch) == 0 && s.n >= alone {
			q.sent(s.size)
			return s.buf[:s.n], s
		}
		if len(batch)+s.n > q.limit && len(batch) > 0 {
			q.pending = s
			break
		}
		batch = append(batch, s.buf[:s.n]...)
		q.sent(s.size)
		q.pool.put(s)
	}
	return batch, nil
}

// next takes the packet whose turn it is (RFC 8290, section 4.2).
func (q *queue) next() *slot {
	if s := q.pending; s != nil {
		q.pending = nil
		return s
	}
	now := q.now()
	for {
		list := &q.fresh
		if list.head == nil {
			list = &q.backlog
		}
		f := list.head
		if f == nil {
			return nil
		}
		if f.deficit <= 0 {
			f.deficit += quantum
			list.pop()
			q.backlog.push(f)
			continue
		}
		if s := f.dequeue(now, q.drop); s != nil {
			f.deficit -= s.n
			return s
		}
		list.pop()
		// A flow that empties while fresh waits once behind the others, so
		// that it cannot stay fresh for ever.
		if list == &q.fresh && q.backlog.head != nil {
			q.backlog.push(f)
		} else {
			f.listed = false
		}
	}
}

// close makes put, putControl and take return at once, now and later, and
// counts what waited as dropped.
func (q *queue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return
	}
	q.closed = true
	if q.pending != nil {
		q.drop(q.pending)
		q.pending = nil
	}
	if q.rest != nil { // counted as sent: where it broke off is not known
		q.pool.put(q.rest)
		q.rest = nil
	}
	for i := range q.flows {
		for s := q.flows[i].pop(); s != nil; s = q.flows[i].pop() {
			q.drop(s)
		}
	}
	q.changed.Broadcast()
}
