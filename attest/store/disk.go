package store

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Reserve is the space in bytes below which nothing more is stored, so that
// what was begun can always be ended: etcd ends its process when it cannot
// write its log, whose files it allocates 64 MiB at a time.
const Reserve = 192 << 20

// FullError says that a disk has no room left.
type FullError struct {
	Path string
	Left uint64 // bytes
}

func (e *FullError) Error() string {
	return fmt.Sprintf("disk of %s has %d MiB left, at least %d are needed: nothing is stored and nobody is admitted; free some space or move it to a larger disk", e.Path, e.Left>>20, Reserve>>20)
}

// room fails with *FullError if the disk of path is nearly full.
func room(path string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if left := st.Bavail * uint64(st.Bsize); left < Reserve {
		return &FullError{path, left}
	}
	return nil
}

// Room fails with *FullError if the disk of path is nearly full.
func Room(path string) error { return room(path) }

func (s *Store) room() error {
	if s.dir == "" {
		return nil
	}
	return room(s.dir)
}

// lockDir takes the directory for this process: etcd itself would wait for
// another one to end.
func lockDir(dir string) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s is in use by another process: %w", dir, err)
	}
	return func() { f.Close() }, nil
}
