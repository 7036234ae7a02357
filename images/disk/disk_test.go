package disk

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/diskfs/go-diskfs"
	"github.com/diskfs/go-diskfs/disk"

	"sekisho/hostos/update"
)

func TestCreateAndFind(t *testing.T) {
	dir := t.TempDir()
	boot := make([]byte, 9<<20+123)
	rand.Read(boot)
	work := filepath.Join(dir, "work.img")
	workData := make([]byte, 5<<20+7)
	rand.Read(workData[3<<20:])
	if err := os.WriteFile(work, workData, 0o600); err != nil {
		t.Fatal(err)
	}
	img := filepath.Join(dir, "laptop.img")
	if err := Create(img, Layout{Boot: boot, State: true, Factory: work, WorkSize: 8 << 20, Scratch: 3 << 20}); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(img)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []struct {
		name string
		size int64
	}{{ESP, update.ESPSize(update.Cluster, 0)}, {SlotB, update.ESPSize(update.Cluster, 0)}, {State, StateSize}, {Host, 1 << 20}, {Scratch, 3 << 20}, {Work, 8 << 20}, {Factory, 6 << 20}} {
		offset, size, err := Find(img, p.name)
		if err != nil || size != p.size || offset%(1<<20) != 0 {
			t.Errorf("%s: offset %d, size %d, error %v; want size %d", p.name, offset, size, err, p.size)
		}
		if p.name == Factory && !bytes.Equal(data[offset:][:len(workData)], workData) {
			t.Error("the delivered work domain differs from its file")
		}
		if p.name == Work && len(bytes.Trim(data[offset:offset+size], "\x00")) > 0 {
			t.Error("the work partition is not empty")
		}
	}
	if _, _, err := Find(img, "other"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("unknown partition: %v", err)
	}

	d, err := diskfs.Open(img, diskfs.WithOpenMode(diskfs.ReadOnly))
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	places(t, d, data)
	esp, err := d.GetFilesystem(1)
	if err != nil {
		t.Fatal(err)
	}
	got, err := fs.ReadFile(esp, "EFI/BOOT/BOOTX64.EFI")
	if err != nil || !bytes.Equal(got, boot) {
		t.Errorf("boot file: %d bytes, error %v; want the %d written", len(got), err, len(boot))
	}
}

// The file system must please others than the library that made it.
func TestCheckedByDosfstools(t *testing.T) {
	fsck, err := exec.LookPath("fsck.vfat")
	if err != nil {
		t.Skip("dosfstools is not installed")
	}
	for _, small := range []bool{false, true} {
		checkFAT(t, fsck, Layout{Boot: bytes.Repeat([]byte("sekisho!"), 4<<20), Small: small})
	}
}

func checkFAT(t *testing.T, fsck string, l Layout) {
	t.Helper()
	dir := t.TempDir()
	img := filepath.Join(dir, "disk.img")
	if err := Create(img, l); err != nil {
		t.Fatal(err)
	}
	offset, size, err := Find(img, ESP)
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(img)
	if err != nil {
		t.Fatal(err)
	}
	part := filepath.Join(dir, "esp.img")
	if err := os.WriteFile(part, data[offset:offset+size], 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(fsck, "-n", "-v", part).CombinedOutput(); err != nil {
		t.Errorf("fsck.vfat: %v\n%s", err, out)
	}
}

func TestCreateRefuses(t *testing.T) {
	img := filepath.Join(t.TempDir(), "disk.img")
	if err := Create(img, Layout{}); err == nil {
		t.Error("a disk with nothing to boot was made")
	}
	if err := Create(img, Layout{Boot: []byte("MZ"), Factory: "absent"}); err == nil {
		t.Error("a disk with an absent work image was made")
	}
	if _, err := os.Stat(img); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a failed disk left a file: %v", err)
	}
}

// places compares what the laptop reads of its own table with another reader.
func places(t *testing.T, d *disk.Disk, data []byte) {
	t.Helper()
	table, err := d.GetPartitionTable()
	if err != nil {
		t.Fatal(err)
	}
	list := table.GetPartitions()
	for i, want := range list {
		p, err := update.ReadPlace(bytes.NewReader(data), sector, uint32(i+1))
		if err != nil || int64(p.Start)*sector != want.GetStart() || int64(p.Size)*sector != want.GetSize() || p.UUID() != strings.ToLower(want.UUID()) {
			t.Errorf("partition %d: %+v %s, %v; want %s", i+1, p, p.UUID(), err, want.UUID())
		}
	}
	changed := bytes.Clone(data)
	changed[2*sector+40]++
	for number, disk := range map[uint32][]byte{0: data, uint32(len(list) + 1): data, 129: data, 1: changed} {
		if p, err := update.ReadPlace(bytes.NewReader(disk), sector, number); err == nil {
			t.Errorf("partition %d: %+v", number, p)
		}
	}
}
