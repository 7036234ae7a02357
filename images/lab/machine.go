package lab

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// firmware is OVMF with Secure Boot and SMM, of the package ovmf.
const firmware = "/usr/share/OVMF/OVMF_CODE_4M.secboot.fd"

// machine is what the virtual laptop is made of.
type machine struct {
	accel string // "kvm" or "tcg"
	disk  string // raw image, written to
	vars  string // OVMF variables, written to
	noTPM bool
	clock string // of the real-time clock at power-on; empty: the time
}

// arguments are QEMU's, without the program.
func (m machine) arguments() []string {
	// Nested virtualisation in software needs a processor with SVM; a KVM that
	// nests passes its own on.
	// One emulated processor: with two, each on a thread of its own, the nested
	// guest resets by itself within minutes of steady traffic, and now and then
	// the machine (seen with QEMU 10.0 in most runs of minutes; never with one).
	accel, cpu, smp := "tcg,thread=multi", "EPYC,+svm", "1"
	if m.accel == "kvm" {
		accel, cpu, smp = "kvm", "host", "2"
	}
	sock := func(name string) string { return filepath.Join(runDir, name+".sock") }
	args := []string{
		"-name", "sekisho-lab", "-nodefaults", "-display", "none", "-no-reboot",
		"-accel", accel, "-cpu", cpu, "-machine", "q35,smm=on", "-smp", smp, "-m", "2048",
		"-global", "driver=cfi.pflash01,property=secure,value=on",
		"-drive", "if=pflash,format=raw,unit=0,readonly=on,file=" + firmware,
		"-drive", "if=pflash,format=raw,unit=1,file=" + m.vars,
		"-drive", "if=none,id=disk,format=raw,cache=unsafe,file=" + m.disk,
		// By the bootindex OVMF connects the disk alone; without one it would
		// start its network stack too. Among the disk's boot entries the order
		// of the variable BootOrder holds (edk2 QemuBootOrderLib.c).
		"-device", "virtio-blk-pci,drive=disk,bootindex=0",
		// The firmware must not look for a network boot: what it would send is
		// not the host domain's.
		"-fw_cfg", "name=opt/org.tianocore/IPv4PXESupport,string=n",
		"-fw_cfg", "name=opt/org.tianocore/IPv6PXESupport,string=n",
		"-netdev", "tap,id=uplink,ifname=uplink,script=no,downscript=no",
		"-device", "virtio-net-pci,netdev=uplink,romfile=,mac=" + laptopMAC,
		// What uplinks.go plugs into: an access point's way home, and USB.
		"-netdev", "tap,id=air,ifname=air,script=no,downscript=no",
		"-device", "virtio-net-pci,netdev=air,romfile=,mac=" + airMAC,
		"-device", "qemu-xhci,id=usb",
		"-device", "ne2k_pci,romfile=", // a card for which the image has no driver
		"-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
		"-device", "virtio-serial-pci", "-chardev", "socket,id=lab,server=on,wait=off,path=" + sock("hook"),
		"-device", "virtserialport,chardev=lab,name=org.sekisho.lab",
		"-qmp", "unix:" + sock("qmp") + ",server=on,wait=off",
	}
	if m.clock != "" {
		args = append(args, "-rtc", "base="+m.clock)
	}
	if !m.noTPM {
		args = append(args, "-chardev", "socket,id=tpm,path="+sock("tpm"),
			"-tpmdev", "emulator,id=tpm0,chardev=tpm", "-device", "tpm-crb,tpmdev=tpm0")
	}
	return args
}

// probeTime is how long a guest on a KVM that works may need to answer.
const probeTime = 5 * time.Second

// acceleration decides between KVM and software emulation. /dev/kvm may open
// and still hang every guest, so a guest is asked: 64 KiB of firmware whose
// first instructions, at the reset vector, write 0x10 to the debug exit port.
func acceleration(ctx context.Context, qemu []string, wish, scratch string) (accel, why string, err error) {
	switch wish {
	case "tcg":
		return "tcg", "as asked", nil
	case "kvm", "auto":
	default:
		return "", "", fmt.Errorf("lab: acceleration %q: want auto, kvm or tcg", wish)
	}
	if err := probeKVM(ctx, qemu, scratch); err != nil {
		if wish == "kvm" {
			return "", "", fmt.Errorf("lab: kvm: %w", err)
		}
		return "tcg", err.Error(), nil
	}
	return "kvm", "a guest answered", nil
}

func probeKVM(ctx context.Context, qemu []string, scratch string) error {
	if _, err := os.Stat("/dev/kvm"); err != nil {
		return fmt.Errorf("no /dev/kvm")
	}
	nested := false
	for _, m := range []string{"kvm_amd", "kvm_intel"} {
		b, err := os.ReadFile("/sys/module/" + m + "/parameters/nested")
		nested = nested || err == nil && strings.ContainsAny(string(b), "1Y")
	}
	if !nested {
		return fmt.Errorf("KVM does not nest on this machine")
	}
	rom := make([]byte, 64<<10)
	for i := range rom {
		rom[i] = 0xf4 // hlt
	}
	copy(rom[len(rom)-16:], []byte{0xb0, 0x10, 0xe6, 0xf4, 0xf4}) // mov al, 0x10; out 0xf4, al; hlt
	file := filepath.Join(scratch, "kvm-probe.bin")
	if err := writeFile(file, rom, 0o644); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	c := exec.CommandContext(ctx, qemu[0], append(qemu[1:len(qemu):len(qemu)], "-accel", "kvm", "-machine", "pc", "-m", "16",
		"-nodefaults", "-display", "none", "-no-reboot", "-bios", file, "-device", "isa-debug-exit,iobase=0xf4,iosize=1")...)
	c.WaitDelay = time.Second
	out, err := c.CombinedOutput()
	if ctx.Err() != nil {
		return fmt.Errorf("/dev/kvm opens, but a guest did not answer within %s", probeTime)
	}
	// isa-debug-exit: status (value << 1) | 1.
	if c.ProcessState == nil || c.ProcessState.ExitCode() != 0x10<<1|1 {
		return fmt.Errorf("a guest on /dev/kvm failed: %v: %.200s", err, out)
	}
	return nil
}
