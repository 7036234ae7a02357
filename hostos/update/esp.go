// Package update finds out when the running image of the host domain is good,
// after which no older one may open the disk, and writes an image to an EFI
// system partition so that a power cut leaves a whole file system or none.
package update

import (
	"encoding/binary"
	"fmt"
	"io"
)

const (
	mib    = 1 << 20
	sector = 512
)

// FAT32 geometry. Clusters of 4 KiB keep the FAT short: firmware walks it entry
// by entry to read the boot file, and does so slowly under emulation. A disk
// that is small before all has clusters of one sector.
const (
	Cluster      = 4096
	SmallCluster = sector

	reservedSectors = 32
	fatEnd          = 0x0fffffff // last cluster of a chain
	attrDirectory   = 0x10
	attrArchive     = 0x20
	attrVolume      = 0x08

	clusterRoot, clusterEFI, clusterBOOT, clusterFile = 2, 3, 4, 5

	// leastClusters makes it FAT32: with fewer, drivers take the file system
	// for FAT16 (Microsoft FAT32 specification 1.03, "FAT Type
	// Determination").
	leastClusters = 65525
)

// ESPSize is the size in bytes of a file system with that much in files.
func ESPSize(cluster, files int64) int64 {
	return (max(leastClusters*cluster, files+files/cluster*8) + 6*mib + mib - 1) / mib * mib
}

// WriteESP makes a FAT32 file system (Microsoft FAT32 specification 1.03) of
// size bytes on f, a partition that begins start bytes into its disk. Its only
// file is EFI/BOOT/BOOTX64.EFI, which firmware starts on a disk without boot
// entries (UEFI specification 2.10, section 3.5.1.1). go-diskfs's writer is
// not used for it: fsck.vfat finds a fault in its directories. Equal input
// gives an equal file system; times are FAT's epoch.
//
// The boot sectors go first and come back last, so that after a power cut
// there is a whole file system or none. If f has a Sync method, it is called
// in between. Before they come back check, if not nil, may read the file as it
// is on f, and its error leaves f without a file system.
func WriteESP(f interface {
	io.WriterAt
	io.ReaderAt
}, start, size, cluster int64, boot io.Reader, length int64, check func(boot io.ReaderAt) error) error {
	sectors := size / sector
	fatSectors := ((size/cluster+2)*4 + sector - 1) / sector
	data := reservedSectors + 2*fatSectors
	clusters := (sectors - data) / (cluster / sector)
	fileClusters := (length + cluster - 1) / cluster
	if clusterFile-2+fileClusters > clusters {
		return fmt.Errorf("esp: %d bytes do not fit %d clusters", length, clusters)
	}
	le := binary.LittleEndian

	bs := make([]byte, sector)
	copy(bs, "\xeb\x58\x90SEKISHO ")
	le.PutUint16(bs[11:], sector)
	bs[13] = byte(cluster / sector)
	le.PutUint16(bs[14:], reservedSectors)
	bs[16] = 2 // FATs
	bs[21] = 0xf8
	le.PutUint16(bs[24:], 63) // geometry, which nobody uses
	le.PutUint16(bs[26:], 255)
	le.PutUint32(bs[28:], uint32(start/sector))
	le.PutUint32(bs[32:], uint32(sectors))
	le.PutUint32(bs[36:], uint32(fatSectors))
	le.PutUint32(bs[44:], clusterRoot)
	le.PutUint16(bs[48:], 1) // FSInfo
	le.PutUint16(bs[50:], 6) // copy of the boot sector
	bs[64], bs[66] = 0x80, 0x29
	copy(bs[71:], "SEKISHO    FAT32   ")
	bs[510], bs[511] = 0x55, 0xaa

	info := make([]byte, sector)
	copy(info, "RRaA")
	copy(info[484:], "rrAa")
	le.PutUint32(info[488:], uint32(clusters-(clusterFile-2)-fileClusters))
	le.PutUint32(info[492:], uint32(clusterFile+fileClusters))
	info[510], info[511] = 0x55, 0xaa

	fat := make([]byte, fatSectors*sector) // what is free is zero
	for i, v := range []uint32{0x0ffffff8, fatEnd, fatEnd, fatEnd, fatEnd} {
		le.PutUint32(fat[i*4:], v)
	}
	for i := range fileClusters {
		next := uint32(clusterFile + i + 1)
		if i == fileClusters-1 {
			next = fatEnd
		}
		le.PutUint32(fat[(clusterFile+i)*4:], next)
	}

	dirs := make([]byte, 3*cluster)
	entry := func(at int, name string, attr byte, first, size uint32) {
		e := dirs[at : at+32]
		copy(e, name)
		e[11] = attr
		le.PutUint16(e[16:], 0x21) // 1 January 1980, also below
		le.PutUint16(e[18:], 0x21)
		le.PutUint16(e[20:], uint16(first>>16))
		le.PutUint16(e[24:], 0x21)
		le.PutUint16(e[26:], uint16(first))
		le.PutUint32(e[28:], size)
	}
	c := int(cluster)
	entry(0, "SEKISHO    ", attrVolume, 0, 0)
	entry(32, "EFI        ", attrDirectory, clusterEFI, 0)
	entry(c, ".          ", attrDirectory, clusterEFI, 0)
	entry(c+32, "..         ", attrDirectory, 0, 0) // the root is 0 here
	entry(c+64, "BOOT       ", attrDirectory, clusterBOOT, 0)
	entry(2*c, ".          ", attrDirectory, clusterBOOT, 0)
	entry(2*c+32, "..         ", attrDirectory, clusterEFI, 0)
	entry(2*c+64, "BOOTX64 EFI", attrArchive, clusterFile, uint32(length))

	type write struct {
		sector int64
		data   []byte
	}
	step := func(writes ...write) error {
		for _, w := range writes {
			if _, err := f.WriteAt(w.data, w.sector*sector); err != nil {
				return err
			}
		}
		if s, ok := f.(interface{ Sync() error }); ok {
			return s.Sync()
		}
		return nil
	}
	place := (data + (clusterFile-2)*(cluster/sector)) * sector
	content := func() error {
		n, err := io.Copy(io.NewOffsetWriter(f, place), io.LimitReader(boot, length))
		if err == nil && n != length {
			err = fmt.Errorf("%d bytes of %d: %w", n, length, io.ErrUnexpectedEOF)
		}
		return err
	}
	none := make([]byte, sector)
	for _, do := range []func() error{
		func() error { return step(write{0, none}, write{6, none}) },
		content,
		func() error {
			return step(write{1, info}, write{7, info}, write{reservedSectors, fat}, write{reservedSectors + fatSectors, fat}, write{data, dirs})
		},
		func() error {
			if check == nil {
				return nil
			}
			return check(io.NewSectionReader(f, place, length))
		},
		func() error { return step(write{6, bs}) },
		func() error { return step(write{0, bs}) },
	} {
		if err := do(); err != nil {
			return fmt.Errorf("esp: %w", err)
		}
	}
	return nil
}
