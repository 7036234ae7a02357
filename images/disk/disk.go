// Package disk writes and reads the GPT disk images of the virtual lab: the
// laptop's disk and, inside it, the work domain's.
package disk

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/diskfs/go-diskfs"
	"github.com/diskfs/go-diskfs/partition/gpt"

	volume "sekisho/hostos/disk"
	"sekisho/hostos/store"
	"sekisho/hostos/update"
)

// Names of the laptop's partitions; udev-like links appear under
// /dev/disk/by-partlabel (docs/host-domain.md, "Storage on the laptop").
const (
	ESP   = "esp-a" // slot A
	SlotB = "esp-b" // of the laptop alone, empty until the first update
	State = "sekisho-state"
	Host  = "sekisho-host"
	Work  = "sekisho-work"
	// Factory is the work domain as it is delivered, in the clear; the laptop
	// copies it to Work at its first boot.
	Factory = "sekisho-factory"
	// Scratch takes what an ephemeral work domain writes.
	Scratch = "sekisho-scratch"
)

const (
	mib    = 1 << 20
	sector = 512

	// StateSize is the size of the state partition in bytes.
	StateSize = mib

	// maxDisk bounds an image in bytes; it is sparse, so this is no promise of
	// space.
	maxDisk = 1 << 40
)

// Layout is the content of a disk image. Zero parts are left out.
type Layout struct {
	Boot  []byte // EFI program, placed as EFI/BOOT/BOOTX64.EFI
	State bool   // with the partitions SlotB, State and Host
	// Factory is the file whose content becomes the partition of that name.
	// The partition Work is made with it, empty, with room for it and for the
	// header of its encryption.
	Factory string
	// WorkSize is the least size of the partition Work in bytes.
	WorkSize int64
	Scratch  int64 // size of the partition Scratch in bytes
	Small    bool  // the file system as small as FAT32 can be
	// BIOS, if not nil, makes the disk bootable by a legacy BIOS too.
	BIOS *BIOS
}

// Create writes a disk image to name, sparse, and replaces what was there only
// when it is complete.
func Create(name string, l Layout) (err error) {
	if len(l.Boot) == 0 {
		return errors.New("disk: nothing to boot")
	}
	workSize, factorySize := l.WorkSize, int64(0)
	if l.Factory != "" {
		st, err := os.Stat(l.Factory)
		if err != nil {
			return fmt.Errorf("disk: %w", err)
		}
		factorySize = st.Size()
		workSize = max(workSize, factorySize+volume.HeaderSize)
	}
	table := &gpt.Table{LogicalSectorSize: sector, PhysicalSectorSize: sector, ProtectiveMBR: true}
	next := int64(mib)
	add := func(label string, kind gpt.Type, size int64) {
		size = roundUp(size)
		table.Partitions = append(table.Partitions, &gpt.Partition{
			Index: len(table.Partitions) + 1, Name: label, Type: kind,
			Start: uint64(next / sector), End: uint64((next+size)/sector) - 1, Size: uint64(size),
		})
		next += size
	}
	cluster := int64(update.Cluster)
	if l.Small {
		cluster = update.SmallCluster
	}
	esp := update.ESPSize(cluster, int64(len(l.Boot)+l.BIOS.size()))
	add(ESP, gpt.EFISystemPartition, esp)
	if l.BIOS != nil {
		table.Partitions[0].Attributes = legacyBootable
	}
	if l.State {
		add(SlotB, gpt.EFISystemPartition, esp)
		add(State, gpt.LinuxFilesystem, StateSize)
		add(Host, gpt.LinuxFilesystem, store.Size)
	}
	if l.Scratch > 0 {
		add(Scratch, gpt.LinuxFilesystem, l.Scratch)
	}
	if workSize > 0 {
		add(Work, gpt.LinuxFilesystem, workSize)
	}
	factory := next
	if factorySize > 0 {
		add(Factory, gpt.LinuxFilesystem, factorySize)
	}
	total := next + mib // the second table
	if total > maxDisk {
		return fmt.Errorf("disk: %d bytes, at most %d", total, int64(maxDisk))
	}

	f, err := os.CreateTemp(filepath.Dir(name), ".disk-*")
	if err != nil {
		return fmt.Errorf("disk: %w", err)
	}
	defer func() {
		err = errors.Join(err, f.Close())
		if err == nil {
			err = os.Rename(f.Name(), name)
		}
		if err != nil {
			os.Remove(f.Name())
			err = fmt.Errorf("disk: %s: %w", name, err)
		}
	}()
	if err := f.Truncate(total); err != nil {
		return err
	}
	if err := table.Write(f, total); err != nil {
		return err
	}
	slot := struct {
		io.WriterAt
		io.ReaderAt
	}{io.NewOffsetWriter(f, mib), io.NewSectionReader(f, mib, esp)}
	if err := update.WriteESP(slot, mib, esp, cluster, bytes.NewReader(l.Boot), int64(len(l.Boot)), nil); err != nil {
		return err
	}
	if l.BIOS != nil {
		if err := l.BIOS.install(f, mib); err != nil {
			return err
		}
	}
	if l.Factory != "" {
		if err := copySparse(f, factory, l.Factory); err != nil {
			return err
		}
	}
	return f.Chmod(0o600)
}

// copySparse copies a file to an offset in f and leaves holes where it is zero.
func copySparse(f *os.File, offset int64, name string) error {
	src, err := os.Open(name)
	if err != nil {
		return err
	}
	defer src.Close()
	buf, zero := make([]byte, mib), make([]byte, mib)
	for {
		n, err := io.ReadFull(src, buf)
		if n > 0 && string(buf[:n]) != string(zero[:n]) {
			if _, err := f.WriteAt(buf[:n], offset); err != nil {
				return err
			}
		}
		offset += int64(n)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// Find returns where a partition lies in a disk image, in bytes. An image
// without such a partition gives an error that is fs.ErrNotExist.
func Find(name, partition string) (offset, size int64, err error) {
	d, err := diskfs.Open(name, diskfs.WithOpenMode(diskfs.ReadOnly), diskfs.WithSectorSize(diskfs.SectorSize512))
	if err != nil {
		return 0, 0, fmt.Errorf("disk: %w", err)
	}
	defer d.Close()
	t, err := d.GetPartitionTable()
	if err != nil {
		return 0, 0, fmt.Errorf("disk: %s: %w", name, err)
	}
	for _, p := range t.GetPartitions() {
		if p.Label() == partition {
			return p.GetStart(), p.GetSize(), nil
		}
	}
	return 0, 0, fmt.Errorf("disk: %s: partition %q: %w", name, partition, fs.ErrNotExist)
}

func roundUp(n int64) int64 { return (n + mib - 1) / mib * mib }
