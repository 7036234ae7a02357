package packet

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"sekisho/guestlink"
)

// offloadDevice is a memDevice that gives and takes virtio-net headers.
type offloadDevice struct{ *memDevice }

func (d offloadDevice) ReadOffload(b []byte, idle func() bool) (int, error) {
	idle()
	return d.memDevice.Read(b)
}
func (d offloadDevice) WriteOffload(b []byte) (int, error) { return d.memDevice.Write(b) }

// capable makes a hello of version 2.
func capable(c guestlink.Capabilities) []byte {
	return guestlink.AppendHello(nil, guestlink.Hello{Version: 2, Capabilities: c, Batch: guestlink.MaxBatch, Queues: 1})
}

// hand is a guest that speaks by hand, after a hello of its own.
func hand(t *testing.T, dial func() net.Conn, links chan error, hello []byte) *rawGuest {
	t.Helper()
	g := &rawGuest{Conn: dial()}
	g.frames = guestlink.NewReader(g)
	g.Write(hello)
	if f, err := g.frames.Next(); err != nil || f.Type != guestlink.TypeHello {
		t.Fatalf("no hello: %v %v", f.Type, err)
	}
	if cause := <-links; cause != nil {
		t.Fatal(cause)
	}
	return g
}

// TestVersion1 speaks the bytes of version 1 from either end, as they are frozen
// in the vectors, and wants nothing of version 2 back.
func TestVersion1(t *testing.T) {
	hello1, err := hex.DecodeString("0100000e73656b6973686f00000100000000")
	if err != nil {
		t.Fatal(err)
	}
	t.Run("guest", func(t *testing.T) {
		host, dev, dial, links, said := startHost(t)
		host.every = time.Millisecond // probes would come at once
		if err := host.SetConfig(testConfig()); err != nil {
			t.Fatal(err)
		}
		g := hand(t, dial, links, hello1)
		g.send(t, guestlink.TypeStatus, []byte(`{"state":"configured"}`))
		if s := <-said; s.State != guestlink.StateConfigured {
			t.Errorf("%+v", s)
		}
		up, down := ipv4("10.80.0.2", "10.1.0.1", 60), ipv4("10.1.0.1", "10.80.0.2", 60)
		g.send(t, guestlink.TypePacket, up)
		if got := <-dev.out; !bytes.Equal(got, up) {
			t.Errorf("up: %x", got)
		}
		dev.in <- down
		for _, want := range []guestlink.Type{guestlink.TypeConfig, guestlink.TypePacket} {
			if f, err := g.frames.Next(); err != nil || f.Type != want {
				t.Fatalf("%s, %v; want %s", f.Type, err, want)
			}
		}
		if _, err := host.RequestPower(guestlink.ActionShutdown); !errors.Is(err, ErrNoPower) {
			t.Errorf("power: %v", err)
		}
		if agreed, _, _ := host.Link(); agreed.Version != 1 || agreed.Capabilities != 0 {
			t.Errorf("in force: %+v", agreed)
		}
	})
	t.Run("host", func(t *testing.T) {
		dev := newMemDevice()
		guest := NewGuest(offloadDevice{dev}, func(guestlink.Config) error { return nil })
		l, dial := listen(t)
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		defer func() { cancel(); wg.Wait() }()
		wg.Go(func() { guest.Run(ctx) })
		wg.Go(func() { guest.Serve(ctx, dial(), func() {}) })
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		h := &rawGuest{Conn: c, frames: guestlink.NewReader(c)}
		h.Write(hello1)
		h.send(t, guestlink.TypeConfig, []byte(`{"address":"10.80.0.2/32","mtu":1400,"dns":[]}`))
		for _, want := range []guestlink.Type{guestlink.TypeHello, guestlink.TypeStatus, guestlink.TypeStatus} {
			if f, err := h.frames.Next(); err != nil || f.Type != want {
				t.Fatalf("%s, %v; want %s", f.Type, err, want)
			}
		}
		down := ipv4("10.1.0.1", "10.80.0.2", 60)
		h.send(t, guestlink.TypePacket, down)
		if got := <-dev.out; !bytes.Equal(got, down) {
			t.Errorf("down: %x", got)
		}
	})
}

// TestCapabilityLies lets a guest send what was not agreed, or what its headers
// belie.
func TestCapabilityLies(t *testing.T) {
	packet := ipv4("10.80.0.2", "10.1.0.1", 60)
	payload := append(make([]byte, guestlink.VirtioHeaderSize), packet...)
	probe := guestlink.AppendProbe(nil, guestlink.Probe{})[guestlink.HeaderSize:]
	for name, c := range map[string]struct {
		caps guestlink.Capabilities
		typ  guestlink.Type
		p    []byte
	}{
		"offload not offered by the device": {^guestlink.Capabilities(0), guestlink.TypeOffload, payload},
		"probe not agreed":                  {0, guestlink.TypeProbe, probe},
		"power not agreed":                  {0, guestlink.TypePower, []byte(`{"id":1,"action":"suspend","answer":"accepted"}`)},
		"power asked of the host":           {guestlink.CapPower, guestlink.TypePower, []byte(`{"id":1,"action":"suspend"}`)},
		"time told to the host":             {guestlink.CapTime, guestlink.TypeTime, []byte(`{"unix_nano":1795305600000000000}`)},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, dial, links, _ := startHost(t)
			g := hand(t, dial, links, capable(c.caps))
			g.send(t, c.typ, c.p)
			if cause := <-links; guestlink.ReasonOf(cause) != guestlink.ReasonOrder {
				t.Errorf("ended by %v, want order", cause)
			}
		})
	}
	t.Run("impossible headers", func(t *testing.T) {
		dev := newMemDevice()
		p, dial, links, _ := startPump(t, offloadDevice{dev})
		if err := p.SetConfig(testConfig()); err != nil {
			t.Fatal(err)
		}
		g := hand(t, dial, links, capable(guestlink.CapOffload))
		lie := bytes.Clone(payload)
		lie[0], lie[1] = 1, 1 // segments of no bytes
		g.send(t, guestlink.TypeOffload, lie)
		g.send(t, guestlink.TypeOffload, lie[:5])
		g.send(t, guestlink.TypeOffload, payload) // a header that says nothing
		if got := <-dev.out; !bytes.Equal(got, payload) {
			t.Errorf("%x", got)
		}
		if n := p.Counters().DroppedFromLink["offload"]; n != 2 {
			t.Errorf("%d dropped, want 2", n)
		}
	})
}

// startPump is startHost over any device.
func startPump(t *testing.T, dev PacketDevice) (p *Pump, dial func() net.Conn, links chan error, answers chan guestlink.Power) {
	t.Helper()
	links, answers = make(chan error, 64), make(chan guestlink.Power, 8)
	p = NewHost(dev, func(guestlink.Status) {})
	p.PowerAnswer = func(a guestlink.Power) { answers <- a }
	l, dial := listen(t)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { p.Run(ctx) })
	wg.Go(func() { p.Listen(ctx, l, func(_ bool, cause error) { links <- cause }) })
	t.Cleanup(func() { cancel(); wg.Wait() })
	return p, dial, links, answers
}

// TestStalls lets a guest stop in ways that a connection does not show.
func TestStalls(t *testing.T) {
	for name, c := range map[string]struct {
		caps guestlink.Capabilities
		then []byte
	}{
		"half a header":       {0, []byte{2, 0}},
		"half a frame":        {0, []byte{2, 0, 0, 60, 0x45}},
		"no answer to probes": {guestlink.CapProbe, nil},
	} {
		t.Run(name, func(t *testing.T) {
			dev := newMemDevice()
			links := make(chan error, 8)
			p := NewHost(dev, func(guestlink.Status) {})
			p.stall, p.every, p.silent = 50*time.Millisecond, 10*time.Millisecond, 50*time.Millisecond
			l, dial := listen(t)
			ctx, cancel := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			defer func() { cancel(); wg.Wait() }()
			wg.Go(func() { p.Listen(ctx, l, func(_ bool, cause error) { links <- cause }) })
			g := hand(t, dial, links, capable(c.caps))
			g.Write(c.then)
			if cause := <-links; !errors.Is(cause, os.ErrDeadlineExceeded) {
				t.Errorf("ended by %v", cause)
			}
		})
	}
}

// TestOneByteWrites sends a stream byte by byte.
func TestOneByteWrites(t *testing.T) {
	host, dev, dial, links, _ := startHost(t)
	if err := host.SetConfig(testConfig()); err != nil {
		t.Fatal(err)
	}
	g := hand(t, dial, links, capable(0))
	packet := ipv4("10.80.0.2", "10.1.0.1", 200)
	frame, _ := guestlink.AppendFrame(nil, guestlink.TypePacket, packet)
	for i := range frame {
		g.Write(frame[i : i+1])
	}
	if got := <-dev.out; !bytes.Equal(got, packet) {
		t.Errorf("%d bytes", len(got))
	}
}

// TestResetStorm connects and leaves, in every way; the host end
// serves the next guest as if nothing had been, with no more memory.
func TestResetStorm(t *testing.T) {
	host, dev, dial, links, _ := startHost(t)
	if err := host.SetConfig(testConfig()); err != nil {
		t.Fatal(err)
	}
	go func() {
		for range links {
		}
	}()
	for i := range connectBurst - 1 {
		c := dial()
		if i%3 > 0 {
			c.Write(capable(guestlink.CapProbe))
		}
		if i%3 > 1 {
			c.Write([]byte{2, 0, 0, 60})
		}
		c.Close()
	}
	g := &rawGuest{Conn: dial()}
	g.Write(capable(0))
	g.send(t, guestlink.TypePacket, ipv4("10.80.0.2", "10.1.0.1", 60))
	<-dev.out
	if n := runtime.NumGoroutine(); n > 50 {
		t.Errorf("%d goroutines are left", n)
	}
}

// TestPowerTimeAndProbes joins two pumps and watches what passes beside packets.
func TestPowerTimeAndProbes(t *testing.T) {
	dev := newMemDevice()
	host, dial, links, answers := startPump(t, dev)
	noon := time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	host.Now = func() time.Time { return noon }
	guest := NewGuest(newMemDevice(), func(guestlink.Config) error { return nil })
	times, asked := make(chan time.Time, 8), make(chan guestlink.Action, 8)
	guest.SetTime = func(at time.Time) error { times <- at; return nil }
	guest.Power = func(a guestlink.Action) error {
		asked <- a
		if a == guestlink.ActionSuspend {
			return errors.New("a lid is open")
		}
		return nil
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer func() { cancel(); wg.Wait() }()
	wg.Go(func() { guest.Serve(ctx, dial(), func() {}) })
	if cause := <-links; cause != nil {
		t.Fatal(cause)
	}
	if at := <-times; !at.Equal(noon) {
		t.Errorf("time %s", at)
	}
	for action, answer := range map[guestlink.Action]string{guestlink.ActionShutdown: guestlink.AnswerAccepted, guestlink.ActionSuspend: guestlink.AnswerRefused} {
		id, err := host.RequestPower(action)
		if err != nil {
			t.Fatal(err)
		}
		if a := <-asked; a != action {
			t.Errorf("asked %s", a)
		}
		if a := <-answers; a.ID != id || a.Action != action || a.Answer != answer {
			t.Errorf("%+v", a)
		}
	}
	for _, rtt, _ := host.Link(); rtt == 0; _, rtt, _ = host.Link() {
		runtime.Gosched()
	}
}

// TestAnswersNobodyAskedFor: a guest cannot fill the host's log with answers.
func TestAnswersNobodyAskedFor(t *testing.T) {
	host, dial, links, answers := startPump(t, newMemDevice())
	conn := dial()
	frames := guestlink.NewReader(conn)
	if _, err := conn.Write(guestlink.AppendHello(nil, guestlink.Hello{Version: guestlink.Version, Batch: guestlink.MaxBatch, Queues: 1, Capabilities: guestlink.CapPower})); err != nil {
		t.Fatal(err)
	}
	if cause := <-links; cause != nil {
		t.Fatal(cause)
	}
	id, err := host.RequestPower(guestlink.ActionSuspend)
	if err != nil {
		t.Fatal(err)
	}
	for {
		f, err := frames.Next()
		if err != nil {
			t.Fatal(err)
		}
		if f.Type == guestlink.TypePower {
			break
		}
	}
	var out []byte
	for i := range uint32(cap(answers)) {
		if out, err = guestlink.AppendPower(out, guestlink.Power{ID: id + i%2, Action: guestlink.ActionSuspend, Answer: guestlink.AnswerAccepted}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := conn.Write(out); err != nil {
		t.Fatal(err)
	}
	conn.Close()
	if cause := <-links; cause == nil {
		t.Error("the link has not ended")
	}
	if n := len(answers); n != 1 {
		t.Errorf("%d answers to one question", n)
	}
}

// TestDifferential sends random packets, good and bad, through two pumps: each
// comes out byte for byte and in the order of its flow, or is counted.
func TestDifferential(t *testing.T) {
	for seed := range uint64(4) {
		r := rand.New(rand.NewPCG(seed, 5))
		hostDev, guestDev := newMemDevice(), newMemDevice()
		hostDev.out, guestDev.out = make(chan []byte, 4096), make(chan []byte, 4096)
		host, dial, links, _ := startPump(t, hostDev)
		if err := host.SetConfig(testConfig()); err != nil {
			t.Fatal(err)
		}
		applied := make(chan struct{}, 1)
		guest := NewGuest(guestDev, func(guestlink.Config) error { applied <- struct{}{}; return nil })
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { guest.Run(ctx) })
		wg.Go(func() { guest.Serve(ctx, dial(), func() {}) })
		<-links
		<-applied
		for _, ok := guest.Config(); !ok; _, ok = guest.Config() {
			runtime.Gosched()
		}
		const n = 500
		want := map[string]uint64{}
		var good [][]byte
		for i := range n {
			size := 28 + r.IntN(3000)
			p := ipv4("10.80.0.2", "10.1.0.1", size)
			binary.BigEndian.PutUint64(p[20:], uint64(i))
			rule := ""
			switch r.IntN(8) {
			case 0:
				p[15], rule = 99, "source"
			case 1:
				p, rule = p[:size-1], "malformed"
			case 2:
				p[0], rule = byte(r.IntN(256))|0xf0, "malformed"
			case 3:
				p[0], rule = 0x46, "options"
			case 4:
				p[7], rule = 1, "fragment"
			}
			if rule == "" {
				good = append(good, p)
			} else {
				want[rule]++
			}
			guestDev.in <- p
		}
		sum := func() (s uint64) {
			for _, c := range []Counters{host.Counters(), guest.Counters()} {
				for _, v := range c.Dropped {
					s += v
				}
			}
			return s + host.Counters().FromLink.Packets
		}
		for sum() < n {
			runtime.Gosched()
		}
		got := host.Counters().Dropped
		for k, v := range guest.Counters().Dropped {
			got[k] += v
		}
		// A full queue may drop a bad packet before anybody has judged it.
		lost := got["queue"]
		for rule, n := range want {
			if got[rule] > n || n-got[rule] > lost {
				t.Fatalf("seed %d: dropped %v, want %v", seed, got, want)
			}
			lost -= n - got[rule]
			delete(got, rule)
		}
		delete(got, "queue")
		if len(got) != 0 {
			t.Errorf("seed %d: dropped for other reasons too: %v", seed, got)
		}
		next := map[int]int{} // by flow: how many of good are accounted for
		for range len(good) - int(lost) {
			p := <-hostDev.out
			i := next[0]
			for i < len(good) && !bytes.Equal(good[i], p) {
				i++
			}
			if i == len(good) {
				if !containsPacket(good, p) {
					t.Fatalf("seed %d: a packet came out that did not go in", seed)
				}
				continue // of another flow: ports are random
			}
			next[0]++
		}
		cancel()
		wg.Wait()
	}
}

func containsPacket(all [][]byte, p []byte) bool {
	for _, a := range all {
		if bytes.Equal(a, p) {
			return true
		}
	}
	return false
}

// TestFloodLetsSmallFlowsPass fills the queue by one flow while nothing is
// written: the oldest of the flood is lost, and control and the small flow pass.
func TestFloodLetsSmallFlowsPass(t *testing.T) {
	p := newPump(newMemDevice())
	dropped := 0
	q := newQueue(&p.pool, nil, guestlink.MaxBatch, func(int) { dropped++ }, func(int) {})
	p.link = &link{queue: q}
	p.config.Store(&guestlink.Config{Address: testConfig().Address, MTU: 1400})
	buf := make([]byte, largeSlot)
	send := func(packet []byte) {
		copy(buf[guestlink.HeaderSize:], packet)
		p.send(&buf, guestlink.TypePacket, buf[guestlink.HeaderSize:guestlink.HeaderSize+len(packet)], len(packet), false)
	}
	flood := ipv4("10.80.0.2", "10.1.0.1", 1400)
	for range 5000 {
		send(flood)
	}
	ping := ipv4("10.80.0.2", "10.1.0.2", 84)
	ping[9] = 1
	send(ping)
	q.putControl(guestlink.AppendProbe(nil, guestlink.Probe{Token: 1}))
	if dropped < 5000-room || dropped > 5000-room+1 {
		t.Errorf("%d dropped of 5000", dropped)
	}
	batch, _ := q.take(nil)
	if f, err := guestlink.NewReader(bytes.NewReader(batch)).Next(); err != nil || f.Type != guestlink.TypeProbe {
		t.Errorf("first: %v, want the control frame", f.Type)
	}
	q.written()
	batch, _ = q.take(make([]byte, 0, guestlink.MaxBatch))
	r := guestlink.NewReader(bytes.NewReader(batch))
	for i := 0; ; i++ {
		f, err := r.Next()
		if err == io.EOF {
			t.Fatal("the ping is not in the first batch")
		}
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Equal(f.Payload, ping) {
			if i > 12 { // a quantum of the flood
				t.Errorf("%d packets of the flood before the ping", i)
			}
			break
		}
	}
	q.close()
	if s := p.pool.get(1); s == nil {
		t.Error("the closed queue keeps its slots")
	}
}

// TestCoDel lets packets stand in the queue for longer and longer.
func TestCoDel(t *testing.T) {
	var p pool
	dropped := 0
	q := newQueue(&p, nil, guestlink.MaxBatch, func(int) { dropped++ }, func(int) {})
	clock := int64(1)
	q.now = func() int64 { return clock }
	packet := ipv4("10.80.0.2", "10.1.0.1", 1400)
	put := func() {
		s := p.get(1404)
		guestlink.PutHeader(s.buf, guestlink.TypePacket, 1400)
		copy(s.buf[4:], packet)
		s.n, s.size = 1404, 1400
		q.put(s, packet, false)
	}
	for range 250 { // a standing queue of 250 ms
		put()
	}
	served := 0
	for range 3000 { // one packet in, one out, each millisecond
		clock += int64(time.Millisecond)
		put()
		q.mu.Lock()
		s := q.next()
		q.mu.Unlock()
		if s != nil {
			served++
			p.put(s)
		}
	}
	if dropped < 100 || dropped > 600 {
		t.Errorf("%d dropped of 3250", dropped)
	}
	if f := q.flows; served < 2400 || f == nil {
		t.Errorf("%d served", served)
	}
	standing := 0
	for i := range q.flows {
		standing += q.flows[i].bytes / 1404
	}
	if standing > 120 {
		t.Errorf("%d packets still stand", standing)
	}
}

// room is how many packets of a usual MTU a queue holds.
const room = maxQueued / smallSlot

// TestPool lends slots of every size and wants the bound kept, whatever sizes
// were lent before.
func TestPool(t *testing.T) {
	var p pool
	for _, n := range []int{1, smallSlot, smallSlot + 1, 2700, 9000, 32 << 10, 32<<10 + 1, largeSlot, 2700} {
		_, size := class(n)
		if size < n || (n > smallSlot && size > 2*n+64) {
			t.Errorf("a slot of %d for %d bytes", size, n)
		}
		var lent []*slot
		for s := p.get(n); s != nil; s = p.get(n) {
			if len(s.buf) != size {
				t.Fatalf("%d bytes, want %d", len(s.buf), size)
			}
			lent = append(lent, s)
		}
		if len(lent) != maxQueued/size || p.made > maxQueued {
			t.Errorf("%d slots of %d, %d bytes in all", len(lent), size, p.made)
		}
		for _, s := range lent {
			p.put(s)
		}
	}
}
