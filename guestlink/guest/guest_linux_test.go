package guest

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sekisho/guestlink"
	"sekisho/guestlink/host"
	"sekisho/guestlink/packet"
)

// namespace is a network namespace with a thread in it.
type namespace chan func()

func newNamespace(t testing.TB) namespace {
	t.Helper()
	ns, ready := make(namespace), make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the test
		ready <- unix.Unshare(unix.CLONE_NEWNET)
		for f := range ns {
			f()
		}
	}()
	if err := <-ready; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { close(ns) })
	return ns
}

// do calls f on the namespace's thread.
func (ns namespace) do(f func() error) error {
	done := make(chan error)
	ns <- func() { done <- f() }
	return <-done
}

// TestRealTUNs joins two namespaces by the whole link: work0, host end, unix
// socket, guest end, sekisho0 set by Apply. UDP passes both ways, also after
// the link was lost, and a forged source does not.
func TestRealTUNs(t *testing.T) {
	if os.Getenv("SEKISHO_TEST") != "all" {
		t.Skip("needs root, network namespaces and TUN: run as root with SEKISHO_TEST=all")
	}
	dir := t.TempDir()
	hostNS, guestNS := newNamespace(t), newNamespace(t)
	open := func(ns namespace, name string) (dev packet.PacketDevice) {
		if err := ns.do(func() (err error) { dev, err = packet.OpenTUN(name); return err }); err != nil {
			t.Fatal(err)
		}
		return dev
	}
	hostDev, guestDev := open(hostNS, "work0"), open(guestNS, "sekisho0")
	if err := hostNS.do(setUpHost); err != nil {
		t.Fatal(err)
	}
	links, err := net.Listen("unix", filepath.Join(dir, "link"))
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	statuses, linked := make(chan string, 64), make(chan string, 64)
	server := host.New(hostDev, 3, guestlink.DefaultPolicy(), nil, func() uint64 { return 0 }, func(s string) { statuses <- s }, time.Now, log)
	api, err := net.Listen("unix", filepath.Join(dir, "api"))
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var conn net.Conn
	applied := make(chan error, 8)
	resolv := filepath.Join(dir, "resolv.conf")
	agent := &Agent{
		Dial: func(context.Context) (net.Conn, error) {
			mu.Lock()
			defer mu.Unlock()
			conn, err = net.Dial("unix", links.Addr().String())
			return conn, err
		},
		Pump: packet.NewGuest(guestDev, func(c guestlink.Config) error {
			err := guestNS.do(func() error { return Apply("sekisho0", resolv, c) })
			applied <- err
			return err
		}),
		Log: log, State: func(s string) { linked <- s },
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer func() { cancel(); wg.Wait() }()
	wg.Go(func() { server.Run(ctx, links, api) })
	wg.Go(func() { agent.Run(ctx) })

	put(t, api.Addr().String(), `{"address":"10.80.0.2/32","address6":"fd00:80::2/128","mtu":1400,"dns":["10.1.0.53","fd00:1::53"]}`)
	if err := <-applied; err != nil {
		t.Fatal(err)
	}
	exchange(t, hostNS, guestNS)
	if b, _ := os.ReadFile(resolv); string(b) != "nameserver 10.1.0.53\nnameserver fd00:1::53\n" {
		t.Errorf("resolv.conf: %q", b)
	}

	mu.Lock()
	conn.Close() // the link is lost; work0 stays
	mu.Unlock()
	if err := <-applied; err != nil { // the new link brings the config again
		t.Fatal(err)
	}
	exchange(t, hostNS, guestNS)

	// A second address in the work domain gets no packet out.
	err = guestNS.do(func() error {
		l, err := netlink.LinkByName("sekisho0")
		if err != nil {
			return err
		}
		if six, err := netlink.AddrList(l, netlink.FAMILY_V6); err != nil || len(six) != 1 {
			t.Errorf("IPv6 addresses %v, %v: want the inner one alone", six, err)
		}
		a, err := netlink.ParseAddr("10.80.0.66/32")
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(l, a); err != nil {
			return err
		}
		c, err := net.DialUDP("udp4", &net.UDPAddr{IP: a.IP}, &net.UDPAddr{IP: net.IPv4(10, 80, 0, 1), Port: 9})
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte("forged"))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for agent.Pump.Counters().Dropped["source"] == 0 {
		runtime.Gosched()
	}
	if s := server.Status(); s.State != "linked" || s.Counters.Links != 2 || s.Counters.FromLink.Packets < 2 {
		t.Errorf("%+v", s)
	}
	var seen []string
	for len(statuses) > 0 {
		seen = append(seen, <-statuses)
	}
	const alone, joined = "waiting for the work domain / 業務領域の接続待ち", "linked cid 3 / 業務領域と接続中"
	if want := []string{alone, joined, alone, joined}; !slices.Equal(seen, want) {
		t.Errorf("status lines: %q", seen)
	}
}

func setUpHost() error {
	if err := packet.LinkUp("work0"); err != nil {
		return err
	}
	l, err := netlink.LinkByName("work0")
	if err != nil {
		return err
	}
	for own, guest := range map[string]string{"10.80.0.1/32": "10.80.0.2/32", "fd00:80::1/128": "fd00:80::2/128"} {
		a, err := netlink.ParseAddr(own)
		if err != nil {
			return err
		}
		a.Flags |= unix.IFA_F_NODAD // an IPv6 address is good at once
		if err := netlink.AddrAdd(l, a); err != nil {
			return err
		}
		_, to, err := net.ParseCIDR(guest)
		if err != nil {
			return err
		}
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: to, Scope: netlink.SCOPE_LINK}); err != nil {
			return err
		}
	}
	return nil
}

// exchange sends a datagram of 1,300 bytes from the guest and one back, by each
// address family.
func exchange(t *testing.T, hostNS, guestNS namespace) {
	t.Helper()
	exchangeBy(t, hostNS, guestNS, "10.80.0.1", "10.80.0.2")
	exchangeBy(t, hostNS, guestNS, "fd00:80::1", "fd00:80::2")
}

func exchangeBy(t *testing.T, hostNS, guestNS namespace, hostAddr, guestAddr string) {
	t.Helper()
	var server *net.UDPConn
	var client net.Conn
	if err := hostNS.do(func() (err error) {
		server, err = net.ListenUDP("udp", &net.UDPAddr{IP: net.ParseIP(hostAddr), Port: 7000})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	if err := guestNS.do(func() (err error) { client, err = net.Dial("udp", net.JoinHostPort(hostAddr, "7000")); return err }); err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	buf := make([]byte, 2000)
	server.SetDeadline(time.Now().Add(10 * time.Second))
	client.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := client.Write(make([]byte, 1300)); err != nil {
		t.Fatal(err)
	}
	n, from, err := server.ReadFromUDPAddrPort(buf)
	if err != nil || n != 1300 || from.Addr() != netip.MustParseAddr(guestAddr) {
		t.Fatalf("up: %d bytes from %s, %v", n, from, err)
	}
	if _, err := server.WriteToUDPAddrPort(buf[:n], from); err != nil {
		t.Fatal(err)
	}
	if n, err := client.Read(buf); err != nil || n != 1300 {
		t.Fatalf("down: %d bytes, %v", n, err)
	}
}

// put sends a config to the API by hand, as the smallest client would.
func put(t *testing.T, socket, body string) {
	t.Helper()
	c, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprintf(c, "PUT /v1/config HTTP/1.1\r\nHost: linkd\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
	buf := make([]byte, 512)
	n, _ := c.Read(buf)
	if !strings.HasPrefix(string(buf[:n]), "HTTP/1.1 204") {
		t.Fatalf("PUT /v1/config: %s", buf[:n])
	}
}
