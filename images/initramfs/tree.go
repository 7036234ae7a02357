package initramfs

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"

	"github.com/klauspost/compress/zstd"
	"github.com/u-root/mkuimage/cpio"
)

// origin says what vouches for a file.
type origin struct {
	pkg, version string
}

// node is one entry of a root filesystem. Every node belongs to root.
type node struct {
	mode         fs.FileMode
	data         []byte // content of a file, unless host is set
	host         string // file of this machine with the content
	link         string // target of a symbolic link
	major, minor uint64 // of a device
	origin
}

// tree is a root filesystem by absolute path.
type tree map[string]node

// add puts a node at an absolute path and makes the directories above it. A
// path can be given once: two owners of one path is a mistake in a Spec.
func (t tree) add(p string, n node) error {
	if !path.IsAbs(p) || path.Clean(p) != p || p == "/" {
		return fmt.Errorf("root filesystem: path %q: want a clean absolute path", p)
	}
	if _, ok := t[p]; ok {
		return fmt.Errorf("root filesystem: %s is given twice", p)
	}
	for dir := path.Dir(p); dir != "/"; dir = path.Dir(dir) {
		if above, ok := t[dir]; !ok {
			t[dir] = node{mode: fs.ModeDir | 0o755, origin: n.origin}
		} else if !above.mode.IsDir() {
			return fmt.Errorf("root filesystem: %s lies below %s, which is not a directory", p, dir)
		}
	}
	t[p] = n
	return nil
}

// open returns the content of a regular file.
func (n node) open() (*io.SectionReader, io.Closer, error) {
	if n.host == "" {
		return io.NewSectionReader(bytes.NewReader(n.data), 0, int64(len(n.data))), io.NopCloser(nil), nil
	}
	f, err := os.Open(n.host)
	if err != nil {
		return nil, nil, err
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return io.NewSectionReader(f, 0, info.Size()), f, nil
}

// pack writes t as a newc cpio archive compressed with zstd, and lists what it
// holds. The result depends on t alone: entries are ordered by path, numbered
// in that order and carry no time (cpio format: the kernel's
// Documentation/driver-api/early-userspace/buffer-format.rst).
func (t tree) pack(out io.Writer, progress func(done, total int64)) (files []File, unpacked int64, err error) {
	// One encoder thread: the output must not depend on how many there are.
	z, err := zstd.NewWriter(out, zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithEncoderConcurrency(1))
	if err != nil {
		return nil, 0, fmt.Errorf("root filesystem: %w", err)
	}
	count := &countWriter{w: z}
	w := cpio.Newc.Writer(count)
	for i, p := range slices.Sorted(maps.Keys(t)) {
		f, err := t[p].write(w, p, uint64(i+1))
		if err != nil {
			return nil, 0, fmt.Errorf("root filesystem: %s: %w", p, err)
		}
		files = append(files, f)
		progress(int64(i+1), int64(len(t)))
	}
	if err := cpio.WriteTrailer(w); err != nil {
		return nil, 0, fmt.Errorf("root filesystem: %w", err)
	}
	if err := z.Close(); err != nil {
		return nil, 0, fmt.Errorf("root filesystem: %w", err)
	}
	return files, count.n, nil
}

// write adds n to the archive and describes it.
func (n node) write(w cpio.RecordWriter, p string, ino uint64) (File, error) {
	f := File{Path: p, Mode: n.mode.String(), Package: n.pkg, Version: n.version}
	info := cpio.Info{Name: p, Ino: ino, NLink: 1, Mode: uint64(n.mode.Perm())}
	if n.mode&fs.ModeSticky != 0 {
		info.Mode |= 0o1000
	}
	switch n.mode.Type() {
	case fs.ModeDir:
		info.Mode |= cpio.S_IFDIR
		return f, w.WriteRecord(cpio.Record{Info: info})
	case fs.ModeDevice | fs.ModeCharDevice:
		info.Mode |= cpio.S_IFCHR
		info.Rmajor, info.Rminor = n.major, n.minor
		return f, w.WriteRecord(cpio.Record{Info: info})
	case fs.ModeSymlink:
		f.Link = n.link
		info.Mode |= cpio.S_IFLNK
		return f, w.WriteRecord(cpio.StaticRecord([]byte(n.link), info))
	case 0:
		info.Mode |= cpio.S_IFREG
	default:
		return f, fmt.Errorf("file type %v is not for an image", n.mode.Type())
	}
	r, c, err := n.open()
	if err != nil {
		return f, err
	}
	defer c.Close()
	h := sha256.New()
	if _, err := io.Copy(h, r); err != nil {
		return f, err
	}
	f.Size, f.SHA256 = r.Size(), hex.EncodeToString(h.Sum(nil))
	info.FileSize = uint64(r.Size())
	return f, w.WriteRecord(cpio.Record{ReaderAt: r, Info: info})
}

// countWriter counts what passes through.
type countWriter struct {
	w io.Writer
	n int64
}

func (c *countWriter) Write(b []byte) (int, error) {
	n, err := c.w.Write(b)
	c.n += int64(n)
	return n, err
}
