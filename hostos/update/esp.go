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
// in between.
func WriteESP(f io.WriterAt, start, size, cluster int64, boot []byte) error {
	sectors := size / sector
	fatSectors := ((size/cluster+2)*4 + sector - 1) / sector
	data := reservedSectors + 2*fatSectors
	clusters := (sectors - data) / (cluster / sector)
	fileClusters := (int64(len(boot)) + cluster - 1) / cluster
	if clusterFile-2+fileClusters > clusters {
		return fmt.Errorf("esp: %d bytes do not fit %d clusters", len(boot), clusters)
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
	entry(2*c+64, "BOOTX64 EFI", attrArchive, clusterFile, uint32(len(boot)))

	type write struct {
		sector int64
		data   []byte
	}
	none := make([]byte, sector)
	for _, step := range [][]write{
		{{0, none}, {6, none}},
		{{1, info}, {7, info}, {reservedSectors, fat}, {reservedSectors + fatSectors, fat},
			{data, dirs}, {data + (clusterFile-2)*(cluster/sector), boot}},
		{{6, bs}},
		{{0, bs}},
	} {
		for _, w := range step {
			if _, err := f.WriteAt(w.data, w.sector*sector); err != nil {
				return fmt.Errorf("esp: %w", err)
			}
		}
		if s, ok := f.(interface{ Sync() error }); ok {
			if err := s.Sync(); err != nil {
				return fmt.Errorf("esp: %w", err)
			}
		}
	}
	return nil
}
