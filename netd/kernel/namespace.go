//go:build linux

// Package kernel is netd's only netlink, nftables and namespace code. It
// applies a plan.Namespace: the ruleset in one nftables transaction, links,
// addresses and routes by what differs, and reads everything back before it
// says that the kernel holds the plan.
package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/tun"
)

// Current names the network namespace of the calling process.
const Current = "/proc/self/ns/net"

// Namespace is a network namespace that this process may configure. Its
// methods are not safe for concurrent use, but for Watch's channel.
type Namespace struct {
	path string
	fd   netns.NsHandle // none for Current, which takes no CAP_SYS_ADMIN to enter
	link *netlink.Handle
	nft  *nftables.Conn
}

// Open opens the namespace whose file is at path (Current, or a file such as
// /run/netns/inside). Close it.
func Open(path string) (*Namespace, error) {
	n := &Namespace{path: path, fd: netns.None()}
	var options []nftables.ConnOption
	var err error
	if path != Current {
		if n.fd, err = netns.GetFromPath(path); err != nil {
			return nil, fmt.Errorf("network namespace %s: %w", path, err)
		}
		options = append(options, nftables.WithNetNSFd(int(n.fd)))
	}
	if n.link, err = netlink.NewHandleAt(n.fd, unix.NETLINK_ROUTE); err != nil {
		n.Close()
		return nil, fmt.Errorf("network namespace %s: route netlink: %w", path, err)
	}
	if n.nft, err = nftables.New(options...); err != nil {
		n.Close()
		return nil, fmt.Errorf("network namespace %s: nftables: %w", path, err)
	}
	return n, nil
}

// Close releases the namespace's descriptors. What was applied stays.
func (n *Namespace) Close() {
	if n.link != nil {
		n.link.Close()
	}
	if n.fd.IsOpen() {
		n.fd.Close()
	}
}

// do runs f on a thread of its own inside the namespace. The thread ends with
// f, so that no other goroutine can ever run there.
func (n *Namespace) do(f func() error) error {
	if !n.fd.IsOpen() {
		return f()
	}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the runtime ends the thread
		if err := unix.Setns(int(n.fd), unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("enter network namespace %s: %w", n.path, err)
			return
		}
		done <- f()
	}()
	return <-done
}

// CreateTUN makes a TUN device in the namespace. It vanishes when it is closed
// or the process ends. mtu is in bytes.
func (n *Namespace) CreateTUN(name string, mtu int) (dev tun.Device, err error) {
	err = n.do(func() error {
		dev, err = tun.CreateTUN(name, mtu)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("tun device %s: %w", name, err)
	}
	return dev, nil
}

// Create makes an empty network namespace bound to the file at path, as ip(8)
// netns does, if there is none.
func Create(path string) error {
	if n, err := netns.GetFromPath(path); err == nil {
		defer n.Close()
		var st unix.Statfs_t
		if err := unix.Fstatfs(int(n), &st); err != nil {
			return fmt.Errorf("network namespace %s: %w", path, err)
		}
		if st.Type == unix.NSFS_MAGIC {
			return nil
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("network namespace %s: %w", path, err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("network namespace %s: %w", path, err)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY, 0o444)
	if err != nil {
		return fmt.Errorf("network namespace %s: %w", path, err)
	}
	f.Close()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the runtime ends the thread
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		done <- unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
	}()
	if err := <-done; err != nil {
		return fmt.Errorf("make network namespace %s: %w", path, err)
	}
	return nil
}
