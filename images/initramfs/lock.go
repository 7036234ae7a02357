package initramfs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// lockCache waits until no other build uses the cache and keeps it until the
// returned function is called. The kernel frees it when the process ends.
func lockCache(dir string) (unlock func() error, err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("cache: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, fmt.Errorf("cache: %w", err)
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX)
		if err == nil {
			return f.Close, nil
		}
		if err != unix.EINTR {
			return nil, errors.Join(fmt.Errorf("cache: lock %s: %w", f.Name(), err), f.Close())
		}
	}
}
