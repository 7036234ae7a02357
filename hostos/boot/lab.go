//go:build lab

package boot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
)

// labServices are the services that only a lab image has.
func labServices() []Service {
	return []Service{{Name: "labhook", Args: []string{"/bbin/labhook"}}}
}

// The lab's air: a namespace for an access point, with the network card that
// leads from it to the lab's home. It has to be out of netd's sight before netd
// starts.
const (
	AirNetns = "/run/netns/air"
	AirMAC   = "52:54:00:5e:c1:51"
)

// setAirAside moves the lab's own network card into the namespace air.
func setAirAside() error {
	if err := makeNetns(AirNetns); err != nil {
		return fmt.Errorf("air: %w", err)
	}
	if err := inNetns(AirNetns, noIPv6Autoconfiguration); err != nil {
		return fmt.Errorf("air: %w", err)
	}
	ns, err := os.Open(AirNetns)
	if err != nil {
		return fmt.Errorf("air: %w", err)
	}
	defer ns.Close()
	links, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("air: %w", err)
	}
	for _, l := range links {
		if l.Attrs().HardwareAddr.String() == AirMAC {
			return netlink.LinkSetNsFd(l, int(ns.Fd()))
		}
	}
	return nil // a machine without one has no air
}

// labDevices sets the lab's card aside and makes the link /dev/virtio-ports/NAME that udev would make, for
// the port that labhook serves.
func labDevices() error {
	return errors.Join(setAirAside(), linkPort("/sys/class/virtio-ports", "/dev/virtio-ports", "/dev", "org.sekisho.lab"))
}

func linkPort(sys, dir, dev, name string) error {
	ports, err := filepath.Glob(filepath.Join(sys, "*", "name"))
	if err != nil {
		return fmt.Errorf("virtio ports: %w", err)
	}
	for _, p := range ports {
		if b, err := os.ReadFile(p); err != nil || strings.TrimSpace(string(b)) != name {
			continue
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("virtio ports: %w", err)
		}
		port := filepath.Join(dev, filepath.Base(filepath.Dir(p)))
		if err := os.Symlink(port, filepath.Join(dir, name)); err != nil && !errors.Is(err, os.ErrExist) {
			return fmt.Errorf("virtio ports: %w", err)
		}
		return nil
	}
	return fmt.Errorf("virtio ports: none is named %s", name)
}
