package boot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"sekisho/hostos/update"
)

// node is a device file that services need.
type node struct {
	path   string
	user   string // owner, empty leaves it root's
	mode   os.FileMode
	needed string // console line when it is missing; empty when its service says so itself
	work   bool   // root's own, for the work domain
}

// nodes lists device files and whose they are. Partitions are under their
// labels; their owners are set on the devices behind the links.
func nodes() []node {
	return []node{
		{path: TPMDevice, user: "attestd", mode: 0o600,
			needed: "no TPM 2.0: stays closed; switch the TPM on in the firmware setup / TPM 2.0 がありません。閉じたままです。ファームウェア設定で TPM を有効にしてください"},
		{path: byPartlabel + "/" + StatePart, user: "attestd", mode: 0o600,
			needed: "no partition sekisho-state: stays closed; install the disk again / パーティション sekisho-state がありません。閉じたままです。ディスクを再インストールしてください"},
		{path: byPartlabel + "/" + WorkPart, mode: 0o600, work: true,
			needed: "no partition sekisho-work: no work domain; install the disk again / パーティション sekisho-work がありません。業務領域は起動しません。ディスクを再インストールしてください"},
		{path: byPartlabel + "/" + HostPart, mode: 0o600, work: true,
			needed: "no partition sekisho-host: no work domain; install the disk again / パーティション sekisho-host がありません。業務領域は起動しません。ディスクを再インストールしてください"},
		{path: "/dev/kvm", user: "vmm", mode: 0o600,
			needed: "no KVM: no work domain; switch virtualisation on in the firmware setup / KVM が使えません。業務領域は起動しません。ファームウェア設定で仮想化支援を有効にしてください"},
		{path: "/dev/vhost-vsock", user: "vmm", mode: 0o600, needed: "no vhost-vsock: no work domain; install the release again / vhost-vsock がありません。業務領域は起動しません。リリースを再インストールしてください"},
		// Who makes a device still needs CAP_NET_ADMIN where it is made.
		{path: "/dev/net/tun", mode: 0o666, needed: "no /dev/net/tun: stays closed; install the release again / /dev/net/tun がありません。閉じたままです。リリースを再インストールしてください"},
	}
}

const (
	// deviceTimeout is how long the boot waits for disks and the TPM to appear.
	deviceTimeout = 5 * time.Second
	// deviceWait is how long init waits between two looks for devices, and
	// lateWait between those after deviceTimeout.
	deviceWait = 50 * time.Millisecond
	lateWait   = 500 * time.Millisecond
)

// devices are the device files that have not appeared yet.
type devices struct {
	missing []node
	find    func()           // makes the links to partitions
	give    func(node) error // hands a device to its owner
}

func newDevices() *devices {
	return &devices{
		missing: nodes(),
		find:    func() { _ = linkPartitions("/sys/class/block", byPartlabel, "/dev") },
		give:    node.give,
	}
}

// await hands over every device as it appears, until none is missing or ctx
// is done, and tells appeared each time.
func (d *devices) await(ctx context.Context, every time.Duration, appeared func(came []node)) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		d.find()
		var came []node
		d.missing = slices.DeleteFunc(d.missing, func(n node) bool {
			if d.give(n) != nil {
				return false
			}
			came = append(came, n)
			return true
		})
		if len(came) > 0 {
			appeared(came)
		}
		if len(d.missing) == 0 {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// forWork reports whether the work domain cannot start without n.
func (n node) forWork() bool { return n.work || n.user == "vmm" }

// give sets owner and mode of n, through links.
func (n node) give() error {
	uid, _ := lookup(n.user)
	if err := os.Chown(n.path, int(uid), int(uid)); err != nil {
		return err
	}
	return os.Chmod(n.path, n.mode)
}

// partitions are the GPT labels that init knows.
func partitions() []string {
	return []string{update.SlotA.Label(), update.SlotB.Label(), StatePart, HostPart, WorkPart, FactoryPart, ScratchPart}
}

// linkPartitions makes links in dir, named by GPT partition label, to the
// devices of the labels that init knows. A label that two partitions have gets
// none: which of them is meant is unknown.
func linkPartitions(sysBlock, dir, dev string) error {
	entries, err := os.ReadDir(sysBlock)
	if err != nil {
		return fmt.Errorf("partitions: %w", err)
	}
	found := map[string][]string{}
	for _, e := range entries {
		label, name := parseUevent(filepath.Join(sysBlock, e.Name(), "uevent"))
		if name != "" && slices.Contains(partitions(), label) {
			found[label] = append(found[label], name)
		}
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("partitions: %w", err)
	}
	var errs []error
	for label, names := range found {
		link := filepath.Join(dir, label)
		if len(names) > 1 {
			os.Remove(link)
			errs = append(errs, fmt.Errorf("partition label %s is on %s: remove all disks but one", label, strings.Join(names, " and ")))
			continue
		}
		target := filepath.Join(dev, names[0])
		if old, err := os.Readlink(link); err == nil && old == target {
			continue
		}
		os.Remove(link)
		if err := os.Symlink(target, link); err != nil {
			errs = append(errs, fmt.Errorf("partitions: %w", err))
		}
	}
	return errors.Join(errs...)
}

// parseUevent returns PARTNAME and DEVNAME of a block device's uevent file.
// The label comes from the disk; the device name from the kernel.
func parseUevent(path string) (label, name string) {
	b, err := os.ReadFile(path)
	if err != nil || len(b) > 4096 {
		return "", ""
	}
	for line := range strings.SplitSeq(string(b), "\n") {
		switch key, value, _ := strings.Cut(line, "="); key {
		case "PARTNAME":
			label = value
		case "DEVNAME":
			name = filepath.Base(value)
		}
	}
	return label, name
}

// bootLog is the firmware's event log, which attestd reads; securityfs gives
// it to root alone.
const bootLog = "/sys/kernel/security/tpm0/binary_bios_measurements"

// shareBootLog lets attestd's group read the event log, if there is one.
func shareBootLog() error {
	gid, _ := lookup("attestd")
	err := errors.Join(os.Chown(bootLog, 0, int(gid)), os.Chmod(bootLog, 0o440))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}
