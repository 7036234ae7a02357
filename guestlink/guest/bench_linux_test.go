package guest

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sekisho/guestlink"
	"sekisho/guestlink/packet"
)

// The benchmarks move TCP from one namespace to another, at MTU 1500:
//
//	guestNS: source ── sekisho0 ═ guest end ── unix socket ── host end ═ work0 ── sink :hostNS
//
// "joined" puts both TUN devices into one process, which is the limit of this
// way; "gvisor" is gvisor-tap-vsock over the same kind of socket. The two ends
// are processes of their own.
const (
	benchMTU   = 1500
	gvisor     = "github.com/containers/gvisor-tap-vsock"
	gvisorTag  = "v0.8.9"
	endVar     = "SEKISHO_BENCH_END" // tells this test binary to be one end
	endSockVar = "SEKISHO_BENCH_SOCKET"
	endSlowVar = "SEKISHO_BENCH_SLOW" // not empty: the link has slowRate
)

func benchConfig() guestlink.Config {
	return guestlink.Config{Address: netip.MustParsePrefix("10.80.0.2/32"), MTU: benchMTU}
}

// TestMain is one end of the link when a benchmark asks for it.
func TestMain(m *testing.M) {
	end := os.Getenv(endVar)
	if end == "" {
		os.Exit(m.Run())
	}
	if err := benchEnd(end, os.Getenv(endSockVar)); err != nil {
		fmt.Fprintln(os.Stderr, end, err)
		os.Exit(1)
	}
}

// benchEnd runs until its standard input ends.
func benchEnd(end, socket string) error {
	ctx, cancel := context.WithCancel(context.Background())
	go func() { io.Copy(io.Discard, os.Stdin); cancel() }()
	open := packet.OpenTUN
	if strings.HasSuffix(end, "-plain") {
		open = packet.OpenPlainTUN
	}
	name := "sekisho0"
	if strings.HasPrefix(end, "host") {
		name = "work0"
	}
	dev, err := open(name)
	if err != nil {
		return err
	}
	if name == "work0" {
		if strings.HasSuffix(end, "-kept") {
			os.Remove(socket) // of the host end before
			if err := packet.Keep(dev); err != nil {
				return err
			}
		} else if err := setUpHost(); err != nil {
			return err
		}
		p := packet.NewHost(dev, func(s guestlink.Status) { fmt.Println(s.State) })
		p.SetConfig(benchConfig())
		l, err := net.Listen("unix", socket)
		if err != nil {
			return err
		}
		fmt.Println("listening")
		var wg sync.WaitGroup
		wg.Go(func() { p.Run(ctx) })
		p.Listen(ctx, wideListener{l}, func(_ bool, err error) { fmt.Fprintln(os.Stderr, err) })
		wg.Wait()
		fmt.Fprintf(os.Stderr, "%+v\n", p.Counters())
		return nil
	}
	a := &Agent{
		Dial: func(context.Context) (net.Conn, error) {
			c, err := net.Dial("unix", socket)
			return slow(widen(c)), err
		},
		Pump: packet.NewGuest(dev, func(c guestlink.Config) error { return Apply(name, "", c) }),
		Log:  slog.New(slog.DiscardHandler), State: func(string) {},
	}
	a.Run(ctx)
	fmt.Fprintf(os.Stderr, "%+v\n", a.Pump.Counters())
	return nil
}

// widen gives a unix socket the buffer that package vsock asks for.
func widen(c net.Conn) net.Conn {
	if u, ok := c.(*net.UnixConn); ok {
		if raw, err := u.SyscallConn(); err == nil {
			raw.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 1<<20) })
		}
	}
	return c
}

type wideListener struct{ net.Listener }

func (l wideListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	return slow(widen(c)), err
}

// world is two namespaces with something between them.
type world struct {
	host, guest namespace
	address     string // of the sink, as the guest sees it
	pids        [2]int // of the two ends; 0: in this process
}

func privileged(b testing.TB) {
	b.Helper()
	if os.Getenv("SEKISHO_TEST") != "all" {
		b.Skip("needs root, network namespaces and TUN: run as root with SEKISHO_TEST=all")
	}
}

// spawn starts a process in ns. It ends with the benchmark.
func spawn(b testing.TB, ns namespace, c *exec.Cmd) (pid int, lines *bufio.Scanner) {
	b.Helper()
	in, err := c.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	var said bytes.Buffer
	c.Stderr = &said
	if err := ns.do(c.Start); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		in.Close()
		if c.Args[0] != os.Args[0] {
			c.Process.Kill()
		}
		c.Wait()
		if os.Getenv("SEKISHO_BENCH_LOG") != "" {
			b.Logf("%s", &said)
		}
	})
	return c.Process.Pid, bufio.NewScanner(out)
}

func end(b testing.TB, ns namespace, kind, socket string) (int, *bufio.Scanner) {
	c := exec.Command(os.Args[0])
	kind, slow := strings.CutSuffix(kind, "-slow")
	c.Env = append(os.Environ(), endVar+"="+kind, endSockVar+"="+socket)
	if slow {
		c.Env = append(c.Env, endSlowVar+"=1")
	}
	return spawn(b, ns, c)
}

// linkWorld joins two namespaces by the guest link. Suffix "-plain" takes
// songgao/water at the guest's end.
func linkWorld(b *testing.B, suffix string) world {
	w := world{host: newNamespace(b), guest: newNamespace(b), address: "10.80.0.1"}
	socket := filepath.Join(b.TempDir(), "link")
	var lines *bufio.Scanner
	w.pids[0], lines = end(b, w.host, "host"+strings.TrimPrefix(suffix, "-plain"), socket)
	lines.Scan() // listening
	w.pids[1], _ = end(b, w.guest, "guest"+suffix, socket)
	for lines.Scan() && lines.Text() != "configured" {
	}
	go io.Copy(io.Discard, readerOf(lines))
	return w
}

// readerOf keeps a scanner's pipe empty.
func readerOf(s *bufio.Scanner) io.Reader { return scanReader{s} }

type scanReader struct{ s *bufio.Scanner }

func (r scanReader) Read(b []byte) (int, error) {
	if !r.s.Scan() {
		return 0, io.EOF
	}
	return min(len(b), 1), nil
}

// joinedWorld joins the same two devices in this process.
func joinedWorld(b *testing.B) world {
	w := world{host: newNamespace(b), guest: newNamespace(b), address: "10.80.0.1"}
	open := func(ns namespace, name string) packet.PacketDevice {
		var dev packet.PacketDevice
		if err := ns.do(func() (err error) { dev, err = packet.OpenTUN(name); return err }); err != nil {
			b.Fatal(err)
		}
		return dev
	}
	host, guest := open(w.host, "work0"), open(w.guest, "sekisho0")
	if err := w.host.do(setUpHost); err != nil {
		b.Fatal(err)
	}
	if err := w.guest.do(func() error { return Apply("sekisho0", "", benchConfig()) }); err != nil {
		b.Fatal(err)
	}
	var wg sync.WaitGroup
	join := func(from, to packet.PacketDevice) {
		buf := make([]byte, guestlink.VirtioHeaderSize+guestlink.MaxPacket)
		for {
			n, err := from.(packet.OffloadDevice).ReadOffload(buf, func() bool { return false })
			if err != nil {
				return
			}
			to.(packet.OffloadDevice).WriteOffload(buf[:n])
		}
	}
	wg.Go(func() { join(host, guest) })
	wg.Go(func() { join(guest, host) })
	b.Cleanup(func() { host.Close(); guest.Close(); wg.Wait() })
	return w
}

// gvisorWorld builds gvisor-tap-vsock from the module proxy in a module of its
// own and joins the namespaces by it.
func gvisorWorld(b *testing.B) world {
	cache, err := os.UserCacheDir()
	if err != nil {
		b.Fatal(err)
	}
	dir := filepath.Join(cache, "sekisho-bench", "gvisor-tap-vsock-"+gvisorTag)
	proxy, forwarder := filepath.Join(dir, "gvproxy"), filepath.Join(dir, "gvforwarder")
	if _, err := os.Stat(forwarder); err != nil {
		os.MkdirAll(dir, 0o755)
		mod := "module bench\n\ngo 1.26\n\nrequire " + gvisor + " " + gvisorTag + "\n"
		if err := os.WriteFile(filepath.Join(dir, "go.mod"), []byte(mod), 0o644); err != nil {
			b.Fatal(err)
		}
		for out, pkg := range map[string]string{proxy: "/cmd/gvproxy", forwarder: "/cmd/vm"} {
			c := exec.Command("go", "build", "-mod=mod", "-o", out, gvisor+pkg)
			c.Dir = dir
			if msg, err := c.CombinedOutput(); err != nil {
				b.Fatalf("build %s%s@%s: %v\n%s", gvisor, pkg, gvisorTag, err, msg)
			}
		}
	}
	w := world{host: newNamespace(b), guest: newNamespace(b), address: "192.168.127.254"}
	up := func() error { return packet.LinkUp("lo") }
	if err := w.host.do(up); err != nil {
		b.Fatal(err)
	}
	socket := filepath.Join(b.TempDir(), "gv")
	mtu := strconv.Itoa(benchMTU)
	w.pids[0], _ = spawn(b, w.host, exec.Command(proxy, "-mtu", mtu, "-listen", "unix://"+socket, "-ssh-port", "-1"))
	until(b, func() error { _, err := os.Stat(socket); return err })
	w.pids[1], _ = spawn(b, w.guest, exec.Command(forwarder, "-url", "unix://"+socket, "-iface", "tap0", "-mtu", mtu, "-preexisting"))
	until(b, func() error { return w.guest.do(setUpTAP) })
	return w
}

// setUpTAP sets the address that gvproxy gives to its first guest.
func setUpTAP() error {
	l, err := netlink.LinkByName("tap0")
	if err != nil {
		return err
	}
	mac, _ := net.ParseMAC("5a:94:ef:e4:0c:ee")
	if err := netlink.LinkSetHardwareAddr(l, mac); err != nil {
		return err
	}
	if err := netlink.LinkSetMTU(l, benchMTU); err != nil {
		return err
	}
	a, err := netlink.ParseAddr("192.168.127.2/24")
	if err != nil {
		return err
	}
	if err := netlink.AddrReplace(l, a); err != nil {
		return err
	}
	return netlink.LinkSetUp(l)
}

// until tries f for 20 s.
func until(b testing.TB, f func() error) {
	b.Helper()
	var err error
	for begin := time.Now(); time.Since(begin) < 20*time.Second; <-time.After(20 * time.Millisecond) {
		if err = f(); err == nil {
			return
		}
	}
	b.Fatal(err)
}

// connect opens a TCP connection from the guest to the host's namespace.
func (w world) connect(b testing.TB) (guest, host net.Conn) {
	b.Helper()
	listen := w.address
	if listen != "10.80.0.1" {
		listen = "127.0.0.1" // where gvproxy's address of the host leads
	}
	var l net.Listener
	if err := w.host.do(func() (err error) { l, err = net.Listen("tcp4", listen+":0"); return err }); err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	until(b, func() error {
		return w.guest.do(func() (err error) {
			guest, err = net.DialTimeout("tcp4", net.JoinHostPort(w.address, port), 2*time.Second)
			return err
		})
	})
	host, err := l.Accept()
	if err != nil {
		b.Fatal(err)
	}
	for _, c := range []net.Conn{guest, host} {
		raw, _ := c.(*net.TCPConn).SyscallConn()
		raw.Control(func(fd uintptr) { unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, "cubic") })
		b.Cleanup(func() { c.Close() })
	}
	return guest, host
}

// streamFor moves blocks from one end of a TCP connection to the other for d
// and returns the rate in Gbit/s until the last byte has arrived.
func streamFor(b *testing.B, from, to net.Conn, d time.Duration) float64 {
	const block = 256 << 10
	var received atomic.Int64
	done := make(chan error, 1)
	more := make(chan struct{}, 1)
	go func() {
		buf := make([]byte, block)
		for {
			n, err := to.Read(buf)
			received.Add(int64(n))
			select {
			case more <- struct{}{}:
			default:
			}
			if err != nil {
				done <- err
				return
			}
		}
	}()
	buf := make([]byte, block)
	begin, sent := time.Now(), int64(0)
	for time.Since(begin) < d {
		n, err := from.Write(buf)
		if err != nil {
			b.Fatal(err)
		}
		sent += int64(n)
	}
	for received.Load() < sent { // what is on the way belongs to the time
		select {
		case <-more:
		case err := <-done:
			b.Fatal(err)
		}
	}
	took := time.Since(begin)
	to.SetReadDeadline(time.Now()) // ends the reader: the connection is used again
	for len(done) == 0 {
		select {
		case <-more:
		case err := <-done:
			done <- err
		}
	}
	to.SetReadDeadline(time.Time{})
	return float64(sent) * 8 / took.Seconds() / 1e9
}

// BenchmarkRatioTCP moves one TCP stream through each way in turn, up and down,
// and says how the link's rate stands to that of the others: medians of the
// rounds' own ratios.
func BenchmarkRatioTCP(b *testing.B) {
	privileged(b)
	const rounds, each = 9, 500 * time.Millisecond
	ways := []string{"link", "joined", "gvisor", "link-plain"}
	worlds := []world{linkWorld(b, ""), joinedWorld(b), gvisorWorld(b), linkWorld(b, "-plain")}
	rates := map[string][]float64{}
	b.ResetTimer()
	for _, direction := range []string{"up", "down"} {
		var from, to []net.Conn
		for _, w := range worlds {
			guest, host := w.connect(b)
			if direction == "down" {
				guest, host = host, guest
			}
			from, to = append(from, guest), append(to, host)
		}
		for round := range rounds + 1 {
			var rate [4]float64
			for i := range worlds {
				rate[i] = streamFor(b, from[i], to[i], each)
			}
			if round == 0 {
				continue // windows open, caches fill
			}
			for i, way := range ways {
				rates[direction+"-"+way] = append(rates[direction+"-"+way], rate[i])
				rates[direction+"-link/"+way] = append(rates[direction+"-link/"+way], rate[0]/rate[i])
			}
		}
	}
	for _, direction := range []string{"up", "down"} {
		for _, way := range ways {
			b.Logf("%-4s %-10s %6.2f Gbit/s, link to this %.2f", direction, way,
				median(rates[direction+"-"+way]), median(rates[direction+"-link/"+way]))
		}
	}
	b.ReportMetric(0, "ns/op")
	for _, direction := range []string{"up", "down"} {
		b.ReportMetric(median(rates[direction+"-link/joined"]), direction+"-link/joined")
		b.ReportMetric(median(rates[direction+"-link/gvisor"]), direction+"-link/gvisor")
	}
	for i, end := range []string{"host-MB", "guest-MB"} {
		b.ReportMetric(peak(b, worlds[0].pids[i]), end)
	}
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}

// peak is the most memory that a process has held, in MB (proc(5), VmHWM).
func peak(b *testing.B, pid int) float64 {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "VmHWM:" {
			kb, _ := strconv.ParseFloat(f[1], 64)
			return kb / 1e3
		}
	}
	return 0
}

// BenchmarkRatioLatency sends one small TCP message after the other and waits
// for each to come back, by the link and by gvisor-tap-vsock in turn, idle and
// beside a stream.
func BenchmarkRatioLatency(b *testing.B) {
	privileged(b)
	const rounds, messages = 7, 200
	ways := []string{"link", "gvisor"}
	worlds := []world{linkWorld(b, ""), gvisorWorld(b)}
	b.ResetTimer()
	for _, load := range []string{"idle", "loaded"} {
		var middle, late [2][]float64 // microseconds of each round
		var ratio []float64
		for range rounds {
			for i, w := range worlds {
				m, l := echoes(b, w, messages, load == "loaded")
				middle[i], late[i] = append(middle[i], m), append(late[i], l)
			}
			ratio = append(ratio, middle[0][len(ratio)]/middle[1][len(ratio)])
		}
		for i, way := range ways {
			b.Logf("%-6s %-6s median %6.0f us, 99 of 100 within %6.0f us", load, way, median(middle[i]), median(late[i]))
		}
		b.ReportMetric(median(ratio), load+"-link/gvisor")
	}
	b.ReportMetric(0, "ns/op")
}

// echoes returns the median and the 99th percentile of n round trips in
// microseconds.
func echoes(b *testing.B, w world, n int, loaded bool) (middle, late float64) {
	guest, host := w.connect(b)
	var wg sync.WaitGroup
	wg.Go(func() { io.Copy(host, host) })
	closing := []net.Conn{guest, host}
	if loaded {
		from, to := w.connect(b)
		closing = append(closing, from, to)
		wg.Go(func() { io.Copy(io.Discard, to) })
		wg.Go(func() {
			for buf := make([]byte, 256<<10); ; {
				if _, err := from.Write(buf); err != nil {
					return
				}
			}
		})
	}
	times := make([]float64, n)
	buf := make([]byte, 8)
	for i := range times {
		begin := time.Now()
		binary.BigEndian.PutUint64(buf, uint64(i))
		if _, err := guest.Write(buf); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(guest, buf); err != nil {
			b.Fatal(err)
		}
		times[i] = float64(time.Since(begin).Microseconds())
	}
	for _, c := range closing {
		c.Close()
	}
	wg.Wait()
	slices.Sort(times)
	return median(times), times[n*99/100]
}

// BenchmarkRatioQueues says what several queues could win at most: two flows
// through two links, each with devices and processes of its own, against the
// same two flows through one.
func BenchmarkRatioQueues(b *testing.B) {
	privileged(b)
	const rounds, each = 7, 500 * time.Millisecond
	one, two, three := linkWorld(b, ""), linkWorld(b, ""), linkWorld(b, "")
	type flow struct{ from, to net.Conn }
	connect := func(w world) flow { guest, host := w.connect(b); return flow{guest, host} }
	shared, apart := []flow{connect(one), connect(one)}, []flow{connect(two), connect(three)}
	both := func(flows []flow) (sum float64) {
		rates := make([]float64, len(flows))
		var wg sync.WaitGroup
		for i, f := range flows {
			wg.Go(func() { rates[i] = streamFor(b, f.from, f.to, each) })
		}
		wg.Wait()
		for _, r := range rates {
			sum += r
		}
		return sum
	}
	b.ResetTimer()
	var rates, ratio []float64
	for round := range rounds + 1 {
		a, c := both(shared), both(apart)
		if round > 0 {
			rates, ratio = append(rates, a), append(ratio, c/a)
		}
	}
	b.Logf("two flows through one link %.2f Gbit/s; two links to one %.2f", median(rates), median(ratio))
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(median(ratio), "two-links/one")
}
