//go:build linux

package kernel

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Neighbour returns the hardware address under which the calling process's
// namespace reaches a on the named link. It asks nobody: a neighbour that was
// not spoken to is an error.
func Neighbour(link string, a netip.Addr) (net.HardwareAddr, error) {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return nil, fmt.Errorf("link %s: %w", link, err)
	}
	list, err := netlink.NeighList(l.Attrs().Index, unix.AF_INET)
	if err != nil {
		return nil, fmt.Errorf("neighbours of %s: %w", link, err)
	}
	for _, n := range list {
		if b, ok := netip.AddrFromSlice(n.IP); ok && b.Unmap() == a && len(n.HardwareAddr) > 0 && n.State&(netlink.NUD_FAILED|netlink.NUD_INCOMPLETE) == 0 {
			return n.HardwareAddr, nil
		}
	}
	return nil, fmt.Errorf("%s is no neighbour on %s", a, link)
}
