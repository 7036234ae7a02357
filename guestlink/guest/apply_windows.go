package guest

import (
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/windows"
	"golang.zx2c4.com/wireguard/windows/tunnel/winipcfg"

	"sekisho/guestlink"
)

// Apply sets the network adapter of that name to c: its address of each family,
// its MTU, the default routes and the name servers, by the IP Helper API
// (winipcfg). What an earlier Config set is replaced.
func Apply(adapter string, c guestlink.Config) error {
	luid, err := find(adapter)
	if err != nil {
		return err
	}
	for _, family := range []winipcfg.AddressFamily{windows.AF_INET, windows.AF_INET6} {
		if err := applyFamily(luid, family, adapter, c); err != nil {
			return err
		}
	}
	return nil
}

// applyFamily sets what c says of one address family; without an address of it,
// the adapter has none.
func applyFamily(luid winipcfg.LUID, family winipcfg.AddressFamily, adapter string, c guestlink.Config) error {
	six := family == windows.AF_INET6
	everything, nobody := netip.MustParsePrefix("0.0.0.0/0"), netip.IPv4Unspecified()
	if six {
		everything, nobody = netip.MustParsePrefix("::/0"), netip.IPv6Unspecified()
	}
	var servers []netip.Addr
	for _, d := range c.DNS {
		if d.Is6() == six {
			servers = append(servers, d)
		}
	}
	var addresses []netip.Prefix
	for _, p := range c.Addresses() {
		if p.Addr().Is6() == six {
			addresses = append(addresses, p)
		}
	}
	if len(addresses) == 0 {
		if err := luid.FlushIPAddresses(family); err != nil {
			return fmt.Errorf("remove addresses of %s: %w", adapter, err)
		}
	} else {
		row, err := luid.IPInterface(family)
		if err != nil {
			return fmt.Errorf("interface of adapter %s: %w", adapter, err)
		}
		row.NLMTU, row.UseAutomaticMetric, row.Metric = uint32(c.MTU), false, 1
		row.DadTransmits, row.RouterDiscoveryBehavior = 0, winipcfg.RouterDiscoveryDisabled
		if err := row.Set(); err != nil {
			return fmt.Errorf("set mtu %d of %s: %w", c.MTU, adapter, err)
		}
		if err := luid.SetIPAddressesForFamily(family, addresses); err != nil {
			return fmt.Errorf("set address %s of %s: %w", addresses[0], adapter, err)
		}
		route := &winipcfg.RouteData{Destination: everything, NextHop: nobody}
		if err := luid.SetRoutesForFamily(family, []*winipcfg.RouteData{route}); err != nil {
			return fmt.Errorf("set default route by %s: %w", adapter, err)
		}
	}
	if err := luid.SetDNS(family, servers, nil); err != nil {
		return fmt.Errorf("set name servers of %s: %w", adapter, err)
	}
	return nil
}

// find looks an adapter up by its friendly name.
func find(name string) (winipcfg.LUID, error) {
	all, err := winipcfg.GetAdaptersAddresses(windows.AF_UNSPEC, winipcfg.GAAFlagIncludeAllInterfaces)
	if err != nil {
		return 0, fmt.Errorf("list adapters: %w", err)
	}
	for _, a := range all {
		if a.FriendlyName() == name {
			return a.LUID, nil
		}
	}
	return 0, fmt.Errorf("no adapter %q; is its driver installed?", name)
}

// SetTime sets the clock to t if it is off by more than MaxDrift.
func SetTime(t time.Time) error {
	if drift(time.Now(), t) <= MaxDrift {
		return nil
	}
	if err := privilege("SeSystemtimePrivilege"); err != nil {
		return err
	}
	u := t.UTC()
	st := windows.Systemtime{
		Year: uint16(u.Year()), Month: uint16(u.Month()), DayOfWeek: uint16(u.Weekday()), Day: uint16(u.Day()),
		Hour: uint16(u.Hour()), Minute: uint16(u.Minute()), Second: uint16(u.Second()), Milliseconds: uint16(u.Nanosecond() / 1e6),
	}
	if err := setSystemTime(&st); err != nil {
		return fmt.Errorf("set clock to %s: %w", u.Format(time.RFC3339), err)
	}
	return nil
}

// Power starts an orderly shutdown, or a suspend to memory. Windows asks the
// user's programs to end first, as the Start menu does.
func Power(a guestlink.Action) error {
	if err := privilege("SeShutdownPrivilege"); err != nil {
		return err
	}
	switch a {
	case guestlink.ActionShutdown:
		const planned = windows.SHTDN_REASON_MAJOR_OTHER | windows.SHTDN_REASON_MINOR_OTHER | windows.SHTDN_REASON_FLAG_PLANNED
		if err := windows.InitiateSystemShutdownEx(nil, nil, 0, false, false, planned); err != nil {
			return fmt.Errorf("shut down: %w", err)
		}
		return nil
	case guestlink.ActionSuspend:
		// SetSuspendState returns after the machine has woken.
		time.AfterFunc(answerFirst, func() { setSuspendState() })
		return nil
	}
	return fmt.Errorf("power action %s is unknown", a)
}
