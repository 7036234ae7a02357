// Package vmm runs the work domain: it makes QEMU's argument vector as a pure
// function and follows the machine over QMP.
package vmm

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Files of Debian's qemu-system-x86 and ovmf packages.
const (
	Binary       = "/usr/bin/qemu-system-x86_64"
	FirmwareCode = "/usr/share/OVMF/OVMF_CODE_4M.fd"
	FirmwareVars = "/usr/share/OVMF/OVMF_VARS_4M.fd" // copied, never written
)

// Accel is what executes the work domain's instructions. The zero value is KVM.
type Accel uint8

// Accelerators. TCG, QEMU's software emulation, is for tests only.
const (
	KVM Accel = 0
	TCG Accel = 1
)

func (a Accel) String() string {
	if a == TCG {
		return "tcg"
	}
	return "kvm"
}

// linkPort is the name by which the guest agent finds its port
// (guestlink/serial.PortName).
const linkPort = "org.sekisho.link"

// Config is what a work domain is made of.
type Config struct {
	MemoryMiB int
	VCPUs     int
	Disk      string // block device or file, raw
	BIOS      bool   // legacy BIOS instead of UEFI; Code and Vars are then unused
	Code      string // UEFI firmware code, read only
	Vars      string // UEFI firmware variables, this machine's own copy
	QMP       string // path of the control socket that QEMU opens
	GuestCID  uint32 // vsock context id, 3 or more
	Link      string // path of linkd's socket for a virtio-serial port; empty: the link is vsock
	Card      string // path of logind's socket for the card in a reader; empty: no reader
	Accel     Accel
}

// Validate reports every fault of c.
func (c Config) Validate() error {
	var errs []error
	if c.MemoryMiB < 64 {
		errs = append(errs, fmt.Errorf("work domain: %d MiB of memory, want at least 64", c.MemoryMiB))
	}
	if c.VCPUs < 1 {
		errs = append(errs, fmt.Errorf("work domain: %d vCPUs, want at least 1", c.VCPUs))
	}
	if c.GuestCID < 3 {
		errs = append(errs, fmt.Errorf("work domain: vsock context id %d, want at least 3 (vsock(7))", c.GuestCID))
	}
	for what, path := range map[string]string{"disk": c.Disk, "firmware code": c.Code, "firmware variables": c.Vars, "control socket": c.QMP} {
		if path == "" && !(c.BIOS && strings.HasPrefix(what, "firmware")) {
			errs = append(errs, fmt.Errorf("work domain: no path of the %s", what))
		}
	}
	return errors.Join(errs...)
}

// Args returns QEMU's arguments for c, without the program's name. There is no
// network device among them and there is no way to ask for one; -nodefaults
// keeps QEMU from adding its own. The console of the work domain is QEMU's
// standard output.
func Args(c Config) []string {
	cpu := "host"
	if c.Accel == TCG {
		cpu = "max"
	}
	args := []string{
		"-name", "work,process=qemu-work",
		"-no-user-config", "-nodefaults",
		"-machine", "q35,accel=" + c.Accel.String() + ",vmport=off",
		"-cpu", cpu,
		"-smp", strconv.Itoa(c.VCPUs),
		"-m", strconv.Itoa(c.MemoryMiB) + "M",
		"-nic", "none",
		"-display", "none",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-blockdev", "driver=raw,node-name=work,cache.direct=on,file.driver=" + fileDriver(c.Disk) +
			",file.aio=threads,file.cache.direct=on,file.filename=" + escape(c.Disk),
		"-device", "virtio-blk-pci,drive=work,bootindex=0",
		"-device", "vhost-vsock-pci,guest-cid=" + strconv.FormatUint(uint64(c.GuestCID), 10),
		"-device", "pvpanic",
		"-chardev", "stdio,id=console,signal=off",
		"-serial", "chardev:console",
		"-qmp", "unix:" + escape(c.QMP) + ",server=on,wait=off",
	}
	if c.Link != "" {
		args = append(args,
			"-device", "virtio-serial-pci",
			"-chardev", "socket,id=link,path="+escape(c.Link)+",reconnect-ms=1000",
			"-device", "virtserialport,chardev=link,name="+linkPort)
	}
	if c.Card != "" {
		args = append(args,
			"-device", "qemu-xhci,id=usb",
			"-chardev", "socket,id=card,path="+escape(c.Card)+",reconnect-ms=1000",
			"-device", "usb-ccid,id=ccid,bus=usb.0",
			"-device", "ccid-card-passthru,chardev=card,bus=ccid.0")
	}
	if !c.BIOS {
		args = append(args,
			"-drive", "if=pflash,unit=0,format=raw,readonly=on,file="+escape(c.Code),
			"-drive", "if=pflash,unit=1,format=raw,file="+escape(c.Vars))
	}
	return args
}

// fileDriver is QEMU's protocol driver for a path: devices are under /dev.
func fileDriver(path string) string {
	if strings.HasPrefix(path, "/dev/") {
		return "host_device"
	}
	return "file"
}

// escape doubles commas, which otherwise begin the next option (qemu(1)).
func escape(path string) string { return strings.ReplaceAll(path, ",", ",,") }
