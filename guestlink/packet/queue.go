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
)

// queue holds what waits for the link: control frames, which go first, and
// packets by FQ-CoDel (RFC 8290). A flow that sends little passes those that
// flood; a flow that floods loses its own oldest packets. put never waits, so
// that nothing queues where its order cannot be chosen. Who has put what came at
// once writes it itself by flush, as far as the connection takes it: nobody is
// woken for it, and many packets go in one write.
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
	rest    []byte        // of a direct write that was cut short
	own     *slot         // that rest lies in, if it is not batch
	batch   []byte        // of direct writes
	waiting int           // bytes put since the last flush
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
	if direct != nil {
		q.batch = make([]byte, 0, guestlink.MaxBatch)
	}
	q.changed = sync.NewCond(&q.mu)
	return q
}

// put takes the frame in s, whose packet is given for its flow. With more, a
// flush follows soon. It reports false, and leaves s to the caller, when the
// queue is closed.
func (q *queue) put(s *slot, packet []byte, more bool) bool {
	var key [64]byte
	f := &q.flows[maphash.Bytes(q.seed, guestlink.FlowKey(key[:0], packet))%flowQueues]
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return false
	}
	s.at = q.now()
	f.push(s)
	if !f.listed {
		f.listed, f.deficit = true, quantum
		q.fresh.push(f)
	}
	q.waiting += s.n
	switch {
	case !more || q.direct == nil:
		q.changed.Signal()
	case s.n >= alone || q.waiting >= q.limit:
		q.send()
	}
	return true
}

// flush writes what waits, as far as the connection takes it at once, and
// reports whether that was anything.
func (q *queue) flush() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.direct == nil || q.waiting == 0 {
		return false
	}
	q.send()
	return true
}

// send is flush with the lock, which it gives up for the time of a write. The
// writer gets what is left.
func (q *queue) send() {
	q.waiting = 0
	for !q.busy && !q.closed {
		batch, own := q.collect(q.batch[:0])
		if len(batch) == 0 {
			return
		}
		q.busy = true
		q.mu.Unlock()
		n := q.direct.write(batch)
		q.mu.Lock()
		if n < len(batch) && !q.closed {
			q.rest, q.own = batch[n:], own
			q.changed.Signal()
			return
		}
		if own != nil {
			q.pool.put(own)
		}
		q.busy = false
	}
}

// idle reports whether nothing waits.
func (q *queue) idle() bool {
	return len(q.control) == 0 && q.pending == nil && q.fresh.head == nil && q.backlog.head == nil
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
		if q.rest != nil {
			batch, own, q.rest, q.own = q.rest, q.own, nil, nil
			return batch, own
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
	if q.own != nil { // counted as sent: where it broke off is not known
		q.pool.put(q.own)
	}
	q.rest, q.own = nil, nil
	for i := range q.flows {
		for s := q.flows[i].pop(); s != nil; s = q.flows[i].pop() {
			q.drop(s)
		}
	}
	q.changed.Broadcast()
}
