//go:build lab

package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"sekisho/guestlink"
	"sekisho/guestlink/vsock"
	"sekisho/images/lab/stream"
)

// sink receives streams from the work domain on a vsock port that only a
// benchmark opens.
func sink(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("sink", flag.ExitOnError)
	frames := flags.Bool("frames", false, "the streams are guestlink frames")
	flags.Parse(args)
	port, err := strconv.ParseUint(flags.Arg(0), 10, 32)
	if err != nil {
		return fmt.Errorf("sink: port: %w", err)
	}
	l, err := vsock.Listen(guestlink.HostCID, uint32(port), guestlink.WorkCID)
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { l.Close() })()
	for ctx.Err() == nil {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		_, err = stream.Receive(conn, *frames)
		if err := errors.Join(err, conn.Close()); err != nil {
			fmt.Fprintln(os.Stderr, "sink:", err)
		}
	}
	return nil
}

// tunnel sends a stream through the tunnel from the host domain itself, to
// measure the tunnel without the guest link: it takes linkd's place in the
// namespace inside with one end of a veth pair called work0, which netd then
// treats as the work domain's, and sends from the other end, which has the
// inner address. linkd comes back by itself when the pair is gone.
func tunnel(ctx context.Context, args []string) error {
	if len(args) != 3 {
		return errors.New("tunnel: want INNER ADDRESS:PORT BYTES")
	}
	inner, err := netip.ParseAddr(args[0])
	if err != nil {
		return fmt.Errorf("tunnel: %w", err)
	}
	to, err := netip.ParseAddrPort(args[1])
	if err != nil {
		return fmt.Errorf("tunnel: %w", err)
	}
	count, err := strconv.ParseInt(args[2], 10, 64)
	if err != nil {
		return fmt.Errorf("tunnel: %w", err)
	}
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: this thread has a namespace of its own
		result <- through(ctx, inner, to, count)
	}()
	return <-result
}

// through does tunnel's work on a thread that it may move.
func through(ctx context.Context, inner netip.Addr, to netip.AddrPort, count int64) error {
	inside, err := netns.GetFromPath("/run/netns/inside")
	if err != nil {
		return fmt.Errorf("tunnel: %w", err)
	}
	defer inside.Close()
	own, err := netns.New() // and this thread is in it
	if err != nil {
		return fmt.Errorf("tunnel: %w", err)
	}
	defer own.Close()
	there, err := netlink.NewHandleAt(inside, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("tunnel: %w", err)
	}
	defer there.Close()
	here, err := netlink.NewHandleAt(own, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("tunnel: %w", err)
	}
	defer here.Close()

	pair := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "work0", MTU: 1400}, PeerName: "bench0", PeerNamespace: netlink.NsFd(int(own))}
	for deadline := time.Now().Add(10 * time.Second); ; {
		killLinkd()
		if err = there.LinkAdd(pair); err == nil {
			break
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("tunnel: veth work0: %w", err)
		}
	}
	work, err := there.LinkByName("work0")
	if err != nil {
		return fmt.Errorf("tunnel: %w", err)
	}
	defer there.LinkDel(work)
	bench, err := here.LinkByName("bench0")
	if err != nil {
		return fmt.Errorf("tunnel: %w", err)
	}
	innerIP, toIP := net.IP(inner.AsSlice()), net.IP(to.Addr().AsSlice())
	neighbour := func(link netlink.Link, ip net.IP, mac net.HardwareAddr) *netlink.Neigh {
		return &netlink.Neigh{LinkIndex: link.Attrs().Index, State: netlink.NUD_PERMANENT, IP: ip, HardwareAddr: mac}
	}
	err = errors.Join(
		here.LinkSetMTU(bench, 1400),
		here.LinkSetUp(bench),
		here.AddrAdd(bench, &netlink.Addr{IPNet: &net.IPNet{IP: innerIP, Mask: net.CIDRMask(32, 32)}}),
		here.RouteAdd(&netlink.Route{LinkIndex: bench.Attrs().Index, Scope: netlink.SCOPE_LINK, Dst: &net.IPNet{IP: toIP, Mask: net.CIDRMask(32, 32)}}),
		here.NeighSet(neighbour(bench, toIP, work.Attrs().HardwareAddr)),
		there.NeighSet(neighbour(work, innerIP, bench.Attrs().HardwareAddr)),
	)
	if err != nil {
		return fmt.Errorf("tunnel: %w", err)
	}
	// netd sees the new work0 and opens the way; TCP's own repetition waits for it.
	conn, err := (&net.Dialer{Timeout: 20 * time.Second}).DialContext(ctx, "tcp4", to.String())
	if err != nil {
		return fmt.Errorf("tunnel: %w", err)
	}
	defer conn.Close()
	r, err := stream.Send(conn, count, false)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(r)
}

// killLinkd ends linkd, and its work0 with it.
func killLinkd() {
	dirs, _ := filepath.Glob("/proc/[0-9]*/cmdline") // a good pattern cannot fail
	for _, name := range dirs {
		line, err := os.ReadFile(name)
		if err != nil || !strings.HasPrefix(string(line), "/bbin/linkd\x00") {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(name))); err == nil {
			_ = unix.Kill(pid, unix.SIGKILL) // it may have ended already
		}
	}
}
