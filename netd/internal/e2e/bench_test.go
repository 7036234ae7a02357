//go:build linux

package e2e

import (
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sekisho/netd/internal/nstest"
	"sekisho/netd/tunnel/connectip"
)

// Ports of what the far end answers with.
const (
	sinkPort   = 5001 // reads everything
	sourcePort = 5002 // writes without end
	echoPort   = 5003 // UDP
)

// serveFar runs sink, source and echo in ns until the test ends.
func serveFar(t testing.TB, ns *nstest.NS, received *atomic.Int64) {
	chunk := make([]byte, 128<<10)
	for port, serve := range map[int]func(net.Conn){
		sinkPort:   func(c net.Conn) { count(c, received) },
		sourcePort: func(c net.Conn) { flood(context.Background(), c, chunk) },
	} {
		l := ns.Listen(fmt.Sprintf("0.0.0.0:%d", port))
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() { defer c.Close(); serve(c) }()
			}
		}()
	}
	var echo net.PacketConn
	if err := ns.Do(func() (err error) {
		echo, err = net.ListenPacket("udp", fmt.Sprintf("0.0.0.0:%d", echoPort))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { echo.Close() })
	go func() {
		for b := make([]byte, 2048); ; {
			n, from, err := echo.ReadFrom(b)
			if err != nil {
				return
			}
			echo.WriteTo(b[:n], from)
		}
	}()
}

func count(c net.Conn, n *atomic.Int64) {
	for b := make([]byte, 256<<10); ; {
		got, err := c.Read(b)
		n.Add(int64(got))
		if err != nil {
			return
		}
	}
}

func flood(ctx context.Context, c net.Conn, chunk []byte) {
	for ctx.Err() == nil {
		if _, err := c.Write(chunk); err != nil {
			return
		}
	}
}

func dialFrom(ns *nstest.NS, network, address string) (c net.Conn, err error) {
	err = ns.Do(func() error { c, err = net.DialTimeout(network, address, 5*time.Second); return err })
	return c, err
}

// rate is what streams TCP streams each way carry in Gbit/s: up from near to
// far, down back. The first quarter of the time does not count.
func rate(t testing.TB, near *nstest.NS, far string, up, down int, received *atomic.Int64, lasting time.Duration, congestion ...string) float64 {
	ctx, cancel := context.WithCancel(context.Background())
	chunk := make([]byte, 128<<10)
	var parts sync.WaitGroup
	var conns []net.Conn
	for i := range up + down {
		port := sinkPort
		if i >= up {
			port = sourcePort
		}
		c, err := dialFrom(near, "tcp", fmt.Sprintf("%s:%d", far, port))
		if err != nil {
			t.Fatal(far, err)
		}
		for _, name := range congestion { // of what near sends (tcp(7), TCP_CONGESTION)
			raw, err := c.(*net.TCPConn).SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			if e := raw.Control(func(fd uintptr) { err = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, name) }); e != nil || err != nil {
				t.Fatal(name, e, err)
			}
		}
		conns = append(conns, c)
		parts.Go(func() {
			if i < up {
				flood(ctx, c, chunk)
			} else {
				count(c, received)
			}
		})
	}
	<-time.After(lasting / 4)
	from, start := received.Load(), time.Now()
	<-time.After(lasting * 3 / 4)
	n, took := received.Load()-from, time.Since(start)
	cancel()
	for _, c := range conns {
		c.Close()
	}
	parts.Wait()
	return float64(n) * 8 / 1e9 / took.Seconds()
}

// pings measures the round trips of small packets every 5 ms while it lasts, and
// returns the 99th percentile and how many of a hundred came back.
func pings(t testing.TB, near *nstest.NS, far string, lasting time.Duration) (p99 time.Duration, percent float64) {
	c, err := dialFrom(near, "udp", fmt.Sprintf("%s:%d", far, echoPort))
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	var trips []time.Duration
	done := make(chan struct{})
	go func() {
		defer close(done)
		for b := make([]byte, 100); ; {
			if _, err := c.Read(b); err != nil {
				return
			}
			trips = append(trips, time.Since(start)-time.Duration(binary.BigEndian.Uint64(b)))
		}
	}()
	tick := time.NewTicker(5 * time.Millisecond)
	sent := 0
	for time.Since(start) < lasting {
		c.Write(binary.BigEndian.AppendUint64(nil, uint64(time.Since(start))))
		sent++
		<-tick.C
	}
	tick.Stop()
	c.SetReadDeadline(time.Now().Add(time.Second))
	<-done
	c.Close()
	if len(trips) == 0 {
		t.Fatal("no ping came back")
	}
	slices.Sort(trips)
	return trips[len(trips)*99/100], 100 * float64(len(trips)) / float64(sent)
}

// BenchmarkTunnel compares the tunnel's two carriages with wireguard-go and
// OpenVPN: each end a process of its own, over one veth pair, in turns within
// one run. Quote the ratios (medians of the rounds): the absolute figures are
// the machine's.
func BenchmarkTunnel(b *testing.B) {
	nstest.Require(b, "openvpn")
	near, far := nstest.New(b, "near"), nstest.New(b, "far")
	nstest.Pair(near, "eth0", outerNear+"/24", far, "eth0", outerFar+"/24")
	list := []*contender{
		newSekisho(b, near, far, "tls", connectip.TLS, 0),
		newWireGuard(b, near, far),
		newOpenVPN(b, near, far),
		newSekisho(b, near, far, "http3", connectip.HTTP3, 1),
	}
	var received atomic.Int64
	serveFar(b, far, &received)
	shapes := []struct {
		name     string
		up, down int
		target   float64 // of our throughput over wireguard-go's
	}{{"one", 1, 0, 1.15}, {"eight", 8, 0, 1}, {"both", 1, 1, 1}}
	rates := map[string][]float64{}
	for b.Loop() {
		for _, shape := range shapes {
			for _, c := range list {
				if c.name == "openvpn" && shape.name != "one" {
					continue
				}
				rates[c.name+" "+shape.name] = append(rates[c.name+" "+shape.name], rate(b, near, c.far, shape.up, shape.down, &received, time.Second))
			}
		}
	}
	for _, shape := range shapes {
		for _, c := range list {
			if v := rates[c.name+" "+shape.name]; len(v) > 0 {
				b.ReportMetric(median(v), c.name+"-"+shape.name+"-Gbit/s")
			}
		}
		against(b, shape.name+"-tls/wireguard", ratio(rates["tls "+shape.name], rates["wireguard-go "+shape.name]), shape.target)
	}
	against(b, "one-tls/openvpn", ratio(rates["tls one"], rates["openvpn one"]), 3)
	against(b, "one-http3/openvpn", ratio(rates["http3 one"], rates["openvpn one"]), 1)
	for _, c := range list {
		b.Logf("%s: most memory of near and far end %s MiB", c.name, strings.Join(c.memory(), " and "))
	}
}

// BenchmarkTunnelDelay measures pings beside one stream, and the processor time
// of the laptop's end at rest and at 100 Mbit/s.
func BenchmarkTunnelDelay(b *testing.B) {
	nstest.Require(b)
	near, far := nstest.New(b, "near"), nstest.New(b, "far")
	nstest.Pair(near, "eth0", outerNear+"/24", far, "eth0", outerFar+"/24")
	var received atomic.Int64
	serveFar(b, far, &received)
	list := []*contender{newSekisho(b, near, far, "tls", connectip.TLS, 0), newSekisho(b, near, far, "http3", connectip.HTTP3, 1), newWireGuard(b, near, far)}
	for b.Loop() {
		for _, c := range list {
			var p99 time.Duration
			var parts sync.WaitGroup
			parts.Go(func() { rate(b, near, c.far, 1, 0, &received, 4*time.Second) })
			parts.Go(func() { p99, _ = pings(b, near, c.far, 3*time.Second) })
			parts.Wait()
			b.ReportMetric(float64(p99.Microseconds())/1000, c.name+"-p99-ms")
			laptop := c.roles[0]
			used := laptop.cpu()
			<-time.After(3 * time.Second)
			b.ReportMetric((laptop.cpu()-used).Seconds()/3*100, c.name+"-idle-%cpu")
			used = laptop.cpu()
			paced(b, near, c.far, 100e6, 3*time.Second)
			b.ReportMetric((laptop.cpu()-used).Seconds()/3*100, c.name+"-100Mbit-%cpu")
		}
	}
}

// paced sends TCP at so many bits a second.
func paced(t testing.TB, near *nstest.NS, far string, bits float64, lasting time.Duration) {
	c, err := dialFrom(near, "tcp", fmt.Sprintf("%s:%d", far, sinkPort))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	const every = 5 * time.Millisecond
	chunk := make([]byte, int(bits/8*every.Seconds()))
	tick := time.NewTicker(every)
	defer tick.Stop()
	for start := time.Now(); time.Since(start) < lasting; <-tick.C {
		if _, err := c.Write(chunk); err != nil {
			t.Fatal(err)
		}
	}
}

// BenchmarkTunnelLoss does it over 30 ms of round trip with 1 % of the packets
// lost each way, made in user space (impairment): this machine's kernel has no
// netem. The inner flows have the same congestion control in all.
func BenchmarkTunnelLoss(b *testing.B) {
	nstest.Require(b)
	near, far := nstest.New(b, "near"), nstest.New(b, "far")
	link := impair(b, "eth0", near, outerNear, far, outerFar, 15*time.Millisecond)
	list := []*contender{newSekisho(b, near, far, "tls", connectip.TLS, 0), newWireGuard(b, near, far), newSekisho(b, near, far, "http3", connectip.HTTP3, 1)}
	link.loss.Store(10_000)
	var received atomic.Int64
	serveFar(b, far, &received)
	rates := map[string][]float64{}
	delays := map[string][]float64{}
	for b.Loop() {
		for n := range 2 * len(list) {
			c, inner := *list[n/2], []string{"cubic", "bbr"}[n%2]
			c.name += "-" + inner
			var p99 time.Duration
			var parts sync.WaitGroup
			parts.Go(func() {
				rates[c.name] = append(rates[c.name], 1000*rate(b, near, c.far, 1, 0, &received, 4*time.Second, inner))
			})
			parts.Go(func() { p99, _ = pings(b, near, c.far, 3*time.Second) })
			parts.Wait()
			delays[c.name] = append(delays[c.name], float64(p99.Microseconds())/1000)
		}
	}
	for name := range rates {
		b.ReportMetric(median(rates[name]), name+"-Mbit/s")
		b.ReportMetric(median(delays[name]), name+"-p99-ms")
	}
	for _, inner := range []string{"-cubic", "-bbr"} {
		against(b, "tls/wireguard"+inner, ratio(rates["tls"+inner], rates["wireguard-go"+inner]), 1)
		b.ReportMetric(ratio(rates["http3"+inner], rates["wireguard-go"+inner]), "http3/wireguard"+inner)
	}
}

// against reports a ratio, and whether it reaches its target.
func against(b *testing.B, name string, got, target float64) {
	b.ReportMetric(got, name)
	met := "met"
	if got < target {
		met = "MISSED"
	}
	fmt.Printf("ratio %-30s %6.2f  target %5.2f  %s\n", name, got, target, met)
}

func median(v []float64) float64 {
	v = slices.SortedFunc(slices.Values(v), cmp.Compare[float64])
	return v[len(v)/2]
}

// ratio is the median of the rounds' ratios.
func ratio(a, b []float64) float64 {
	var q []float64
	for i := range min(len(a), len(b)) {
		q = append(q, a[i]/b[i])
	}
	return median(q)
}
