// Package work is PID 1 of the small Linux that stands in for Windows in the
// work domain: it mounts, loads its few modules, keeps the guest agent running
// and powers off when the power button is pressed. It never brings up a
// network card, because the work domain has none: the agent's TUN device is
// its only way out.
package work

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"time"

	"github.com/u-root/u-root/pkg/kmodule"
	"golang.org/x/sys/unix"
)

// path is where programs look for commands.
const path = "PATH=/bbin:/bin:/usr/bin"

// modules are loaded in this order, dependencies first (modules.dep). What the
// kernel has built in loads as nothing.
var modules = [...]string{"virtio_blk", "vmw_vsock_virtio_transport", "virtio_console", "tun", "button", "evdev"}

// mounts of a plain Linux. /dev/pts is for terminals of the lab's commands.
var mounts = [...]struct {
	source, target, fstype string
	flags                  uintptr
	data                   string
}{
	{"proc", "/proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	{"sysfs", "/sys", "sysfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	{"devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755"},
	{"devpts", "/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=0620,ptmxmode=0666"},
	{"tmpfs", "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755"},
	{"tmpfs", "/tmp", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
}

// Mount mounts what a plain Linux needs: all that can be.
func Mount() error {
	var errs []error
	for _, m := range mounts {
		if err := errors.Join(os.MkdirAll(m.target, 0o755), unix.Mount(m.source, m.target, m.fstype, m.flags, m.data)); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", m.target, err))
		}
	}
	return errors.Join(errs...)
}

// Run is the life of the work domain: it returns when ctx ends or the power
// button is pressed, with every service ended. Faults on the way are logged
// and the rest goes on: a work domain without its agent is offline, not open.
func Run(ctx context.Context, log *slog.Logger) {
	if err := Mount(); err != nil {
		log.Error("cannot mount", "err", err)
	}
	for _, name := range modules {
		if err := kmodule.Probe(name, ""); err != nil {
			log.Error("cannot load module", "module", name, "err", err)
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	button := make(chan struct{})
	go func() { // ends with the machine: a read of an input device has no deadline
		if err := waitPowerKey(inputDir); err != nil {
			log.Error("no power button: the work domain can only be switched off hard", "err", err)
			return
		}
		close(button)
	}()
	go func() {
		select {
		case <-button:
			log.Info("power button pressed")
			cancel()
		case <-ctx.Done():
		}
	}()

	childEnded := make(chan os.Signal, 1)
	signal.Notify(childEnded, unix.SIGCHLD)
	defer signal.Stop(childEnded)
	log.Info("work domain up", "uptime", uptime())
	s := supervisor{log: log, services: services(), childEnded: childEnded, now: time.Now}
	s.run(ctx)
}

// uptime is the time since the kernel started.
func uptime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano()).Round(time.Millisecond)
}

// PowerOff writes out what is cached and switches the machine off. It returns
// only when the kernel refuses.
func PowerOff() error {
	unix.Sync()
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
		return fmt.Errorf("power-off: %w", err)
	}
	return nil
}
