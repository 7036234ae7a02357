//go:build linux

// Command guestagent is the work domain's end of the guest link: a TUN device
// whose packets go to the host domain over vsock.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/coreos/go-systemd/v22/daemon"

	"sekisho/guestlink"
	"sekisho/guestlink/guest"
	"sekisho/guestlink/packet"
)

const usage = `guestagent: the work domain's way to the network

It creates a TUN device, connects to the host domain (vsock context id %d, port
%d) and sets the device's address, MTU, default route and the name servers to
what the host domain says. It connects again by itself whenever the link ends.

  guestagent -tun sekisho0

It takes the time from the host domain when the clock is off by more than 2 s,
and shuts down or suspends this computer when the host domain asks.

It needs CAP_NET_ADMIN, and CAP_SYS_TIME for the clock. Exit codes: 0 ended by a signal, 1 failed, 2 wrong usage.

`

func main() {
	tun := flag.String("tun", "sekisho0", "`name` of the TUN device to create")
	resolv := flag.String("resolv-conf", "/etc/resolv.conf", "`file` to write the name servers to")
	link := flag.String("transport", "auto", "`way` to the host domain: vsock, serial, or auto: serial where there is the port")
	plain := flag.Bool("plain", false, "one packet per system call, for kernels whose TUN devices know no offload")
	flag.Usage = func() {
		fmt.Fprintf(flag.CommandLine.Output(), usage, guestlink.HostCID, guestlink.PortPackets)
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := run(ctx, log, *tun, *resolv, *link, *plain); err != nil && !errors.Is(err, context.Canceled) {
		log.Error("guestagent ends", "error", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, log *slog.Logger, tun, resolv, link string, plain bool) error {
	dial, err := transport(link)
	if err != nil {
		return err
	}
	open := packet.OpenTUN
	if plain {
		open = packet.OpenPlainTUN
	}
	dev, err := open(tun)
	if err != nil {
		return err
	}
	if err := errors.Join(guest.LongSegments(guest.ProcSys), guest.Yield()); err != nil {
		log.Warn("the link works, but slower", "error", err)
	}
	notify := func(state string) {
		if _, err := daemon.SdNotify(false, state); err != nil {
			log.Warn("notify", "error", err)
		}
	}
	pump := packet.NewGuest(dev, func(c guestlink.Config) error {
		log.Info("config", "address", c.Address, "mtu", c.MTU, "dns", c.DNS)
		return guest.Apply(tun, resolv, c)
	})
	pump.SetTime = guest.SetTime
	pump.Power = func(a guestlink.Action) error {
		log.Info("the host domain asks", "action", a)
		return guest.Power(a)
	}
	agent := &guest.Agent{
		Dial: dial, Pump: pump, Log: log,
		State: func(s string) {
			log.Info("state", "state", s)
			notify("STATUS=" + s)
		},
	}
	notify(daemon.SdNotifyReady)
	return agent.Run(ctx)
}
