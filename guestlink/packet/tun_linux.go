package packet

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/songgao/water"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/tun"

	"sekisho/guestlink"
)

// OpenTUN creates the TUN device name in the caller's network namespace, with
// segmentation offload, or takes over one that Keep has kept, as it is set up.
// It needs CAP_NET_ADMIN there, and lasts until it is closed.
func OpenTUN(name string) (PacketDevice, error) {
	mtu := firstMTU
	if l, err := netlink.LinkByName(name); err == nil && l.Type() == "tuntap" {
		mtu = l.Attrs().MTU
	}
	dev, err := tun.CreateTUN(name, mtu)
	if err != nil {
		return nil, fmt.Errorf("create tun device %s: %w; is the module tun loaded, and /dev/net/tun open to this user?", name, err)
	}
	d := &offloadTUN{batchTUN: newBatchTUN(dev), file: dev.File()}
	if !d.offload(name) {
		return d.batchTUN, nil
	}
	return d, nil
}

// Keep makes a device of OpenTUN outlast its process, with addresses, routes
// and the connections of those who use it (TUNSETPERSIST; Linux,
// Documentation/networking/tuntap.rst). Without a process it has no carrier and
// loses what is sent to it.
func Keep(dev PacketDevice) error {
	d, ok := dev.(interface{ fd() *os.File })
	if !ok {
		return fmt.Errorf("keep tun device: %T has no file", dev)
	}
	raw, err := d.fd().SyscallConn()
	if err != nil {
		return fmt.Errorf("keep tun device: %w", err)
	}
	var inner error
	err = raw.Control(func(fd uintptr) { inner = unix.IoctlSetInt(int(fd), unix.TUNSETPERSIST, 1) })
	if err := errors.Join(err, inner); err != nil {
		return fmt.Errorf("keep tun device: %w", err)
	}
	return nil
}

func (d *batchTUN) fd() *os.File { return d.tun.File() }

// OpenPlainTUN is OpenTUN by songgao/water, one packet per system call, for
// kernels whose TUN devices know no offload.
func OpenPlainTUN(name string) (PacketDevice, error) {
	c := water.Config{DeviceType: water.TUN}
	c.Name = name
	d, err := water.New(c)
	if err != nil {
		return nil, fmt.Errorf("create tun device %s: %w; is the module tun loaded, and /dev/net/tun open to this user?", name, err)
	}
	return d, nil
}

// offloadTUN is a TUN device with IFF_VNET_HDR: its file moves the headers as
// they are, where wireguard/tun would segment and coalesce.
type offloadTUN struct {
	*batchTUN
	file *os.File
	raw  syscall.RawConn
	// Of the one read at a time; try is made once, not for each packet.
	try  func(fd uintptr) bool
	b    []byte
	idle func() bool
	n    int
	err  error
}

// offload reports whether the kernel puts virtio-net headers.
func (d *offloadTUN) offload(name string) bool {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return false
	}
	raw, err := d.file.SyscallConn()
	if err != nil {
		return false
	}
	var inner error
	d.raw, d.try = raw, d.tryRead
	err = raw.Control(func(fd uintptr) { inner = unix.IoctlIfreq(int(fd), unix.TUNGETIFF, ifr) })
	return err == nil && inner == nil && ifr.Uint16()&unix.IFF_VNET_HDR != 0
}

// ReadOffload reads a virtio-net header and its packet.
func (d *offloadTUN) ReadOffload(b []byte, idle func() bool) (int, error) {
	d.b, d.idle = b, idle
	failed := d.raw.Read(d.try)
	n, err := d.n, d.err
	if failed != nil || errors.Is(err, syscall.EBADFD) {
		return 0, os.ErrClosed
	}
	if err == nil && n <= guestlink.VirtioHeaderSize {
		return 0, fmt.Errorf("tun device gave %d bytes", n)
	}
	return n, err
}

// tryRead reads and reports whether that is done, or has to wait.
func (d *offloadTUN) tryRead(fd uintptr) bool {
	for {
		d.n, d.err = unix.Read(int(fd), d.b)
		switch {
		case d.err == unix.EINTR, d.err == unix.EAGAIN && d.idle():
			continue
		}
		return d.err != unix.EAGAIN
	}
}

// WriteOffload writes a virtio-net header and its packet.
func (d *offloadTUN) WriteOffload(b []byte) (int, error) {
	n, err := d.file.Write(b)
	if errors.Is(err, syscall.EBADFD) {
		err = os.ErrClosed
	}
	return n, err
}

// LinkUp sets the interface name in the caller's network namespace up. Its
// addresses and routes are the affair of whoever owns that namespace.
func LinkUp(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find interface %s: %w", name, err)
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	return nil
}
