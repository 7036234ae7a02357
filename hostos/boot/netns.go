package boot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"
)

// makeNetns makes a network namespace that lasts as long as the file at path.
func makeNetns(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL, 0o444)
	if err != nil {
		return err
	}
	f.Close()
	return onOwnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("new network namespace: %w", err)
		}
		return unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
	})
}

// inNetns calls f on a thread that is in the network namespace at path.
func inNetns(path string, f func() error) error {
	there, err := os.Open(path)
	if err != nil {
		return err
	}
	defer there.Close()
	return onOwnThread(func() error {
		if err := unix.Setns(int(there.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace %s: %w", path, err)
		}
		return f()
	})
}

// onOwnThread calls f, which may change the network namespace of its thread,
// and brings the thread back: it may be the first one, after which /proc names
// the whole process. A thread that cannot come back is never used again.
func onOwnThread(f func() error) error {
	runtime.LockOSThread()
	here, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer here.Close()
	err = f()
	if back := unix.Setns(int(here.Fd()), unix.CLONE_NEWNET); back != nil {
		return fmt.Errorf("return to own network namespace: %w", back)
	}
	runtime.UnlockOSThread()
	return err
}

// noIPv6Autoconfiguration keeps interfaces of the calling thread's namespace,
// present and future, from taking addresses and routes from router
// advertisements (Linux Documentation/networking/ip-sysctl.rst).
func noIPv6Autoconfiguration() error {
	var errs []error
	for _, conf := range []string{"all", "default"} {
		for key, value := range map[string]string{"accept_ra": "0", "autoconf": "0", "addr_gen_mode": "1", "accept_redirects": "0"} {
			path := filepath.Join("/proc/sys/net/ipv6/conf", conf, key)
			err := os.WriteFile(path, []byte(value), 0)
			if err != nil && !errors.Is(err, os.ErrNotExist) { // a kernel without IPv6 has nothing to switch off
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// makeNamespaces makes the namespace inside and quiets IPv6 in both.
func makeNamespaces() error {
	if err := makeNetns(InsideNetns); err != nil {
		return fmt.Errorf("namespace inside: %w", err)
	}
	if err := noIPv6Autoconfiguration(); err != nil {
		return fmt.Errorf("namespace outside: %w", err)
	}
	if err := inNetns(InsideNetns, noIPv6Autoconfiguration); err != nil {
		return fmt.Errorf("namespace inside: %w", err)
	}
	return nil
}
