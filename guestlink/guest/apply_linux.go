package guest

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sekisho/guestlink"
)

// Apply sets the TUN device name to c: its address of each family, its MTU, and
// the default routes, by netlink; and the name servers in resolvConf. What an
// earlier Config set is removed. The device makes no IPv6 address of its own and
// asks for no router.
func Apply(name, resolvConf string, c guestlink.Config) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find interface %s: %w", name, err)
	}
	if err := netlink.LinkSetMTU(l, c.MTU); err != nil {
		return fmt.Errorf("set mtu %d of %s: %w", c.MTU, name, err)
	}
	if err := quiet(name); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	if err := setAddresses(l, c); err != nil {
		return err
	}
	for _, p := range c.Addresses() {
		any := net.IPv4zero
		if p.Addr().Is6() {
			any = net.IPv6zero
		}
		route := &netlink.Route{
			LinkIndex: l.Attrs().Index,
			Dst:       &net.IPNet{IP: any, Mask: net.CIDRMask(0, p.Addr().BitLen())},
			Src:       p.Addr().AsSlice(),
			Scope:     netlink.SCOPE_LINK,
		}
		if err := netlink.RouteReplace(route); err != nil {
			return fmt.Errorf("set default route by %s: %w", name, err)
		}
	}
	return writeResolvConf(resolvConf, c)
}

// quiet switches off what IPv6 would do on the device by itself (kernel
// Documentation/networking/ip-sysctl.rst). A kernel without IPv6 does nothing,
// and where these cannot be written, the link carries none of it.
func quiet(name string) error {
	for key, value := range map[string]string{"accept_ra": "0", "autoconf": "0", "addr_gen_mode": "1"} {
		err := os.WriteFile(filepath.Join(ProcSys, "net/ipv6/conf", name, key), []byte(value), 0)
		if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.EROFS) && !errors.Is(err, os.ErrPermission) {
			return fmt.Errorf("set %s of %s: %w", key, name, err)
		}
	}
	return nil
}

func setAddresses(l netlink.Link, c guestlink.Config) error {
	old, err := netlink.AddrList(l, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("list addresses of %s: %w", l.Attrs().Name, err)
	}
	for _, a := range old {
		if ip, _ := netip.AddrFromSlice(a.IP); !c.Holds(ip.Unmap()) && a.Scope != unix.RT_SCOPE_LINK {
			if err := netlink.AddrDel(l, &a); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
				return fmt.Errorf("remove address %s: %w", a.IPNet, err)
			}
		}
	}
	for _, p := range c.Addresses() {
		want := &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}}
		if p.Addr().Is6() {
			want.Flags = unix.IFA_F_NODAD // nobody else is on this link
		}
		if err := netlink.AddrReplace(l, want); err != nil {
			return fmt.Errorf("set address %s: %w", p, err)
		}
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

// SetTime sets the clock to t if it is off by more than MaxDrift.
func SetTime(t time.Time) error {
	if drift(time.Now(), t) <= MaxDrift {
		return nil
	}
	ts := unix.NsecToTimespec(t.UnixNano())
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
		return fmt.Errorf("set clock to %s: %w", t.Format(time.RFC3339), err)
	}
	return nil
}

// Power starts an orderly shutdown or a suspend to memory by the service
// manager, and without one by poweroff(8) and /sys/power/state.
func Power(a guestlink.Action) error {
	systemd := false
	if _, err := os.Stat("/run/systemd/system"); err == nil {
		systemd = true
	}
	switch {
	case a == guestlink.ActionShutdown && systemd:
		return start("systemctl", "poweroff", "--no-block")
	case a == guestlink.ActionShutdown:
		return start("poweroff")
	case a == guestlink.ActionSuspend && systemd:
		return start("systemctl", "suspend", "--no-block")
	case a == guestlink.ActionSuspend:
		// The write returns when the machine has woken: not for the caller to wait.
		f, err := os.OpenFile("/sys/power/state", os.O_WRONLY, 0)
		if err != nil {
			return fmt.Errorf("suspend: %w", err)
		}
		time.AfterFunc(answerFirst, func() {
			f.WriteString("mem")
			f.Close()
		})
		return nil
	}
	return fmt.Errorf("power action %s is unknown", a)
}

// answerFirst is how long a suspend waits, so that the answer to the host is on
// its way before the machine stops.
const answerFirst = 500 * time.Millisecond

func start(name string, args ...string) error {
	c := exec.Command(name, args...)
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, bytes.TrimSpace(out))
	}
	return nil
}
