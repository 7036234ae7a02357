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
		if kept, err := there.LinkByName(guestlink.WorkLink); err == nil {
			_ = there.LinkDel(kept) // linkd's device outlasts it; or a linkd has just begun
		}
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

// link receives a number of streams, one after the other, that the work domain
// sends by TCP through the guest link alone: it takes work0 out of the namespace inside into one of its own,
// where ADDRESS is, and sends nothing on. linkd keeps its device meanwhile; at
// the end it goes and linkd with it, and linkd comes back by itself.
func link(ctx context.Context, args []string) error {
	if len(args) != 2 && len(args) != 3 {
		return errors.New("link: want INNER ADDRESS:PORT [STREAMS]")
	}
	streams := 1
	if len(args) == 3 {
		var err error
		if streams, err = strconv.Atoi(args[2]); err != nil {
			return fmt.Errorf("link: streams: %w", err)
		}
	}
	inner, err := netip.ParseAddr(args[0])
	if err != nil {
		return fmt.Errorf("link: %w", err)
	}
	at, err := netip.ParseAddrPort(args[1])
	if err != nil {
		return fmt.Errorf("link: %w", err)
	}
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: this thread has a namespace of its own
		result <- endOfLink(ctx, inner, at, streams)
	}()
	return <-result
}

// endOfLink does link's work on a thread that it may move.
func endOfLink(ctx context.Context, inner netip.Addr, at netip.AddrPort, streams int) error {
	inside, err := netns.GetFromPath("/run/netns/inside")
	if err != nil {
		return fmt.Errorf("link: %w", err)
	}
	defer inside.Close()
	own, err := netns.New() // and this thread is in it
	if err != nil {
		return fmt.Errorf("link: %w", err)
	}
	defer own.Close()
	there, err := netlink.NewHandleAt(inside, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("link: %w", err)
	}
	defer there.Close()
	here, err := netlink.NewHandleAt(own, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("link: %w", err)
	}
	defer here.Close()
	work, err := there.LinkByName(guestlink.WorkLink)
	if err == nil {
		err = there.LinkSetNsFd(work, int(own))
	}
	if err != nil {
		return fmt.Errorf("link: take %s: %w", guestlink.WorkLink, err)
	}
	defer killLinkd()
	if work, err = here.LinkByName(guestlink.WorkLink); err != nil {
		return fmt.Errorf("link: %w", err)
	}
	defer here.LinkDel(work)
	one := func(a netip.Addr) *net.IPNet { return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(32, 32)} }
	err = errors.Join(
		here.LinkSetUp(work),
		here.AddrAdd(work, &netlink.Addr{IPNet: one(at.Addr())}),
		here.RouteAdd(&netlink.Route{LinkIndex: work.Attrs().Index, Scope: netlink.SCOPE_LINK, Dst: one(inner)}),
	)
	if err != nil {
		return fmt.Errorf("link: %w", err)
	}
	l, err := net.Listen("tcp4", at.String())
	if err != nil {
		return fmt.Errorf("link: %w", err)
	}
	defer context.AfterFunc(ctx, func() { l.Close() })()
	defer l.Close()
	for range streams {
		conn, err := l.Accept()
		if err != nil {
			return fmt.Errorf("link: %w", err)
		}
		_, err = stream.Receive(conn, false)
		if err := errors.Join(err, conn.Close()); err != nil {
			return err
		}
	}
	return nil
}

// killLinkd ends linkd.
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
