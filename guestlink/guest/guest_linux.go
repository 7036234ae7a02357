// Package guest is the work domain's end of the guest link: it dials the host
// domain, again and again, and sets the TUN device to what the host says.
package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sekisho/guestlink"
	"sekisho/guestlink/packet"
)

// Back-off between attempts to reach the host domain. The host's end is on the
// same machine, so the longest wait is short.
const (
	firstWait   = 100 * time.Millisecond
	longestWait = 5 * time.Second
	stableRun   = 10 * time.Second // a link that lasted this long resets the wait
)

// Agent dials and serves until its context is done.
type Agent struct {
	Dial func(context.Context) (net.Conn, error)
	Pump *packet.Pump
	Log  *slog.Logger
	// State is told "waiting" and "linked" at every change.
	State func(string)
}

// Run serves the link and returns when ctx is done or the device fails.
func (a *Agent) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	device := make(chan struct{})
	go func() {
		defer close(device)
		cancel(a.Pump.Run(ctx))
	}()
	for wait := firstWait; ctx.Err() == nil; {
		a.State("waiting")
		began := time.Now()
		conn, err := a.Dial(ctx)
		if err == nil {
			err = a.Pump.Serve(ctx, conn, func() { a.State("linked") })
		}
		if ctx.Err() != nil {
			break
		}
		if time.Since(began) > stableRun {
			wait = firstWait
		}
		a.Log.Warn("no link", "cause", err, "next_attempt_in", wait)
		select {
		case <-ctx.Done():
		case <-time.After(wait + rand.N(wait/4)):
		}
		wait = min(2*wait, longestWait)
	}
	cancel(nil)
	<-device
	return context.Cause(ctx)
}

// Apply sets the TUN device name to c: its one address, its MTU, and the
// default route, by netlink; and the name servers in resolvConf. Addresses of
// an earlier Config are removed.
func Apply(name, resolvConf string, c guestlink.Config) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find interface %s: %w", name, err)
	}
	if err := netlink.LinkSetMTU(l, c.MTU); err != nil {
		return fmt.Errorf("set mtu %d of %s: %w", c.MTU, name, err)
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	if err := setAddress(l, c); err != nil {
		return err
	}
	any, bits := net.IPv4zero, 32
	if c.Address.Addr().Is6() {
		any, bits = net.IPv6zero, 128
	}
	route := &netlink.Route{
		LinkIndex: l.Attrs().Index,
		Dst:       &net.IPNet{IP: any, Mask: net.CIDRMask(0, bits)},
		Src:       c.Address.Addr().AsSlice(),
		Scope:     netlink.SCOPE_LINK,
	}
	if err := netlink.RouteReplace(route); err != nil {
		return fmt.Errorf("set default route by %s: %w", name, err)
	}
	return writeResolvConf(resolvConf, c)
}

func setAddress(l netlink.Link, c guestlink.Config) error {
	want := &netlink.Addr{IPNet: &net.IPNet{
		IP: c.Address.Addr().AsSlice(), Mask: net.CIDRMask(c.Address.Bits(), c.Address.Addr().BitLen()),
	}}
	old, err := netlink.AddrList(l, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("list addresses of %s: %w", l.Attrs().Name, err)
	}
	for _, a := range old {
		if !a.IP.Equal(want.IP) && a.Scope != unix.RT_SCOPE_LINK {
			if err := netlink.AddrDel(l, &a); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
				return fmt.Errorf("remove address %s: %w", a.IPNet, err)
			}
		}
	}
	if err := netlink.AddrReplace(l, want); err != nil {
		return fmt.Errorf("set address %s: %w", c.Address, err)
	}
	return nil
}

// writeResolvConf replaces path in one step. Without name servers it is left
// as it is.
func writeResolvConf(path string, c guestlink.Config) error {
	if len(c.DNS) == 0 {
		return nil
	}
	var b bytes.Buffer
	for _, d := range c.DNS {
		fmt.Fprintf(&b, "nameserver %s\n", d)
	}
	tmp := filepath.Join(filepath.Dir(path), ".resolv.conf.sekisho")
	if err := os.WriteFile(tmp, b.Bytes(), 0o644); err != nil {
		return fmt.Errorf("write name servers: %w", err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("write name servers: %w", err)
	}
	return nil
}
