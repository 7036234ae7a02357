package packet

import (
	"net"
	"sync"
	"testing"
	"time"

	"sekisho/guestlink"
)

// benchPacket is what a full Ethernet carries through the tunnel, about.
const benchPacket = 1400

// BenchmarkBareStream, BenchmarkFramedStream and BenchmarkQueuedStream move the
// same bytes over the same kind of socket: bare writes of 64 KiB, which are the
// limit of this way; batches of frames; and the same by way of the queue.

func BenchmarkFramedStream(b *testing.B) {
	l, dial := listen(b)
	go func() {
		c := dial()
		packet := ipv4("10.80.0.2", "10.1.0.1", benchPacket)
		buf := make([]byte, 0, guestlink.MaxBatch)
		for {
			for buf = buf[:0]; len(buf)+guestlink.HeaderSize+benchPacket <= guestlink.MaxBatch; {
				buf, _ = guestlink.AppendFrame(buf, guestlink.TypePacket, packet)
			}
			if c.SetWriteDeadline(time.Now().Add(stallTimeout)) != nil {
				return
			}
			if _, err := c.Write(buf); err != nil {
				return
			}
		}
	}()
	receive(b, l)
}

func BenchmarkQueuedStream(b *testing.B) {
	l, dial := listen(b)
	p := newPump(newMemDevice())
	var mu sync.Mutex
	free, waiting := sync.NewCond(&mu), 0
	q := newQueue(&p.pool, nil, guestlink.MaxBatch, func(int) {}, func(int) {
		mu.Lock()
		if waiting--; waiting == room/4 {
			free.Signal()
		}
		mu.Unlock()
	})
	go func() {
		packet := ipv4("10.80.0.2", "10.1.0.1", benchPacket)
		for {
			mu.Lock()
			for waiting++; waiting > room/2; {
				free.Wait() // unlike a TUN device, the benchmark loses nothing
			}
			mu.Unlock()
			s := p.pool.get(guestlink.HeaderSize + benchPacket)
			guestlink.PutHeader(s.buf, guestlink.TypePacket, benchPacket)
			s.n, s.size = guestlink.HeaderSize+copy(s.buf[guestlink.HeaderSize:], packet), benchPacket
			if !q.put(s, packet) {
				return
			}
		}
	}()
	go p.write(dial(), &link{queue: q})
	receive(b, l)
}

// receive takes the frames of one connection.
func receive(b *testing.B, l net.Listener) {
	c, err := l.Accept()
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	r := guestlink.NewReader(c)
	b.SetBytes(benchPacket)
	for b.Loop() {
		f, err := r.Next()
		if err != nil {
			b.Fatal(err)
		}
		if _, _, err := guestlink.ParseIP(f.Payload); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkBareStream(b *testing.B) {
	l, dial := listen(b)
	go func() {
		c := dial()
		buf := make([]byte, guestlink.MaxBatch)
		for {
			if c.SetWriteDeadline(time.Now().Add(stallTimeout)) != nil {
				return
			}
			if _, err := c.Write(buf); err != nil {
				return
			}
		}
	}()
	c, err := l.Accept()
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	buf := make([]byte, 2*guestlink.MaxBatch)
	have := 0
	b.SetBytes(benchPacket)
	for b.Loop() {
		for have < benchPacket {
			n, err := c.Read(buf)
			if err != nil {
				b.Fatal(err)
			}
			have += n
		}
		have -= benchPacket
	}
}
