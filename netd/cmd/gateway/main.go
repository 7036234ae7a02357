//go:build linux

// Command gateway is the server end of the tunnel: it admits laptops that hold
// a certificate of the verifier and passes their packets to LGWAN.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"sync"
	"syscall"

	"github.com/coreos/go-systemd/v22/daemon"

	"sekisho/netd/gateway"
	"sekisho/netd/internal/api"
)

const usage = `usage: gateway serve -config FILE
       gateway status [-socket PATH] [--json]

serve   Admits laptops with mutual TLS 1.3 (AES-256-GCM, hybrid key agreement),
        on TCP and in QUIC on UDP, and carries their packets by CONNECT-IP (RFC
        9484). Makes the TUN device, its routes and the nftables table
        "sekisho-gateway" by itself; needs CAP_NET_ADMIN, and
        CAP_NET_BIND_SERVICE for a port below 1024. LGWAN's routers must route
        the pool to this machine. The file, in JSON:

          {"listen": "203.0.113.20:443",
           "certificate": "/etc/sekisho/gateway.crt", "key": "/etc/sekisho/gateway.key",
           "client_ca": "/etc/sekisho/verifier-ca.crt",
           "pool": "10.80.0.0/16", "leases": "/var/lib/sekisho-gateway/leases.json",
           "tun": "sekisho0", "lgwan": "lgwan0",
           "mtu": 1400, "dns": ["10.1.0.53"], "max_sessions": 10000,
           "pool6": "fd00:80::/112", "key_agreement": "p256-mlkem768",
           "status": "/run/sekisho-gateway/status.sock"}

        From "mtu" on everything may be absent. pool6 gives laptops IPv6
        addresses too, and LGWAN's routers must route it here as well.
        "revocations" names verifiers to hear of revoked devices from
        (docs/attest.md). key_agreement is the least: p256-mlkem768 or
        p384-mlkem1024.

status  Shows the sessions of the running gateway; --json for programs.

exit status: 0 ended by a signal, or status shown; 1 failure; 2 wrong usage
`

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if len(args) == 0 {
		fmt.Fprint(os.Stderr, usage)
		return 2
	}
	flags := flag.NewFlagSet("gateway "+args[0], flag.ContinueOnError)
	flags.Usage = func() { fmt.Fprint(os.Stderr, usage) }
	config := flags.String("config", "", "configuration file")
	socket := flags.String("socket", gateway.DefaultStatus, "status socket")
	asJSON := flags.Bool("json", false, "print JSON")
	switch err := flags.Parse(args[1:]); {
	case errors.Is(err, flag.ErrHelp), args[0] == "-h", args[0] == "--help", args[0] == "help":
		fmt.Print(usage)
		return 0
	case err != nil || flags.NArg() != 0:
		return 2
	}
	var err error
	switch {
	case args[0] == "serve" && *config != "":
		err = serve(ctx, *config)
	case args[0] == "status":
		var st gateway.Status
		if err = api.Do(ctx, *socket, "GET", "/v1/status", nil, &st); err == nil {
			err = gateway.PrintStatus(os.Stdout, st, *asJSON)
		}
	default:
		fmt.Fprint(os.Stderr, usage)
		return 2
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "gateway:", err)
		return 1
	}
	return 0
}

func serve(ctx context.Context, file string) error {
	config, err := gateway.ReadConfig(file)
	if err != nil {
		return err
	}
	tls, err := config.TLS()
	if err != nil {
		return err
	}
	leases, err := gateway.OpenLeases(config.Leases, config.Pool)
	if err != nil {
		return err
	}
	host, dev, err := gateway.Setup(config)
	if err != nil {
		return err
	}
	defer host.Close()
	tcp, udp, err := config.Sockets()
	if err != nil {
		dev.Close()
		return err
	}
	status, err := api.Listen(config.Status)
	if err != nil {
		dev.Close()
		tcp.Close()
		udp.Close()
		return err
	}
	debug.SetGCPercent(gateway.GCPercent)
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	server := gateway.New(config, tls, leases, dev, log)
	ctx, cancel := context.WithCancel(ctx)
	var parts sync.WaitGroup
	parts.Go(func() { host.Hold(ctx, log) })
	parts.Go(func() {
		if err := api.Serve(ctx, status, api.OwnerOrRoot, func() any { return server.Status() }); ctx.Err() == nil {
			log.Error("status socket failed", "err", err)
		}
	})
	daemon.SdNotify(false, daemon.SdNotifyReady+"\nSTATUS=serving "+config.Listen.String())
	err = server.Serve(ctx, tcp, udp)
	if ctx.Err() != nil {
		err = nil // asked to end
	}
	cancel()
	parts.Wait()
	return err
}
