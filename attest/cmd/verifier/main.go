// Verifier is the organisation's attestation server.
//
// Synopsis:
//
//	verifier serve -config FILE
//	verifier backup -config FILE BACKUP
//	verifier restore -config FILE BACKUP
//	verifier move -config FILE NEW-CONFIG
//
// It enrols and attests devices over TLS and issues their short-lived
// certificates; attestctl manages it over its admin socket. It speaks the
// systemd service protocol, and listens on the socket of LISTEN_FDS if one is
// passed. The configuration file is described in docs/attest.md.
//
// backup writes all records of the store into a file, restore writes them into
// an empty store, and move copies them from one store into another, such as
// from the embedded one into a cluster; the old one is not used any more then.
// No verifier may run on an embedded store meanwhile; attestctl store backup
// does the first with one that runs.
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
	"runtime/debug"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sync/errgroup"
	"k8s.io/klog/v2"

	"sekisho/attest/fleet"
	"sekisho/attest/internal/service"
)

const usage = `usage: verifier serve   -config FILE          enrol and attest devices until SIGTERM; manage it with attestctl
       verifier backup  -config FILE BACKUP   write all records of the store into a file
       verifier restore -config FILE BACKUP   write them into an empty store
       verifier move    -config FILE CONFIG   move them to the store that another configuration names

`

func main() {
	flags := flag.NewFlagSet("verifier", flag.ExitOnError)
	config := flags.String("config", "/etc/sekisho/verifier.json", "configuration `file`, see docs/attest.md")
	flags.Usage = func() {
		fmt.Fprint(flags.Output(), usage)
		flags.PrintDefaults()
	}
	wrong := func(code int) {
		flags.Usage()
		os.Exit(code)
	}
	commands := map[string]func(context.Context, string, string, *slog.Logger) error{"serve": nil, "backup": backup, "restore": restore, "move": move}
	if len(os.Args) < 2 {
		wrong(2)
	}
	command, known := commands[os.Args[1]]
	if !known {
		if len(os.Args) == 2 && (os.Args[1] == "-h" || os.Args[1] == "--help" || os.Args[1] == "help") {
			wrong(0)
		}
		wrong(2)
	}
	flags.Parse(os.Args[2:])
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	klog.SetSlogLogger(log) // Tessera's
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	var err error
	switch {
	case command == nil && flags.NArg() == 0:
		err = serve(ctx, *config, log)
	case command != nil && flags.NArg() == 1:
		err = command(ctx, *config, flags.Arg(0), log)
	default:
		wrong(2)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "verifier:", err)
		os.Exit(1)
	}
}

func serve(ctx context.Context, path string, log *slog.Logger) (err error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	config, err := fleet.ParseServerConfig(data)
	if err != nil {
		return err
	}
	server, err := config.Open(ctx, time.Now, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, server.Close()) }()
	l, err := service.Listen("tcp", config.Listen, "listen in the configuration")
	if err != nil {
		return err
	}
	debug.SetGCPercent(fleet.GCPercent)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return fleet.Serve(ctx, l, server.Certificate, server.Service, log) })
	if config.AdminSocket != "" {
		g.Go(func() error { return fleet.ServeAdmin(ctx, config.AdminSocket, server.Service, log) })
	}
	g.Go(func() error { return fleet.ServeMetrics(ctx, config.Metrics, server.Service, log) })
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
