package packet

import (
	"sync"

	"sekisho/guestlink"
)

// Memory of a queue: fixed, so that a flood cannot grow it. A slot that was
// never used costs address space only.
const (
	smallSlot  = 2 << 10 // holds a packet of any usual MTU
	largeSlot  = guestlink.HeaderSize + guestlink.VirtioHeaderSize + guestlink.MaxPacket
	smallSlots = 1024 // 2 MiB
	largeSlots = 32   // 2 MiB
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
	mu           sync.Mutex
	small, large *slot // free ones
	made         [2]int
}

// get returns a slot that holds n bytes, or nil when all are lent.
func (p *pool) get(n int) *slot {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n <= smallSlot {
		if s := take(&p.small, &p.made[0], smallSlots, smallSlot); s != nil {
			return s
		}
	}
	return take(&p.large, &p.made[1], largeSlots, largeSlot)
}

func take(free **slot, made *int, limit, size int) *slot {
	if s := *free; s != nil {
		*free, s.next = s.next, nil
		return s
	}
	if *made == limit {
		return nil
	}
	*made++
	return &slot{buf: make([]byte, size)}
}

func (p *pool) put(s *slot) {
	p.mu.Lock()
	defer p.mu.Unlock()
	free := &p.small
	if len(s.buf) > smallSlot {
		free = &p.large
	}
	s.next, *free = *free, s
}
