package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"sekisho/images/disk"
)

// Cut takes the laptop's power away, and its TPM's.
func (l *Lab) Cut(ctx context.Context) error {
	for _, name := range []string{"qemu", "swtpm"} {
		p, err := l.find(name)
		if err != nil {
			continue // off already
		}
		if err := p.kill(syscall.SIGKILL); err != nil && p.alive() {
			return err
		}
		if err := p.wait(ctx); err != nil {
			return err
		}
	}
	return nil
}

// Again gives the laptop power once more: the same disk, TPM, variables and
// site as they were left. An image in b takes the place of those in both slots,
// as an attacker would write it; its variables, if it names any, take the place
// of the laptop's.
func (l *Lab) Again(ctx context.Context, b Boot) (Result, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, 10*time.Minute, ErrLate)
	defer cancel()
	r := Result{Image: b.Image.Name}
	fail := func(err error) (Result, error) { r.Reason = err.Error(); return r, err }
	if err := l.Cut(ctx); err != nil {
		return fail(err)
	}
	m := machine{disk: l.lab("laptop.img"), vars: l.lab("vars.fd")}
	if b.Image.Disk != "" {
		for _, slot := range []string{disk.ESP, disk.SlotB} {
			if err := copyPartition(m.disk, slot, b.Image.Disk, disk.ESP); err != nil {
				return fail(err)
			}
		}
	}
	if b.Image.Vars != "" {
		if err := copySparse(m.vars, b.Image.Vars); err != nil {
			return fail(err)
		}
	}
	for _, name := range []string{"hook.sock", "qmp.sock", "tpm.sock"} {
		if err := os.Remove(filepath.Join(runDir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fail(fmt.Errorf("lab: %w", err))
		}
	}
	accel, argv, err := l.power(ctx, m)
	r.Accel = accel
	if err != nil {
		return fail(err)
	}
	if err := l.startQEMU(argv, accel); err != nil {
		return fail(err)
	}
	if b.Stay {
		return r, nil
	}
	if r.Stages, r.Page, err = l.watch(ctx); err != nil {
		return fail(err)
	}
	r.OK = true
	return r, nil
}

// copyPartition copies a partition of a disk image to one of equal size.
func copyPartition(to, partition, from, source string) error {
	at, size, err := disk.Find(from, source)
	if err != nil {
		return err
	}
	place, room, err := disk.Find(to, partition)
	if err != nil {
		return err
	}
	if room != size {
		return fmt.Errorf("lab: partition %s of %d bytes, room for %d", partition, size, room)
	}
	src, err := os.Open(from)
	if err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	_, err = io.Copy(io.NewOffsetWriter(dst, place), io.NewSectionReader(src, at, size))
	if err = errors.Join(err, dst.Close()); err != nil {
		return fmt.Errorf("lab: copy partition %s: %w", partition, err)
	}
	return nil
}
