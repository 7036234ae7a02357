//go:build linux

package e2e

import (
	"bytes"
	"context"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sekisho/netd/internal/nstest"
	"sekisho/netd/kernel"
	"sekisho/netd/tunnel"
)

// impairment is a link in user space that loses and delays packets, where the
// kernel has no netem: a TUN device in each of two namespaces, and goroutines
// between them.
type impairment struct {
	delay   time.Duration // one way
	loss    atomic.Uint64 // of a million packets, either way
	blocked atomic.Bool   // a black hole
	noUDP   atomic.Bool   // a network that lets no UDP through
	noTCP   atomic.Bool   // or no TCP
	narrow  atomic.Int64  // packets of more bytes vanish; 0: of none
	ends    [2]*tunnel.Device
}

// held bounds the packets on their way in one direction.
const held = 1 << 14

// impair joins two namespaces by such a link, named dev at both ends.
func impair(t testing.TB, dev string, a *nstest.NS, aAddress string, b *nstest.NS, bAddress string, delay time.Duration) *impairment {
	l := &impairment{delay: delay}
	for i, end := range []struct {
		ns            *nstest.NS
		address, peer string
	}{{a, aAddress, bAddress}, {b, bAddress, aAddress}} {
		ns, err := kernel.Open(end.ns.Path)
		if err != nil {
			t.Fatal(err)
		}
		d, err := ns.CreateTUN(dev, 1500)
		ns.Close()
		if err != nil {
			t.Fatal(err)
		}
		l.ends[i] = tunnel.NewDevice(d)
		end.ns.Run("ip", "address", "add", end.address+"/32", "peer", end.peer, "dev", dev)
		end.ns.Run("ip", "link", "set", dev, "up")
	}
	ctx, cancel := context.WithCancel(context.Background())
	var parts sync.WaitGroup
	for i := range l.ends {
		way := make(chan parcel, held)
		parts.Go(func() { l.take(l.ends[i], way) })
		parts.Go(func() { l.give(ctx, l.ends[1-i], way) })
	}
	t.Cleanup(func() {
		cancel()
		for _, e := range l.ends {
			e.Close()
		}
		parts.Wait()
	})
	return l
}

type parcel struct {
	due    time.Time
	packet []byte
}

func (l *impairment) take(from *tunnel.Device, way chan<- parcel) {
	room := make([]byte, tunnel.MaxMTU)
	for {
		f, err := from.Read()
		if err != nil {
			return
		}
		due := time.Now().Add(l.delay)
		f.Split(room, func(p []byte) {
			if n := l.narrow.Load(); n > 0 && int64(len(p)) > n {
				return
			}
			if l.blocked.Load() || rand.Uint64N(1e6) < l.loss.Load() || l.noUDP.Load() && carries(p, 17) || l.noTCP.Load() && carries(p, 6) {
				return
			}
			select {
			case way <- parcel{due, bytes.Clone(p)}:
			default:
			}
		})
	}
}

func (l *impairment) give(ctx context.Context, to *tunnel.Device, way <-chan parcel) {
	var batch [][]byte
	for {
		var p parcel
		select {
		case <-ctx.Done():
			return
		case p = <-way:
		}
		if early := time.Until(p.due); early > 0 {
			select {
			case <-ctx.Done():
				return
			case <-time.After(early):
			}
		}
		batch = append(batch[:0], p.packet)
		for more := true; more && len(batch) < 128; {
			select {
			case p = <-way:
				batch = append(batch, p.packet)
				more = time.Until(p.due) <= 0
			default:
				more = false
			}
		}
		to.Write(batch)
	}
}

// carries reports whether p is an IPv4 packet of the protocol.
func carries(p []byte, protocol byte) bool { return len(p) > 9 && p[0]>>4 == 4 && p[9] == protocol }
