//go:build linux

package kernel

import (
	"cmp"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"sekisho/netd"
)

// maxSysfs bounds what is read of one file below /sys, in bytes.
const maxSysfs = 4096

// describe adds to Ethernet links what the driver and /sys say about them. It
// has to run in their namespace.
func describe(links []Link) error {
	socket, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	defer unix.Close(socket)
	for i := range links {
		if links[i].Ethernet {
			links[i].describe(socket, os.DirFS("/sys"))
		}
	}
	return nil
}

// describe adds what the driver and /sys say about a link. What they do not
// say stays empty: the link then counts as wired.
func (l *Link) describe(socket int, sys fs.FS) {
	l.Kind = netd.KindWired
	if info, err := unix.IoctlGetEthtoolDrvinfo(socket, l.Name); err == nil { // ethtool(8) -i
		l.Driver = unix.ByteSliceToString(info.Driver[:])
		if strings.HasPrefix(unix.ByteSliceToString(info.Bus_info[:]), "usb-") {
			l.Kind = netd.KindUSB
		}
	}
	dir := "class/net/" + l.Name
	// /sys may show another network namespace's devices.
	if word(sys, dir+"/ifindex") != strconv.Itoa(l.Index) || word(sys, dir+"/address") != l.Hardware.String() {
		return
	}
	if _, err := fs.Stat(sys, dir+"/phy80211"); err == nil {
		l.Kind = netd.KindWifi
	}
	if l.Kind == netd.KindUSB {
		// device is the USB interface, its parent the device.
		l.Device = word(sys, dir+"/device/../idVendor") + ":" + word(sys, dir+"/device/../idProduct")
	}
}

// word reads one short file, without the white space around it; empty if it cannot.
func word(sys fs.FS, name string) string {
	f, err := sys.Open(name)
	if err != nil {
		return ""
	}
	defer f.Close()
	b := make([]byte, maxSysfs)
	n, _ := f.Read(b)
	return strings.TrimSpace(string(b[:n]))
}

// Unserved lists the network hardware on PCI and USB of which the kernel has
// made no link. sys is /sys.
func Unserved(sys fs.FS) []netd.Unserved {
	var list []netd.Unserved
	for _, e := range entries(sys, "bus/pci/devices") {
		dir := "bus/pci/devices/" + e
		// Base class 02 is network controllers (PCI Code and ID Assignment, 1.3).
		if !strings.HasPrefix(word(sys, dir+"/class"), "0x02") || served(sys, dir) {
			continue
		}
		hex := func(name string) string { return strings.TrimPrefix(word(sys, dir+"/"+name), "0x") }
		list = append(list, netd.Unserved{Device: "pci " + e, ID: hex("vendor") + ":" + hex("device"), Driver: driver(sys, dir)})
	}
	for _, e := range entries(sys, "bus/usb/devices") {
		dir := "bus/usb/devices/" + e
		device, _, isInterface := strings.Cut(e, ":")
		if !isInterface || !ethernet(sys, dir) || served(sys, dir) {
			continue
		}
		parent := "bus/usb/devices/" + device
		list = append(list, netd.Unserved{Device: "usb " + e, ID: word(sys, parent+"/idVendor") + ":" + word(sys, parent+"/idProduct"), Driver: driver(sys, dir)})
	}
	slices.SortFunc(list, func(a, b netd.Unserved) int { return cmp.Compare(a.Device, b.Device) })
	return list
}

// ethernet reports whether a USB interface is of a network class: CDC Ethernet
// (subclass 06), NCM (0d), MBIM (0e), or RNDIS as wireless controller (USB-IF
// "Defined Class Codes").
func ethernet(sys fs.FS, dir string) bool {
	class := word(sys, dir+"/bInterfaceClass") + "/" + word(sys, dir+"/bInterfaceSubClass") + "/" + word(sys, dir+"/bInterfaceProtocol")
	return slices.ContainsFunc([]string{"02/06/", "02/0d/", "02/0e/", "e0/01/03"}, func(p string) bool { return strings.HasPrefix(class, p) })
}

// served reports whether a device has a link, be it in another network
// namespace, where its folder looks empty; a virtio device has it one floor down.
func served(sys fs.FS, dir string) bool {
	has := func(dir string) bool {
		_, err := fs.Stat(sys, dir+"/net")
		return err == nil
	}
	return has(dir) || slices.ContainsFunc(entries(sys, dir), func(e string) bool {
		return strings.HasPrefix(e, "virtio") && has(dir+"/"+e)
	})
}

func driver(sys fs.FS, dir string) string {
	target, err := fs.ReadLink(sys, dir+"/driver")
	if err != nil {
		return ""
	}
	return path.Base(target)
}

func entries(sys fs.FS, dir string) []string {
	list, err := fs.ReadDir(sys, dir)
	if err != nil {
		return nil
	}
	names := make([]string, 0, len(list))
	for _, e := range list {
		names = append(names, e.Name())
	}
	return names
}
