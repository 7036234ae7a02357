//go:build linux

package kernel

import (
	"io/fs"
	"slices"
	"testing"
	"testing/fstest"

	"sekisho/netd"
)

func TestUnserved(t *testing.T) {
	file := func(s string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(s + "\n")} }
	link := func(s string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(s), Mode: fs.ModeSymlink} }
	pci := "bus/pci/devices/"
	usb := "bus/usb/devices/"
	sys := fstest.MapFS{
		// A graphics card is not our business.
		pci + "0000:00:02.0/class": file("0x030000"),
		// Served by virtio_net, one floor down.
		pci + "0000:00:03.0/class":                    file("0x020000"),
		pci + "0000:00:03.0/virtio0/net/eth0/ifindex": file("2"),
		pci + "0000:00:14.3/class":                    file("0x028000"),
		pci + "0000:00:14.3/vendor":                   file("0x8086"),
		pci + "0000:00:14.3/device":                   file("0xa0f0"),
		pci + "0000:00:14.3/driver":                   link("../../../bus/pci/drivers/iwlwifi"),
		"bus/pci/drivers/iwlwifi/module":              file(""),
		pci + "0000:02:00.0/class":                    file("0x020000"),
		pci + "0000:02:00.0/vendor":                   file("0x10ec"),
		pci + "0000:02:00.0/device":                   file("0x8125"),
		usb + "1-2/idVendor":                          file("12d1"),
		usb + "1-2/idProduct":                         file("14db"),
		usb + "1-2:1.0/bInterfaceClass":               file("02"),
		usb + "1-2:1.0/bInterfaceSubClass":            file("06"),
		usb + "1-2:1.0/bInterfaceProtocol":            file("00"),
		usb + "1-3:1.0/bInterfaceClass":               file("08"), // a disk
		usb + "1-4:1.0/bInterfaceClass":               file("e0"),
		usb + "1-4:1.0/bInterfaceSubClass":            file("01"),
		usb + "1-4:1.0/bInterfaceProtocol":            file("03"),
		usb + "1-4:1.0/net/usb0/ifindex":              file("4"),
	}
	want := []netd.Unserved{
		{Device: "pci 0000:00:14.3", ID: "8086:a0f0", Driver: "iwlwifi"},
		{Device: "pci 0000:02:00.0", ID: "10ec:8125"},
		{Device: "usb 1-2:1.0", ID: "12d1:14db"},
	}
	if got := Unserved(sys); !slices.Equal(got, want) {
		t.Errorf("%+v, want %+v", got, want)
	}
	if got := Unserved(fstest.MapFS{}); len(got) != 0 {
		t.Errorf("an empty /sys has %+v", got)
	}
	if s := want[0].String(); s != "pci 0000:00:14.3 (8086:a0f0): driver iwlwifi made no link, its firmware may be missing" {
		t.Error(s)
	}
}
