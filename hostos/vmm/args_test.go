package vmm

import (
	"slices"
	"strings"
	"testing"
)

func testConfig() Config {
	return Config{
		MemoryMiB: 1024, VCPUs: 2, Disk: "/dev/disk/by-partlabel/sekisho-work", Code: FirmwareCode,
		Vars: "/run/sekisho/vmm/vars.fd", QMP: "/run/sekisho/vmm/qmp.sock", GuestCID: 3,
	}
}

// TestArgs holds the whole vector, so that a change of it is seen.
func TestArgs(t *testing.T) {
	want := `-name work,process=qemu-work -no-user-config -nodefaults -machine q35,accel=kvm,vmport=off -cpu host -smp 2 -m 1024M -nic none -display none ` +
		`-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny ` +
		`-blockdev driver=raw,node-name=work,cache.direct=on,file.driver=host_device,file.aio=threads,file.cache.direct=on,file.filename=/dev/disk/by-partlabel/sekisho-work ` +
		`-device virtio-blk-pci,drive=work,bootindex=0 -device vhost-vsock-pci,guest-cid=3 -device pvpanic ` +
		`-chardev stdio,id=console,signal=off -serial chardev:console -qmp unix:/run/sekisho/vmm/qmp.sock,server=on,wait=off`
	uefi := want + ` -drive if=pflash,unit=0,format=raw,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.fd ` +
		`-drive if=pflash,unit=1,format=raw,file=/run/sekisho/vmm/vars.fd`
	c := testConfig()
	if got := strings.Join(Args(c), " "); got != uefi {
		t.Errorf("got\n%s\nwant\n%s", got, uefi)
	}
	c.BIOS, c.Code, c.Vars = true, "", ""
	if got := strings.Join(Args(c), " "); got != want {
		t.Errorf("bios: got\n%s\nwant\n%s", got, want)
	}
	if err := c.Validate(); err != nil {
		t.Errorf("bios: %v", err)
	}
	c.Link = "/run/sekisho/link/serial.sock"
	want += ` -device virtio-serial-pci -chardev socket,id=link,path=/run/sekisho/link/serial.sock,reconnect-ms=1000 ` +
		`-device virtserialport,chardev=link,name=org.sekisho.link`
	if got := strings.Join(Args(c), " "); got != want {
		t.Errorf("serial: got\n%s\nwant\n%s", got, want)
	}
	c.Card = "/run/sekisho/login/card.sock"
	want += ` -device qemu-xhci,id=usb -chardev socket,id=card,path=/run/sekisho/login/card.sock,reconnect-ms=1000 ` +
		`-device usb-ccid,id=ccid,bus=usb.0 -device ccid-card-passthru,chardev=card,bus=ccid.0`
	if got := strings.Join(Args(c), " "); got != want {
		t.Errorf("card: got\n%s\nwant\n%s", got, want)
	}
}

// TestNoNetworkDevice tries every field of Config with a path that asks for a
// network device.
func TestNoNetworkDevice(t *testing.T) {
	const evil = "/x,netdev=n0 -device e1000e,-netdev user"
	configs := []Config{testConfig(), {}, {Disk: evil, Code: evil, Vars: evil, QMP: evil, Link: evil, Card: evil}}
	for _, c := range configs {
		for _, accel := range []Accel{KVM, TCG} {
			c.Accel = accel
			args := Args(c)
			if i := slices.Index(args, "-nic"); i < 0 || args[i+1] != "none" {
				t.Error("-nic none is missing")
			}
			if !slices.Contains(args, "-nodefaults") {
				t.Error("-nodefaults is missing")
			}
			for i, a := range args {
				if a == "-netdev" || a == "-net" || (a == "-nic" && args[i+1] != "none") {
					t.Errorf("%s %s", a, args[i+1])
				}
				if a == "-device" && !slices.Contains([]string{"virtio-blk-pci", "vhost-vsock-pci", "pvpanic", "virtio-serial-pci", "virtserialport", "qemu-xhci", "usb-ccid", "ccid-card-passthru"}, strings.SplitN(args[i+1], ",", 2)[0]) {
					t.Errorf("device %s", args[i+1])
				}
				if strings.Contains(strings.ReplaceAll(a, ",,", ""), ",netdev") {
					t.Errorf("option injected: %s", a)
				}
			}
		}
	}
}

func TestValidate(t *testing.T) {
	if err := testConfig().Validate(); err != nil {
		t.Fatal(err)
	}
	err := Config{GuestCID: 2}.Validate()
	for _, want := range []string{"memory", "vCPUs", "context id 2", "disk", "firmware code", "firmware variables", "control socket"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v lacks %q", err, want)
		}
	}
}
