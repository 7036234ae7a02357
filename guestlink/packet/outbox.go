package packet

import (
	"sync"

	"sekisho/guestlink"
)

// maxPendingControl bounds the control frames that wait for a write.
const maxPendingControl = 4 * guestlink.MaxControl

// outbox gathers frames while the previous batch is being written: the slower
// the link, the larger the batch. It holds one batch at most; put waits.
type outbox struct {
	mu      sync.Mutex
	changed sync.Cond
	control []byte // sent before packets, so that a flood does not delay it
	packets []byte
	closed  bool
}

func newOutbox() *outbox {
	o := &outbox{packets: make([]byte, 0, guestlink.MaxBatch)}
	o.changed.L = &o.mu
	return o
}

// put queues one packet, waiting while the batch is full. It reports false
// when the outbox is closed.
func (o *outbox) put(packet []byte) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	// The longest packet and its header are over MaxBatch: it goes alone.
	for !o.closed && len(o.packets) > 0 && len(o.packets)+4+len(packet) > guestlink.MaxBatch {
		o.changed.Wait()
	}
	if o.closed {
		return false
	}
	b, err := guestlink.AppendFrame(o.packets, guestlink.TypePacket, packet)
	o.packets = b
	o.changed.Broadcast()
	return err == nil
}

// putControl queues a complete control frame and never waits. It reports false
// when the outbox is closed or the other end has not read for too long.
func (o *outbox) putControl(frame []byte) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed || len(o.control)+len(frame) > maxPendingControl {
		return false
	}
	o.control = append(o.control, frame...)
	o.changed.Broadcast()
	return true
}

// take waits for a batch, returns it and keeps spare for the next one. It
// returns nil when the outbox is closed.
func (o *outbox) take(spare []byte) []byte {
	o.mu.Lock()
	defer o.mu.Unlock()
	for !o.closed && len(o.packets) == 0 && len(o.control) == 0 {
		o.changed.Wait()
	}
	if o.closed {
		return nil
	}
	var batch []byte
	if len(o.control) > 0 {
		batch = append(spare[:0], o.control...)
		o.control = o.control[:0]
	} else {
		batch, o.packets = o.packets, spare[:0]
	}
	o.changed.Broadcast()
	return batch
}

// close makes put, putControl and take return at once, now and later.
func (o *outbox) close() {
	o.mu.Lock()
	o.closed = true
	o.mu.Unlock()
	o.changed.Broadcast()
}
