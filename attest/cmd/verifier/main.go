// Verifier is the organisation's attestation server.
//
// Synopsis:
//
//	verifier serve -config FILE
//
// It enrols and attests devices over TLS and issues their short-lived
// certificates; attestctl manages it over its admin socket. It speaks the
// systemd service protocol, and listens on the socket of LISTEN_FDS if one is
// passed. The configuration file is described in docs/attest.md.
//
// Exit status: 0 after SIGTERM or SIGINT, 1 if it could not start or failed, 2
// for a wrong command line.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sync/errgroup"

	"sekisho/attest/fleet"
	"sekisho/attest/internal/service"
)

const usage = "usage: verifier serve -config FILE\n\nenrols and attests devices until SIGTERM; manage it with attestctl\n\n"

func main() {
	flags := flag.NewFlagSet("verifier serve", flag.ExitOnError)
	config := flags.String("config", "/etc/sekisho/verifier.json", "configuration `file`, see docs/attest.md")
	flags.Usage = func() {
		fmt.Fprint(flags.Output(), usage)
		flags.PrintDefaults()
	}
	if len(os.Args) < 2 || os.Args[1] != "serve" {
		flags.Usage()
		if len(os.Args) == 2 && (os.Args[1] == "-h" || os.Args[1] == "--help" || os.Args[1] == "help") {
			os.Exit(0)
		}
		os.Exit(2)
	}
	flags.Parse(os.Args[2:])
	if flags.NArg() > 0 {
		flags.Usage()
		os.Exit(2)
	}
	if err := serve(*config); err != nil {
		fmt.Fprintln(os.Stderr, "verifier:", err)
		os.Exit(1)
	}
}

func serve(path string) (err error) {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	config, err := fleet.ParseServerConfig(data)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	server, err := config.Open(ctx, time.Now, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, server.Close()) }()
	l, err := service.Listen("tcp", config.Listen, "listen in the configuration")
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return fleet.Serve(ctx, l, server.Certificate, server.Service, log) })
	if config.AdminSocket != "" {
		g.Go(func() error { return fleet.ServeAdmin(ctx, config.AdminSocket, server.Service, log) })
	}
	g.Go(func() error { return notify(ctx, l.Addr()) })
	log.Info("serving", "id", config.ID, "address", l.Addr())
	return g.Wait()
}

// notify tells the service manager that we serve and that we live.
func notify(ctx context.Context, addr net.Addr) error {
	watchdog, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		return fmt.Errorf("WATCHDOG_USEC: %w", err)
	}
	if _, err := daemon.SdNotify(false, daemon.SdNotifyReady+"\nSTATUS=serving "+addr.String()); err != nil {
		return fmt.Errorf("NOTIFY_SOCKET: %w", err)
	}
	if watchdog == 0 {
		return nil
	}
	tick := time.NewTicker(watchdog / 2)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			if _, err := daemon.SdNotify(false, daemon.SdNotifyWatchdog); err != nil {
				return fmt.Errorf("NOTIFY_SOCKET: %w", err)
			}
		}
	}
}
