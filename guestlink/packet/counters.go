package packet

import (
	"fmt"
	"sync/atomic"

	"sekisho/guestlink"
)

// Drop says why a packet was not carried.
type Drop uint8

// Reasons for a drop; the words leave the process.
const (
	DropNoConfig    Drop = 0 // nothing is carried before a Config is known
	DropMalformed   Drop = 1 // not one whole IP packet
	DropSource      Drop = 2 // from the guest, not from its inner address
	DropDestination Drop = 3 // to the guest, not to its inner address
	DropNoLink      Drop = 4 // no link, or the link ended with it in the queue
	DropDevice      Drop = 5 // the TUN device refused it (down, or no memory)
	drops                = 6
)

func (d Drop) String() string {
	names := [drops]string{"no-config", "malformed", "source", "destination", "no-link", "device"}
	if int(d) < len(names) {
		return names[d]
	}
	return fmt.Sprintf("drop %d", uint8(d))
}

// Flow counts what was carried one way.
type Flow struct {
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes"` // of IP packets, without frame headers
}

// Counters is a snapshot of what a Pump did since it was made.
type Counters struct {
	FromLink  Flow              `json:"from_link"`
	ToLink    Flow              `json:"to_link"`
	Dropped   map[string]uint64 `json:"dropped"`    // by Drop, only what is not zero
	BadFrames map[string]uint64 `json:"bad_frames"` // by guestlink.Reason, likewise
	Links     uint64            `json:"links"`      // handshakes completed
}

type flow struct{ packets, bytes atomic.Uint64 }

func (f *flow) add(n int) { f.packets.Add(1); f.bytes.Add(uint64(n)) }

func (f *flow) load() Flow { return Flow{Packets: f.packets.Load(), Bytes: f.bytes.Load()} }

type counters struct {
	fromLink, toLink flow
	dropped          [drops]atomic.Uint64
	bad              [guestlink.Reasons]atomic.Uint64
	links            atomic.Uint64
}

func (c *counters) snapshot() Counters {
	s := Counters{
		FromLink: c.fromLink.load(), ToLink: c.toLink.load(), Links: c.links.Load(),
		Dropped: map[string]uint64{}, BadFrames: map[string]uint64{},
	}
	for i := range c.dropped {
		if n := c.dropped[i].Load(); n > 0 {
			s.Dropped[Drop(i).String()] = n
		}
	}
	for i := range c.bad {
		if n := c.bad[i].Load(); n > 0 {
			s.BadFrames[guestlink.Reason(i).String()] = n
		}
	}
	return s
}
