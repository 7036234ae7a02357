package packet

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"

	"sekisho/guestlink"
)

// memDevice is a TUN device in memory.
type memDevice struct {
	in     chan []byte // what Read gives
	out    chan []byte // what was written
	closed chan struct{}
	once   sync.Once
}

func newMemDevice() *memDevice {
	return &memDevice{in: make(chan []byte), out: make(chan []byte, 1024), closed: make(chan struct{})}
}

func (d *memDevice) Read(b []byte) (int, error) {
	select {
	case p := <-d.in:
		return copy(b, p), nil
	case <-d.closed:
		return 0, os.ErrClosed
	}
}

func (d *memDevice) Write(b []byte) (int, error) {
	select {
	case <-d.closed:
		return 0, os.ErrClosed
	case d.out <- bytes.Clone(b):
		return len(b), nil
	}
}

func (d *memDevice) Close() error {
	d.once.Do(func() { close(d.closed) })
	return nil
}

// ipv4 makes a packet of n bytes.
func ipv4(src, dst string, n int) []byte {
	b := make([]byte, n)
	b[0], b[8], b[9] = 0x45, 64, 17
	binary.BigEndian.PutUint16(b[2:], uint16(n))
	copy(b[12:], netip.MustParseAddr(src).AsSlice())
	copy(b[16:], netip.MustParseAddr(dst).AsSlice())
	return b
}

var _ PacketDevice = (*memDevice)(nil)

func testConfig() guestlink.Config {
	return guestlink.Config{Address: netip.MustParsePrefix("10.80.0.2/32"), MTU: 1400}
}

// listen returns a unix listener and a function that dials it.
func listen(t testing.TB) (net.Listener, func() net.Conn) {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "link"))
	if err != nil {
		t.Fatal(err)
	}
	return l, func() net.Conn {
		c, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
}

// startHost runs a host end on memory until the test ends. Links tells of
// links that came up (nil) and ended (cause).
func startHost(t *testing.T) (p *Pump, dev *memDevice, dial func() net.Conn, links chan error, said chan guestlink.Status) {
	t.Helper()
	dev, links, said = newMemDevice(), make(chan error, 64), make(chan guestlink.Status, 64)
	p = NewHost(dev, func(s guestlink.Status) { said <- s })
	l, dial := listen(t)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { p.Run(ctx) })
	wg.Go(func() { p.Listen(ctx, l, func(_ bool, cause error) { links <- cause }) })
	t.Cleanup(func() { cancel(); wg.Wait() })
	return p, dev, dial, links, said
}

func TestEndToEnd(t *testing.T) {
	host, hostDev, dial, links, said := startHost(t)
	guestDev, applied := newMemDevice(), make(chan guestlink.Config, 8)
	guest := NewGuest(guestDev, func(c guestlink.Config) error { applied <- c; return nil })
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	defer func() { cancel(); wg.Wait() }()
	wg.Go(func() { guest.Run(ctx) })
	wg.Go(func() { guest.Serve(ctx, dial(), func() {}) })
	if cause := <-links; cause != nil {
		t.Fatal(cause)
	}
	if s := <-said; s.State != guestlink.StateWaiting {
		t.Fatalf("guest says %+v before it has a config", s)
	}

	// Nothing passes before a Config is known, either way.
	guestDev.in <- ipv4("10.80.0.2", "10.1.0.1", 100)
	hostDev.in <- ipv4("10.1.0.1", "10.80.0.2", 100)
	for host.Counters().Dropped["no-config"]+guest.Counters().Dropped["no-config"] < 2 {
		runtime.Gosched()
	}

	if err := host.SetConfig(testConfig()); err != nil {
		t.Fatal(err)
	}
	if c := <-applied; !c.Equal(testConfig()) {
		t.Fatalf("applied %+v", c)
	}
	if s := <-said; s.State != guestlink.StateConfigured {
		t.Fatalf("guest says %+v", s)
	}
	for _, n := range []int{20, 1400, guestlink.MaxPacket} {
		up, down := ipv4("10.80.0.2", "10.1.0.1", n), ipv4("10.1.0.1", "10.80.0.2", n)
		guestDev.in <- up
		if got := <-hostDev.out; !bytes.Equal(got, up) {
			t.Errorf("up: %d bytes arrive, want %d", len(got), n)
		}
		hostDev.in <- down
		if got := <-guestDev.out; !bytes.Equal(got, down) {
			t.Errorf("down: %d bytes arrive, want %d", len(got), n)
		}
	}
	c := host.Counters()
	if c.FromLink != (Flow{3, 20 + 1400 + guestlink.MaxPacket}) || c.ToLink != c.FromLink || c.Dropped["no-config"] != 1 {
		t.Errorf("counters %+v", c)
	}
	if len(hostDev.out)+len(guestDev.out) > 0 {
		t.Error("a packet of the time before the config was kept")
	}
}

// rawGuest is a work domain that speaks frames by hand.
type rawGuest struct {
	net.Conn
	frames *guestlink.Reader
}

func connect(t *testing.T, dial func() net.Conn, links chan error) *rawGuest {
	t.Helper()
	g := &rawGuest{Conn: dial()}
	g.frames = guestlink.NewReader(g)
	g.Write(guestlink.AppendHello(nil, guestlink.Hello{Version: guestlink.Version}))
	if f, err := g.frames.Next(); err != nil || f.Type != guestlink.TypeHello {
		t.Fatalf("no hello: %v %v", f.Type, err)
	}
	if cause := <-links; cause != nil {
		t.Fatal(cause)
	}
	return g
}

func (g *rawGuest) send(t *testing.T, typ guestlink.Type, p []byte) {
	t.Helper()
	b, err := guestlink.AppendFrame(nil, typ, p)
	if err != nil {
		t.Fatal(err)
	}
	g.Write(b)
}

func TestHostDropsByRule(t *testing.T) {
	host, dev, dial, links, _ := startHost(t)
	if err := host.SetConfig(testConfig()); err != nil {
		t.Fatal(err)
	}
	g := connect(t, dial, links)
	if f, err := g.frames.Next(); err != nil || f.Type != guestlink.TypeConfig {
		t.Fatalf("no config at the start: %v %v", f.Type, err)
	}
	good := ipv4("10.80.0.2", "10.1.0.1", 60)
	v6 := make([]byte, 40)
	v6[0] = 0x60
	for _, p := range [][]byte{
		ipv4("10.80.0.3", "10.1.0.1", 60), ipv4("0.0.0.0", "255.255.255.255", 60), ipv4("127.0.0.1", "10.1.0.1", 60), v6,
	} {
		g.send(t, guestlink.TypePacket, p)
	}
	for _, p := range [][]byte{{0x45}, good[:59], append(bytes.Clone(good), 0), bytes.Repeat([]byte{0xff}, 60)} {
		g.send(t, guestlink.TypePacket, p)
	}
	g.send(t, guestlink.TypePacket, good)
	if got := <-dev.out; !bytes.Equal(got, good) {
		t.Errorf("first packet through is %x", got)
	}
	c := host.Counters()
	if c.Dropped["source"] != 4 || c.Dropped["malformed"] != 4 || c.FromLink.Packets != 1 || len(c.BadFrames) > 0 {
		t.Errorf("counters %+v", c)
	}
	dev.in <- ipv4("10.1.0.1", "10.80.0.9", 60) // not the guest's
	dev.in <- ipv4("10.1.0.1", "10.80.0.2", 60)
	if f, err := g.frames.Next(); err != nil || f.Type != guestlink.TypePacket || f.Payload[19] != 2 {
		t.Errorf("to the guest: %v %v", f, err)
	}
	if n := host.Counters().Dropped["destination"]; n != 1 {
		t.Errorf("%d packets for others dropped, want 1", n)
	}
}

func TestBadFramesResetTheLink(t *testing.T) {
	host, dev, dial, links, _ := startHost(t)
	if err := host.SetConfig(testConfig()); err != nil {
		t.Fatal(err)
	}
	hello := guestlink.AppendHello(nil, guestlink.Hello{Version: guestlink.Version})
	for _, c := range []struct {
		name   string
		bytes  []byte
		hangUp bool
		reason guestlink.Reason
	}{
		{"no hello", []byte("GET / HTTP/1.1\r\n"), false, guestlink.ReasonType},
		{"packet before hello", append([]byte{2, 0, 0, 20}, ipv4("10.80.0.2", "10.1.0.1", 20)...), false, guestlink.ReasonOrder},
		{"another magic", append([]byte{1, 0, 0, 14}, "not-ours123456"...), false, guestlink.ReasonHello},
		{"version 0", guestlink.AppendHello(nil, guestlink.Hello{}), false, guestlink.ReasonVersion},
		{"second hello", append(bytes.Clone(hello), hello...), false, guestlink.ReasonOrder},
		{"length of all ones", append(bytes.Clone(hello), 2, 0xff, 0xff, 0xff), false, guestlink.ReasonOversize},
		{"empty packet", append(bytes.Clone(hello), 2, 0, 0, 0), false, guestlink.ReasonEmpty},
		{"config from the guest", append(bytes.Clone(hello), 3, 0, 0, 2, '{', '}'), false, guestlink.ReasonOrder},
		{"status of nonsense", append(bytes.Clone(hello), 4, 0, 0, 2, '[', ']'), false, guestlink.ReasonControl},
		{"cut in a header", append(bytes.Clone(hello), 2, 0), true, guestlink.ReasonTruncated},
		{"cut in a packet", append(bytes.Clone(hello), 2, 0, 0, 20, 0x45), true, guestlink.ReasonTruncated},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := host.Counters().BadFrames[c.reason.String()]
			conn := dial().(*net.UnixConn)
			conn.Write(c.bytes)
			if c.hangUp {
				conn.CloseWrite()
			}
			if _, err := io.Copy(io.Discard, conn); err != nil && !errors.Is(err, net.ErrClosed) {
				t.Logf("reset: %v", err)
			}
			cause := <-links
			if cause == nil {
				cause = <-links
			}
			if guestlink.ReasonOf(cause) != c.reason {
				t.Errorf("ended by %v, want %s", cause, c.reason)
			}
			if n := host.Counters().BadFrames[c.reason.String()]; n != before+1 {
				t.Errorf("counted %d, want %d", n, before+1)
			}
		})
	}
	// The host end is unharmed: a good guest is served as if nothing had been.
	g := connect(t, dial, links)
	g.send(t, guestlink.TypePacket, ipv4("10.80.0.2", "10.1.0.1", 60))
	<-dev.out
}

func TestNewLinkReplacesTheOld(t *testing.T) {
	host, dev, dial, links, _ := startHost(t)
	if err := host.SetConfig(testConfig()); err != nil {
		t.Fatal(err)
	}
	first := connect(t, dial, links)
	second := &rawGuest{Conn: dial()}
	second.Write(guestlink.AppendHello(nil, guestlink.Hello{Version: guestlink.Version}))
	if cause := <-links; cause == nil {
		t.Fatal("the old link is still up")
	}
	if cause := <-links; cause != nil {
		t.Fatal(cause)
	}
	io.Copy(io.Discard, first) // ends
	second.send(t, guestlink.TypePacket, ipv4("10.80.0.2", "10.1.0.1", 60))
	<-dev.out
}

func TestNothingStaleWaitsForALink(t *testing.T) {
	host, dev, dial, links, _ := startHost(t)
	if err := host.SetConfig(testConfig()); err != nil {
		t.Fatal(err)
	}
	for range 10 {
		dev.in <- ipv4("10.1.0.1", "10.80.0.2", 60)
	}
	g := connect(t, dial, links)
	dev.in <- ipv4("10.1.0.1", "10.80.0.2", 61)
	g.frames.Next() // config
	if f, err := g.frames.Next(); err != nil || len(f.Payload) != 61 {
		t.Errorf("%d bytes, %v; want the packet of 61", len(f.Payload), err)
	}
	if n := host.Counters().Dropped["no-link"]; n != 10 {
		t.Errorf("%d dropped for want of a link, want 10", n)
	}
}

// TestTwoAddresses: a guest that can take an IPv6 address beside the other is
// told of it and carries both; one that cannot is told of the other alone.
func TestTwoAddresses(t *testing.T) {
	host, dev, dial, links, _ := startHost(t)
	both := testConfig()
	both.Address6 = netip.MustParsePrefix("fd00:80::2/128")
	if err := host.SetConfig(both); err != nil {
		t.Fatal(err)
	}
	ipv6 := func(src, dst string) []byte {
		b := make([]byte, 48)
		b[0], b[5], b[6], b[7] = 0x60, 8, 17, 64
		copy(b[8:], netip.MustParseAddr(src).AsSlice())
		copy(b[24:], netip.MustParseAddr(dst).AsSlice())
		return b
	}
	for _, c := range []struct {
		offer guestlink.Capabilities
		want  guestlink.Config
	}{{0, testConfig()}, {guestlink.CapAddress6, both}} {
		conn := dial()
		conn.Write(guestlink.AppendHello(nil, guestlink.Hello{Version: guestlink.Version, Capabilities: c.offer, Batch: guestlink.MaxBatch, Queues: 1}))
		g := &rawGuest{Conn: conn, frames: guestlink.NewReader(conn)}
		var f guestlink.Frame
		for f.Type != guestlink.TypeConfig {
			var err error
			if f, err = g.frames.Next(); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := guestlink.ParseConfig(f.Payload); err != nil || !got.Equal(c.want) {
			t.Fatalf("capabilities %d: told %+v, %v", c.offer, got, err)
		}
		g.send(t, guestlink.TypePacket, ipv6("fd00:80::3", "fd00:1::1"))
		g.send(t, guestlink.TypePacket, ipv6("fe80::1", "fd00:1::1"))
		g.send(t, guestlink.TypePacket, ipv6("fd00:80::2", "fd00:1::1"))
		if p := <-dev.out; netip.AddrFrom16([16]byte(p[8:24])) != both.Address6.Addr() {
			t.Fatalf("carried %x", p)
		}
	}
	if n := host.Counters().Dropped["source"]; n != 4 {
		t.Errorf("%d packets dropped for their source, want 4", n)
	}
	<-links
}
