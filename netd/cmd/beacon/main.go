//go:build linux

// Command beacon proves to laptops that they are in an office of the
// organisation's: one of it stands in each office LAN.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/coreos/go-systemd/v22/daemon"

	"sekisho/netd/kernel"
	"sekisho/netd/office"
)

const usage = `usage: beacon serve -config FILE

Answers laptops that show a certificate of the verifier's, over mutual TLS 1.3
(AES-256-GCM only), on one interface and only to neighbours on its LAN: no
packet that a router passed on is taken (TTL 255). Laptops then reach the
networks listed over the LAN directly. Needs CAP_NET_RAW where the kernel asks
for it to bind to an interface, and CAP_NET_BIND_SERVICE for a port below 1024.
The file, in JSON:

  {"site": "hq", "interface": "eth0", "listen": "10.20.0.9:8443",
   "certificate": "/etc/sekisho/beacon.crt", "key": "/etc/sekisho/beacon.key",
   "client_ca": "/etc/sekisho/verifier-ca.crt",
   "networks": ["10.20.0.0/16"], "key_agreement": "p256-mlkem768"}

The certificate is of the office CA (organization.json: office.ca), names the
server, and has one URI name, urn:sekisho:site:SITE.
key_agreement may be absent, or p384-mlkem1024.

exit status: 0 ended by a signal; 1 failure; 2 wrong usage
`

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if len(args) > 0 && (args[0] == "-h" || args[0] == "--help" || args[0] == "help") {
		fmt.Print(usage)
		return 0
	}
	flags := flag.NewFlagSet("beacon", flag.ContinueOnError)
	flags.Usage = func() { fmt.Fprint(os.Stderr, usage) }
	file := flags.String("config", "", "configuration file")
	if len(args) == 0 || args[0] != "serve" || flags.Parse(args[1:]) != nil || flags.NArg() != 0 || *file == "" {
		fmt.Fprint(os.Stderr, usage)
		return 2
	}
	if err := serve(ctx, *file); err != nil && !errors.Is(err, context.Canceled) {
		fmt.Fprintln(os.Stderr, "beacon:", err)
		return 1
	}
	return 0
}

func serve(ctx context.Context, file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	data, err := io.ReadAll(io.LimitReader(f, 1<<20))
	f.Close()
	if err != nil {
		return err
	}
	config, err := office.ParseBeaconConfig(data)
	if err != nil {
		return err
	}
	b, err := office.NewBeacon(config, kernel.Neighbour, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	if err != nil {
		return err
	}
	l, err := b.Listen(ctx)
	if err != nil {
		return err
	}
	daemon.SdNotify(false, daemon.SdNotifyReady+"\nSTATUS=serving "+config.Site+" on "+config.Listen.String())
	return b.Serve(ctx, l)
}
