//go:build linux

// Command netd owns the laptop's network: the uplink, the tunnel and the
// ruleset of both namespaces.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"sekisho/attest"
)

const usage = `usage: netd run [-config FILE] [-attestd SOCKET] [-linkd SOCKET] [-inside FILE] [-socket PATH]
       netd close [-inside FILE]
       netd status [-socket PATH] [--json]
       netd journal [-socket PATH] [--json] [--save FILE]
       netd wifi list | join NAME [--hidden] [--open | --server NAME] | prefer NAME | forget NAME  [--json]
       netd ciphers [-config FILE] [--json]

run      Keeps a lease on every uplink, opens the tunnel over the best while
         attestation is affirming, and passes the work domain's packets through
         it and nowhere else. Works in the calling namespace ("outside") and in
         the one at -inside. Speaks the service protocol (NOTIFY_SOCKET,
         WATCHDOG_USEC, LISTEN_FDS). Needs CAP_NET_ADMIN, CAP_NET_RAW,
         CAP_SYS_ADMIN (setns) and write access to /dev/net/tun.
close    Applies the closed ruleset to both namespaces, makes "inside" if there
         is none, switches IPv6 autoconfiguration off, and reads it all back.
         Exit status 0 means: nothing passes.
status   Shows the state, uplinks, tunnel and office of the running netd, first
         in words, in English and Japanese.
journal  Shows what happened to the network lately: changes of state, uplink,
         MTU, radio, tunnel, office and clock, nothing of what was carried.
         --save writes it to a file for the help desk.
wifi     Lists the Wi-Fi networks in reach and those saved with their order,
         saves one (the passphrase is read from standard input; --open has none,
         --server is for EAP-TLS and names the authentication server), puts one
         before all others, or forgets one. What is saved is kept encrypted
         over power-off; in a boot that may not open it, until power-off only.
ciphers  Lists the algorithms in force under the organisation's configuration.

states: Dark (no usable uplink), Linked (uplink only), Portal (somebody else
answers in place of our servers: sign in), Attesting (waiting for the verifier
or the gateway), Tunnel (open), Office (open, the LAN is proven to be ours)

exit status: 0 done, or ended by a signal; 1 failure; 2 wrong usage
`

var errUsage = errors.New("wrong usage")

// options are the flags of every subcommand.
type options struct {
	config, attestd, linkd, inside, socket, save string
	wpa, networks, times                         string
	json                                         bool
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	code := command(ctx, os.Args[1:])
	stop()
	os.Exit(code)
}

func command(ctx context.Context, args []string) int {
	commands := map[string]func(context.Context, options) error{"run": run, "close": closed, "status": status, "journal": showJournal, "ciphers": ciphers}
	if len(args) == 0 {
		fmt.Fprint(os.Stderr, usage)
		return 2
	}
	if args[0] == "-h" || args[0] == "--help" || args[0] == "help" {
		fmt.Print(usage)
		return 0
	}
	do, ok := commands[args[0]]
	if args[0] == "wifi" { // has words of its own before its flags
		words := args[1:]
		do, ok, args = func(ctx context.Context, o options) error { return wifi(ctx, o, words) }, true, args[:1]
	}
	if !ok {
		fmt.Fprintf(os.Stderr, "netd: unknown command %q\n%s", args[0], usage)
		return 2
	}
	var o options
	flags := flag.NewFlagSet("netd "+args[0], flag.ContinueOnError)
	flags.Usage = func() { fmt.Fprint(os.Stderr, usage) }
	flags.StringVar(&o.config, "config", attest.OrganizationFile, "organisation's configuration")
	flags.StringVar(&o.attestd, "attestd", "/run/sekisho/attestd.sock", "socket of attestd")
	flags.StringVar(&o.linkd, "linkd", "/run/sekisho/linkd.sock", "socket of linkd")
	flags.StringVar(&o.inside, "inside", "/run/netns/inside", "file of the namespace inside")
	flags.StringVar(&o.socket, "socket", "/run/sekisho/netd.sock", "own socket, unless LISTEN_FDS passes it")
	flags.StringVar(&o.save, "save", "", "write the journal to this file")
	flags.StringVar(&o.wpa, "wpa", "", "directory of wpa_supplicant's control sockets; empty: no Wi-Fi, no 802.1X")
	flags.StringVar(&o.times, "time", "/run/sekisho/netd/time", "file of the last signed time")
	flags.StringVar(&o.networks, "networks", "/run/sekisho/netd/networks", "file in memory of what gets the laptop into networks, for a netd that is started anew")
	flags.BoolVar(&o.json, "json", false, "print JSON")
	switch err := flags.Parse(args[1:]); {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil || flags.NArg() != 0:
		return 2
	}
	if err := do(ctx, o); errors.Is(err, errUsage) {
		fmt.Fprint(os.Stderr, usage)
		return 2
	} else if err != nil {
		fmt.Fprintln(os.Stderr, "netd:", err)
		return 1
	}
	return 0
}

// organization reads the configuration file.
func organization(path string) (*attest.Organization, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, 1<<20)) // ParseOrganization has the exact limit
	if err != nil {
		return nil, err
	}
	return attest.ParseOrganization(data)
}
