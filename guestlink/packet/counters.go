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
	DropNoConfig    Drop = 0  // nothing is carried before a Config is known
	DropMalformed   Drop = 1  // not one whole IP packet
	DropSource      Drop = 2  // from the guest, not from its inner address
	DropDestination Drop = 3  // to the guest, not to its inner address
	DropNoLink      Drop = 4  // no link
	DropDevice      Drop = 5  // the TUN device refused it (down, or no memory)
	DropQueue       Drop = 6  // waited too long, made room for newer ones, or the link ended first
	DropOffload     Drop = 7  // virtio-net header does not fit, or the other end takes none
	DropFragment    Drop = 8  // by guestlink.Policy
	DropOptions     Drop = 9  // likewise
	DropExtension   Drop = 10 // likewise
	DropNeighbour   Drop = 11 // likewise
	drops                = 12
)

func (d Drop) String() string {
	names := [drops]string{"no-config", "malformed", "source", "destination", "no-link", "device",
		"queue", "offload", "fragment", "options", "extension", "neighbour"}
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

// Counters is a snapshot of what a Pump did since it was made. A packet with a
// virtio-net header counts once, however many segments it stands for.
type Counters struct {
	FromLink        Flow              `json:"from_link"`
	ToLink          Flow              `json:"to_link"`
	Dropped         map[string]uint64 `json:"dropped"` // both ways, by Drop, only what is not zero
	DroppedFromLink map[string]uint64 `json:"dropped_from_link"`
	DroppedToLink   map[string]uint64 `json:"dropped_to_link"`
	BadFrames       map[string]uint64 `json:"bad_frames"` // by guestlink.Reason, likewise
	Links           uint64            `json:"links"`      // handshakes completed
}

type flow struct{ packets, bytes atomic.Uint64 }

func (f *flow) add(n int) { f.packets.Add(1); f.bytes.Add(uint64(n)) }

func (f *flow) load() Flow { return Flow{Packets: f.packets.Load(), Bytes: f.bytes.Load()} }

type dropCounts [drops]atomic.Uint64

type counters struct {
	fromLink, toLink   flow
	dropFrom, dropInto dropCounts // from, to the link
	bad                [guestlink.Reasons]atomic.Uint64
	links              atomic.Uint64
}

func (c *counters) snapshot() Counters {
	s := Counters{
		FromLink: c.fromLink.load(), ToLink: c.toLink.load(), Links: c.links.Load(),
		Dropped: map[string]uint64{}, DroppedFromLink: map[string]uint64{}, DroppedToLink: map[string]uint64{},
		BadFrames: map[string]uint64{},
	}
	for i := range drops {
		for m, d := range map[*dropCounts]map[string]uint64{&c.dropFrom: s.DroppedFromLink, &c.dropInto: s.DroppedToLink} {
			if n := m[i].Load(); n > 0 {
				word := Drop(i).String()
				d[word] = n
				s.Dropped[word] += n
			}
		}
	}
	for i := range c.bad {
		if n := c.bad[i].Load(); n > 0 {
			s.BadFrames[guestlink.Reason(i).String()] = n
		}
	}
	return s
}
