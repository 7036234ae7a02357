//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/user"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"sekisho/guestlink"
	"sekisho/guestlink/host"
	"sekisho/guestlink/serial"
	"sekisho/guestlink/vsock"
)

// listen opens the one way in: vsock from the guest's context id, or the socket
// of QEMU's virtio-serial port, for QEMU's user. Refused counts the others.
func (o options) listen(log *slog.Logger) (l net.Listener, refused func() uint64, err error) {
	if o.port == "" {
		l, err := vsock.Listen(guestlink.HostCID, guestlink.PortPackets, o.cid)
		if err != nil {
			return nil, nil, err
		}
		return l, l.Refused, nil
	}
	// What a linkd before this one has left; another program's file stays.
	if fi, err := os.Lstat(o.port); err == nil && fi.Mode().Type() == os.ModeSocket {
		if err := os.Remove(o.port); err != nil {
			return nil, nil, fmt.Errorf("serial socket: %w", err)
		}
	} else if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, nil, fmt.Errorf("serial socket: %w", err)
	}
	inner, err := net.Listen("unix", o.port)
	if err != nil {
		return nil, nil, fmt.Errorf("serial socket: %w", err)
	}
	// QEMU's user is another: the folder says who comes here, and allow who stays.
	if err := os.Chmod(o.port, 0o666); err != nil {
		inner.Close()
		return nil, nil, fmt.Errorf("serial socket: %w", err)
	}
	may := append(users(log, o.vmm), 0)
	var count atomic.Uint64
	allow := func(c net.Conn) bool {
		uid, ok := host.PeerUID(c)
		return ok && slices.Contains(may, uid)
	}
	return serial.NewListener(inner, allow, func() { count.Add(1) }), count.Load, nil
}

// users returns the ids that may use the API beside root.
func users(log *slog.Logger, client string) []uint32 {
	u, err := user.Lookup(client)
	if err != nil {
		log.Warn("only root may use the api socket", "error", err)
		return nil
	}
	id, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return nil
	}
	return []uint32{uint32(id)}
}

// watchdog tells the service manager, twice per WATCHDOG_USEC, that linkd runs,
// while it does.
func watchdog(ctx context.Context, alive func() bool, notify func(string)) {
	every, err := daemon.SdWatchdogEnabled(false)
	if err != nil || every == 0 {
		return
	}
	t := time.NewTicker(every / 2)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			if alive() {
				notify(daemon.SdNotifyWatchdog)
			}
		}
	}
}
