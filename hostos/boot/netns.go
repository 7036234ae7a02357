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
	done := make(chan error, 1)
	go func() {
		// The thread keeps the new namespace and ends with this goroutine,
		// because it is never unlocked.
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("new network namespace: %w", err)
			return
		}
		done <- unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
	}()
	return <-done
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
