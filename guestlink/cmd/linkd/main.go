//go:build linux

// Command linkd is the host domain's end of the guest link: it creates the TUN
// device through which the work domain's packets come and go, and serves the
// one work domain over vsock.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"os/user"
	"strconv"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"

	"sekisho/guestlink"
	"sekisho/guestlink/host"
	"sekisho/guestlink/packet"
	"sekisho/guestlink/vsock"
)

const usage = `linkd: the host domain's end of the guest link

It creates a TUN device in the network namespace it is started in and carries
packets between it and the work domain over vsock, port %d. Nothing is carried
until PUT /v1/config on the API socket has said which inner address the work
domain has. The API socket comes from the service manager (LISTEN_FDS); state
goes back to it (NOTIFY_SOCKET: "waiting", "linked cid 3").

  linkd -cid 3 -tun work0
  curl --unix-socket /run/sekisho/linkd.sock http://linkd/v1/status

It needs CAP_NET_ADMIN. Exit codes: 0 ended by a signal, 1 failed, 2 wrong usage.

`

func main() {
	cid := flag.Uint("cid", guestlink.WorkCID, "vsock context `id` of the one guest that is let in")
	tun := flag.String("tun", "work0", "`name` of the TUN device to create")
	client := flag.String("client", "netd", "`user` who, beside root, may use the API socket")
	flag.Usage = func() {
		fmt.Fprintf(flag.CommandLine.Output(), usage, guestlink.PortPackets)
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() > 0 || *cid <= guestlink.HostCID || *cid >= 1<<32-1 {
		flag.Usage()
		os.Exit(2)
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := run(ctx, log, uint32(*cid), *tun, *client); err != nil && !errors.Is(err, context.Canceled) {
		log.Error("linkd ends", "error", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, log *slog.Logger, cid uint32, tun, client string) error {
	apis, err := activation.Listeners()
	if err != nil {
		return fmt.Errorf("api socket: %w", err)
	}
	dev, err := packet.OpenTUN(tun)
	if err != nil {
		return err
	}
	if err := packet.LinkUp(tun); err != nil {
		return err
	}
	links, err := vsock.Listen(guestlink.HostCID, guestlink.PortPackets, cid)
	if err != nil {
		return err
	}
	notify := func(state string) {
		if _, err := daemon.SdNotify(false, state); err != nil {
			log.Warn("notify", "error", err)
		}
	}
	s := host.New(dev, cid, users(log, client), links.Refused,
		func(status string) { notify("STATUS=" + status) }, time.Now, log)
	notify(daemon.SdNotifyReady)
	go watchdog(ctx, notify)
	return s.Run(ctx, links, apis...)
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

// watchdog tells the service manager, twice per WATCHDOG_USEC, that linkd runs.
func watchdog(ctx context.Context, notify func(string)) {
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
			notify(daemon.SdNotifyWatchdog)
		}
	}
}
