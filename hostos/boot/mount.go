package boot

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// mountPoint is one file system of the host domain.
type mountPoint struct {
	source, path, fstype string
	flags                uintptr
	options              string
	optional             bool
}

// mountPoints lists what init mounts, in order.
func mountPoints() []mountPoint {
	const safe = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	return []mountPoint{
		{"proc", "/proc", "proc", safe, "", false},
		{"sysfs", "/sys", "sysfs", safe, "", false},
		{"devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=0755", false},
		{"devpts", "/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=0620,ptmxmode=0666", true},
		{"shm", "/dev/shm", "tmpfs", safe, "mode=1777,size=16m", true},
		{"run", "/run", "tmpfs", safe, "mode=0755,size=64m", false},
		{"tmp", "/tmp", "tmpfs", safe, "mode=1777,size=64m", false},
		{"securityfs", "/sys/kernel/security", "securityfs", safe, "", true},
		{"cgroup2", "/sys/fs/cgroup", "cgroup2", safe, "", true},
	}
}

// mountEFIVars is mounted after its module is loaded; read-only but for the
// moments in which hostos/update writes a boot variable.
func mountEFIVars() mountPoint {
	const safe = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	return mountPoint{"efivarfs", "/sys/firmware/efi/efivars", "efivarfs", safe | unix.MS_RDONLY, "", true}
}

// writable makes what is mounted at p writable, or read-only.
func (p mountPoint) writable(yes bool) error {
	flags := p.flags | unix.MS_REMOUNT | unix.MS_RDONLY
	if yes {
		flags &^= unix.MS_RDONLY
	}
	if err := unix.Mount(p.source, p.path, p.fstype, flags, ""); err != nil {
		return fmt.Errorf("mount %s again: %w", p.path, err)
	}
	return nil
}

// mount mounts p. What is already mounted stays.
func (p mountPoint) mount() error {
	if err := os.MkdirAll(p.path, 0o755); err != nil && !p.optional {
		return fmt.Errorf("mount %s: %w", p.path, err)
	}
	err := unix.Mount(p.source, p.path, p.fstype, p.flags, p.options)
	if err != nil && !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("mount %s: %w", p.path, err)
	}
	return nil
}

// sysRq holds which SysRq keys the kernel obeys (Linux
// Documentation/admin-guide/sysrq.rst).
const sysRq = "/proc/sys/kernel/sysrq"

// noSysRq takes from the keyboard and the serial console the keys that kill,
// remount or reset without asking init. A kernel without them has no such file.
func noSysRq(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("SysRq keys off: %w", err)
	}
	_, err = f.WriteString("0")
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("SysRq keys off: %w", err)
	}
	return nil
}

// mountAll mounts every file system and returns the faults of those that are
// optional and of those that are not.
func mountAll() (warnings []error, err error) {
	for _, p := range mountPoints() {
		switch merr := p.mount(); {
		case merr == nil:
		case p.optional:
			warnings = append(warnings, merr)
		default:
			return warnings, merr
		}
	}
	return warnings, nil
}
