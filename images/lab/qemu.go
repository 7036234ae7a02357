package lab

import (
	"bytes"
	"context"
	"debug/elf"
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
// parts of SVM; both need mendedQEMU.
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
	if qemu, err = mendedQEMU(cache, qemu); err != nil {
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

// mendedQEMU returns a copy of QEMU in which the software emulation lives
// through a nested guest with UEFI firmware.
//
// When a nested guest writes CR8 while its hypervisor waits for an interrupt
// window, helper_write_crN (target/i386/tcg, 7.0 to 10.0 at least) raises the
// virtual interrupt without the big lock, and tcg_handle_interrupt aborts:
// "assertion failed: (bql_locked())". EDK II's interrupt handler writes CR8 at
// every timer tick, so such a guest lives for seconds. The copy differs in two
// bytes: instead of leaping to the abort, the bit is set atomically. A QEMU
// without these bytes is left as it is.
func mendedQEMU(cache, original string) (string, error) {
	mended := filepath.Join(cache, "lab-qemu", filepath.Base(filepath.Dir(filepath.Dir(filepath.Dir(original)))))
	if exist(mended) {
		return mended, nil
	}
	data, err := os.ReadFile(original)
	if err != nil {
		return "", fmt.Errorf("lab: %w", err)
	}
	at, err := symbolOffset(data, "tcg_handle_interrupt")
	if err != nil {
		return "", fmt.Errorf("lab: %s: %w", original, err)
	}
	if i := abortLeap(data[at:min(at+64, len(data))]); i >= 0 {
		copy(data[at+i:], []byte{0x90, 0xf0}) // nop; lock (prefix of the or that follows)
	}
	return mended, writeFile(mended, data, 0o755)
}

// abortLeap finds "test al, al; je ABORT; or [rbx+x], ebp" and returns the
// place of the je, or -1.
func abortLeap(code []byte) int {
	for i := 0; i+6 <= len(code); i++ {
		if code[i] == 0x84 && code[i+1] == 0xc0 && code[i+2] == 0x74 && code[i+4] == 0x09 && code[i+5] == 0xab {
			return i + 2
		}
	}
	return -1
}

// symbolOffset returns where an exported function's code is in an ELF file.
func symbolOffset(data []byte, name string) (int, error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return 0, err
	}
	symbols, err := f.DynamicSymbols()
	if err != nil {
		return 0, err
	}
	for _, s := range symbols {
		if s.Name != name {
			continue
		}
		for _, p := range f.Progs {
			if p.Type == elf.PT_LOAD && s.Value >= p.Vaddr && s.Value < p.Vaddr+p.Filesz {
				return int(s.Value - p.Vaddr + p.Off), nil
			}
		}
	}
	return 0, fmt.Errorf("no function %s in it", name)
}
