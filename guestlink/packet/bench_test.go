package packet

import (
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sekisho/guestlink"
)

// benchPacket is what a full Ethernet carries through the tunnel, about.
const benchPacket = 1400

// BenchmarkRatioStream moves packets of 1,400 bytes over a unix socket, in turn
// as batches of frames, by way of the queue, and the same bytes in bare writes
// of 64 KiB, which are the limit of this way; medians of the rounds' ratios.
func BenchmarkRatioStream(b *testing.B) {
	const rounds, each = 9, 200 * time.Millisecond
	ways := []struct {
		name       string
		send, take func(net.Conn)
	}{{"bare", sendBare, takeBare}, {"framed", sendFramed, takeFrames}, {"queued", sendQueued, takeFrames}}
	ratios := make([][]float64, len(ways))
	rates := make([][]float64, len(ways))
	for range rounds {
		var round [3]float64
		for i, w := range ways {
			round[i] = pass(b, w.send, w.take, each)
			rates[i] = append(rates[i], round[i])
			ratios[i] = append(ratios[i], round[i]/round[0])
		}
	}
	b.ReportMetric(0, "ns/op")
	for i, w := range ways {
		slices.Sort(rates[i])
		slices.Sort(ratios[i])
		b.Logf("%-6s %6.2f Gbit/s, to bare writes %.2f", w.name, rates[i][rounds/2], ratios[i][rounds/2])
		b.ReportMetric(ratios[i][rounds/2], w.name+"/bare")
	}
}

// counted counts the bytes that are read.
type counted struct {
	net.Conn
	n atomic.Int64
}

func (c *counted) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.n.Add(int64(n))
	return n, err
}

// pass lets send and take have a connection for d and returns the rate in
// Gbit/s.
func pass(b *testing.B, send, take func(net.Conn), d time.Duration) float64 {
	l, dial := listen(b)
	defer l.Close()
	out := dial()
	in, err := l.Accept()
	if err != nil {
		b.Fatal(err)
	}
	c := &counted{Conn: in}
	var wg sync.WaitGroup
	wg.Go(func() { send(out) })
	wg.Go(func() { take(c) })
	begin := time.Now()
	<-time.After(d)
	n, took := c.n.Load(), time.Since(begin)
	in.Close()
	out.Close()
	wg.Wait()
	return float64(n) * 8 / took.Seconds() / 1e9
}

func sendBare(c net.Conn) {
	buf := make([]byte, guestlink.MaxBatch)
	for {
		if _, err := c.Write(buf); err != nil {
			return
		}
	}
}

func takeBare(c net.Conn) {
	buf := make([]byte, guestlink.MaxBatch)
	for {
		if _, err := c.Read(buf); err != nil {
			return
		}
	}
}

func sendFramed(c net.Conn) {
	packet := ipv4("10.80.0.2", "10.1.0.1", benchPacket)
	buf := make([]byte, 0, guestlink.MaxBatch)
	for {
		for buf = buf[:0]; len(buf)+guestlink.HeaderSize+benchPacket <= guestlink.MaxBatch; {
			buf, _ = guestlink.AppendFrame(buf, guestlink.TypePacket, packet)
		}
		if _, err := c.Write(buf); err != nil {
			return
		}
	}
}

func takeFrames(c net.Conn) {
	r := guestlink.NewReader(c)
	for {
		f, err := r.Next()
		if err != nil {
			return
		}
		if _, _, err := guestlink.ParseIP(f.Payload); err != nil {
			panic(err)
		}
	}
}

// sendQueued sends by the queue. Unlike a TUN device it waits for room, so that
// nothing is lost.
func sendQueued(c net.Conn) {
	p := newPump(newMemDevice())
	var mu sync.Mutex
	free, waiting, closed := sync.NewCond(&mu), 0, false
	q := newQueue(&p.pool, nil, guestlink.MaxBatch, func(int) {}, func(int) {
		mu.Lock()
		if waiting--; waiting == room/4 {
			free.Signal()
		}
		mu.Unlock()
	})
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		p.write(c, &link{queue: q})
		mu.Lock()
		closed = true
		mu.Unlock()
		free.Signal()
	})
	packet := ipv4("10.80.0.2", "10.1.0.1", benchPacket)
	for {
		mu.Lock()
		for waiting++; waiting > room/2 && !closed; {
			free.Wait()
		}
		mu.Unlock()
		s := p.pool.get(guestlink.HeaderSize + benchPacket)
		guestlink.PutHeader(s.buf, guestlink.TypePacket, benchPacket)
		s.n, s.size = guestlink.HeaderSize+copy(s.buf[guestlink.HeaderSize:], packet), benchPacket
		if !q.put(s, packet, false) {
			return
		}
	}
}
