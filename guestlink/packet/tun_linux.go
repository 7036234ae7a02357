package packet

import (
	"fmt"

	"github.com/songgao/water"
	"github.com/vishvananda/netlink"
)

// OpenTUN creates the TUN device name in the caller's network namespace. It
// needs CAP_NET_ADMIN there, and lasts until it is closed.
func OpenTUN(name string) (PacketDevice, error) {
	c := water.Config{DeviceType: water.TUN}
	c.Name = name
	d, err := water.New(c)
	if err != nil {
		return nil, fmt.Errorf("create tun device %s: %w; is the module tun loaded, and /dev/net/tun open to this user?", name, err)
	}
	return d, nil
}

// LinkUp sets the interface name in the caller's network namespace up. Its
// addresses and routes are the affair of whoever owns that namespace.
func LinkUp(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find interface %s: %w", name, err)
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return fmt.Errorf("set interface %s up: %w", name, err)
	}
	return nil
}
