package packet

import (
	"sync"

	"sekisho/guestlink"
)

// Memory of a queue: bounded, so that a flood cannot grow it.
const (
	maxQueued = 4 << 20 // bytes of all slots, lent or free
	smallSlot = 2 << 10 // holds a packet of any usual MTU
	largeSlot = guestlink.HeaderSize + guestlink.VirtioHeaderSize + guestlink.MaxPacket
	// slotSizes are powers of two from smallSlot on, and largeSlot: a slot is at
	// most twice as long as what is in it, or a queue of middling packets would
	// hold few of them.
	slotSizes = 6
)

// slot is one frame in a queue.
type slot struct {
	buf  []byte
	n    int   // bytes of the frame, header included
	size int   // bytes of the packet in it
	at   int64 // nanoseconds of the queue's clock at which it came
	next *slot
}

// pool lends slots.
type pool struct {
	mu   sync.Mutex
	free [slotSizes]*slot // by size
	made int              // bytes of all slots
}

// class returns the index and the length of the shortest slot for n bytes.
func class(n int) (i, size int) {
	for i, size = 0, smallSlot; i < slotSizes-1; i, size = i+1, 2*size {
		if n <= size {
			return i, size
		}
	}
	return i, largeSlot
}

// get returns a slot that holds n bytes, or nil when too much is lent.
func (p *pool) get(n int) *slot {
	i, size := class(n)
	p.mu.Lock()
	defer p.mu.Unlock()
	if s := p.free[i]; s != nil {
		p.free[i], s.next = s.next, nil
		return s
	}
	for other := range p.free { // what is free in other sizes makes room
		for p.made+size > maxQueued && p.free[other] != nil {
			p.made -= len(p.free[other].buf)
			p.free[other] = p.free[other].next
		}
	}
	if p.made+size > maxQueued {
		return nil
	}
	p.made += size
	return &slot{buf: make([]byte, size)}
}

func (p *pool) put(s *slot) {
	i, _ := class(len(s.buf))
	p.mu.Lock()
	defer p.mu.Unlock()
	s.next, p.free[i] = p.free[i], s
}
