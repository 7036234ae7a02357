package disk

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// BIOS makes a disk bootable by a legacy BIOS too, beside its EFI boot file:
// SYSLINUX in the ESP starts the kernel.
type BIOS struct {
	Kernel  []byte // bzImage
	Initrd  []byte
	Cmdline string
}

// gptMBR is SYSLINUX's boot record: it starts the partition that is marked
// legacy BIOS bootable. From package syslinux-common.
const gptMBR = "/usr/lib/syslinux/mbr/gptmbr.bin"

// legacyBootable is attribute bit 2 of a GPT entry (UEFI specification 2.10,
// table 5.8).
const legacyBootable = 1 << 2

// mbrCode is the size of the boot code in a master boot record in bytes.
const mbrCode = 440

// size in bytes of all that b puts into the ESP.
func (b *BIOS) size() int {
	if b == nil {
		return 0
	}
	return len(b.Kernel) + len(b.Initrd) + 1<<20 // and SYSLINUX
}

// install writes SYSLINUX and its files to the ESP at offset of the image f,
// by the programs of packages syslinux and mtools.
func (b *BIOS) install(f *os.File, offset int64) error {
	code, err := os.ReadFile(gptMBR)
	if err != nil {
		return fmt.Errorf("bios boot record: %w; install syslinux-common", err)
	}
	if len(code) > mbrCode {
		return fmt.Errorf("bios boot record %s: %d bytes, at most %d", gptMBR, len(code), mbrCode)
	}
	if _, err := f.WriteAt(code, 0); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "bios-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	config := "DEFAULT work\nPROMPT 0\nLABEL work\n LINUX linux\n INITRD initrd\n APPEND " + b.Cmdline + "\n"
	for name, data := range map[string][]byte{"linux": b.Kernel, "initrd": b.Initrd, "syslinux.cfg": []byte(config)} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			return err
		}
	}
	image := fmt.Sprintf("%s@@%d", f.Name(), offset)
	for _, argv := range [][]string{
		{"mcopy", "-i", image, filepath.Join(dir, "linux"), filepath.Join(dir, "initrd"), filepath.Join(dir, "syslinux.cfg"), "::"},
		{"syslinux", "--offset", fmt.Sprint(offset), "--install", f.Name()},
	} {
		if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", argv[0], err, bytes.TrimSpace(out))
		}
	}
	return nil
}
