package lab

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"sekisho/images/debian"
)

// OuterQEMU returns the command, to be followed by QEMU's own arguments, that
// starts the QEMU 10 of Debian trixie out of the package cache, with its own
// C library.
//
// The lab does not use bookworm's QEMU 7.2, whose software emulation lacks
// parts of SVM. Of both, attest.FirmwareBIOS tells why the work domain must not
// boot by UEFI there.
func OuterQEMU(ctx context.Context, cache string, progress debian.Progress) ([]string, error) {
	set, err := debian.Fetch(ctx, debian.Config{Cache: cache, Progress: progress}, "qemu-system-x86", "seabios")
	if err != nil {
		return nil, err
	}
	find := func(name string) (string, error) {
		f, err := set.Lookup(name)
		return f.Host, err
	}
	loader, err := find("/lib64/ld-linux-x86-64.so.2")
	if err != nil {
		return nil, err
	}
	qemu, err := find("/usr/bin/qemu-system-x86_64")
	if err != nil {
		return nil, err
	}
	bios, err := find("/usr/share/seabios/bios-256k.bin")
	if err != nil {
		return nil, err
	}
	rom, err := find("/usr/share/qemu/linuxboot_dma.bin")
	if err != nil {
		return nil, err
	}
	files, err := set.Glob("/usr/lib/x86_64-linux-gnu", "*.so*")
	if err != nil {
		return nil, err
	}
	var libs []string
	for _, f := range files {
		libs = append(libs, filepath.Dir(f.Host))
	}
	slices.Sort(libs)
	libs = slices.Compact(libs)
	if len(libs) == 0 {
		return nil, fmt.Errorf("lab: no libraries for qemu in %s; remove it to fetch again: %w", cache, os.ErrNotExist)
	}
	return []string{loader, "--library-path", strings.Join(libs, ":"), qemu,
		"-L", filepath.Dir(rom), "-L", filepath.Dir(bios)}, nil
}
