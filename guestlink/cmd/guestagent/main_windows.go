// Command guestagent is the work domain's end of the guest link. On Windows it
// is a service: an adapter (Wintun or TAP) whose packets go to the host domain
// over vsock.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"sekisho/guestlink"
	"sekisho/guestlink/guest"
	"sekisho/guestlink/packet"
	"sekisho/guestlink/winsvc"
)

const usage = `guestagent: the work domain's way to the network

It opens a network adapter, connects to the host domain (vsock context id %d,
port %d, by virtio-win's viosock driver) and sets the adapter's address, MTU,
default route and name servers to what the host domain says.

  guestagent.exe install [flags]   as a service that starts before logon
  guestagent.exe start | stop | status [-json] | uninstall
  guestagent.exe [flags]           in this console, for a look

The service writes to the event log, source %s. It needs LocalSystem's rights,
the console an elevated prompt. Its state is on the host domain's status page.
Exit codes: 0 done, or ended by a signal, 1 failed, 2 wrong usage.

`

func main() {
	var o options
	flag.StringVar(&o.device, "device", "wintun", "`kind` of the adapter: wintun, or tap (tap-windows6)")
	flag.StringVar(&o.adapter, "adapter", "Sekisho", "`name` of the adapter; for tap, of an existing one")
	flag.StringVar(&o.link, "transport", "auto", "`way` to the host domain: vsock, serial, or auto: serial where there is the port")
	asJSON := flag.Bool("json", false, "status as JSON")
	flag.Usage = func() {
		fmt.Fprintf(flag.CommandLine.Output(), usage, guestlink.HostCID, guestlink.PortPackets, winsvc.Name)
		flag.PrintDefaults()
	}
	args := os.Args[1:]
	command := ""
	if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		command, args = args[0], args[1:]
	}
	flag.CommandLine.Parse(args)
	if flag.NArg() > 0 || (command != "" && command != winsvc.Argument && !slices.Contains(winsvc.Commands(), command)) {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var err error
	switch command {
	case "":
		err = o.run(ctx, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	case winsvc.Argument:
		err = o.serve()
	default:
		err = winsvc.Run(ctx, winsvc.System{}, command, args, *asJSON, os.Stdout)
	}
	if err != nil && !errors.Is(err, context.Canceled) {
		fmt.Fprintln(os.Stderr, "guestagent:", err)
		os.Exit(1)
	}
}

type options struct{ device, adapter, link string }

// serve runs the agent as the service manager wants it.
func (o options) serve() error {
	events, err := winsvc.OpenLog()
	if err != nil {
		return fmt.Errorf("open event log: %w", err)
	}
	defer events.Close()
	log := slog.New(winsvc.NewHandler(events))
	return winsvc.Serve(func(ctx context.Context) error {
		err := o.run(ctx, log)
		if err != nil && ctx.Err() == nil {
			log.Error("guestagent ends", "error", err)
		}
		return err
	})
}

func (o options) run(ctx context.Context, log *slog.Logger) error {
	dial, err := transport(o.link)
	if err != nil {
		return err
	}
	dev, adapter, apply, err := o.open()
	if err != nil {
		return err
	}
	pump := packet.NewGuest(dev, func(c guestlink.Config) error {
		log.Info("config", "adapter", adapter, "address", c.Address, "mtu", c.MTU, "dns", c.DNS)
		return apply(adapter, c)
	})
	pump.SetTime = guest.SetTime
	pump.Power = func(a guestlink.Action) error {
		log.Info("the host domain asks", "action", a)
		return guest.Power(a)
	}
	agent := &guest.Agent{Dial: dial, Pump: pump, Log: log, State: func(s string) { log.Info("state", "state", s) }}
	return agent.Run(ctx)
}

// open opens the adapter, and says how it is called and set.
func (o options) open() (packet.PacketDevice, string, func(string, guestlink.Config) error, error) {
	switch o.device {
	case "wintun":
		dev, err := packet.OpenTUN(o.adapter)
		return dev, o.adapter, guest.Apply, err
	case "tap":
		dev, name, err := packet.OpenTAP(o.adapter)
		return dev, name, guest.Apply, err
	}
	if dev, ok := testDevice(o.device); ok {
		return dev, o.device, func(string, guestlink.Config) error { return nil }, nil
	}
	return nil, "", nil, fmt.Errorf("device %q: want wintun or tap", o.device)
}
