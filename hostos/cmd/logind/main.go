// Logind is the laptop's smart card: it answers the work domain's card reader,
// asks for the finger, and lets attestd use the card's key when the gate is
// open.
//
// Synopsis:
//
//	logind run                       the daemon
//	logind status                    how things stand
//	logind setup -user U [-name N]   a new key for a user; prints the certificate request
//	logind request                   the certificate request again
//	logind import < chain.pem        takes the certificate
//	logind pin < pin                 sets the PIN, gives back all tries
//	logind enrol -finger F           takes a finger, such as right-index-finger
//	logind delete -finger F          deletes one
//	logind pin-only -minutes N       lets the PIN stand alone; 0 ends that
//
// Exit status: 0 done, 1 failed, 2 wrong command line.
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

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sync/errgroup"

	"sekisho/attest"
	"sekisho/attest/approval"
	"sekisho/attest/gate"
	"sekisho/hostos/login"
	"sekisho/hostos/login/fprint"
)

const usage = `usage: logind run [flags] | status | setup | request | import | pin | enrol | delete | pin-only

The laptop as the smart card of its work domain. run is the daemon; the others
ask it over its socket, as root. setup, then import, pin and enrol issue a card.

`

func main() {
	flag.Usage = func() { fmt.Fprint(flag.CommandLine.Output(), usage) }
	flag.Parse()
	var err error
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	switch name := flag.Arg(0); name {
	case "":
		flag.Usage()
		os.Exit(2)
	case "run":
		err = run(ctx, flag.Args()[1:])
	default:
		err = login.Ask(ctx, flag.Args(), os.Stdin, os.Stdout)
	}
	if errors.Is(err, login.ErrUsage) {
		fmt.Fprintln(os.Stderr, "logind:", err)
		os.Exit(2)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "logind:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	f := flag.NewFlagSet("run", flag.ExitOnError)
	config := f.String("config", attest.OrganizationFile, "organisation's configuration `file`")
	attestd := f.String("attestd", "/run/sekisho/attestd.sock", "attestd's `socket`")
	socket := f.String("socket", login.Socket, "unix socket `path` to listen on, if none is passed by LISTEN_FDS")
	dir := f.String("dir", "/run/sekisho/login", "`directory` of the card's socket and of fprintd")
	vmm := f.Uint("vmm", 0, "user `id` of the QEMU that may connect to the card's socket")
	if err := f.Parse(args); err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	data, err := os.ReadFile(*config)
	if err != nil {
		return err
	}
	org, err := attest.ParseOrganization(data)
	if err != nil {
		return err
	}
	if org.Logon == nil {
		return errors.New("the organisation has no logon")
	}
	var approvers *approval.Approvers
	if org.Logon.Approvers != "" {
		if approvers, err = approval.ParseApprovers([]byte(org.Logon.Approvers), 2); err != nil {
			return err
		}
	}
	api, err := listen(*socket)
	if err != nil {
		return err
	}
	card, err := login.ListenCard(*dir)
	if err != nil {
		return errors.Join(err, api.Close())
	}
	// The TPM may take its time; until then the card is not in the reader.
	notify := func(s string) { _, _ = daemon.SdNotify(false, s) }
	notify("READY=1")
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return login.KeepAlive(ctx, notify) })
	client := gate.NewClient(*attestd)
	e, err := login.NewWhenReady(ctx, login.Config{Policy: *org.Logon, Approvers: approvers, Agency: org.Name, Attestd: client, Disk: client, Now: time.Now, Log: log})
	if err != nil {
		return errors.Join(err, api.Close(), card.Close())
	}
	g.Go(func() error { return e.Run(ctx) })
	g.Go(func() error { return e.Serve(ctx, api) })
	g.Go(func() error { return e.ServeCard(ctx, card, uint32(*vmm)) })
	g.Go(func() error { return e.Notify(ctx, notify) })
	g.Go(func() error { return e.Report(ctx, client) })
	if org.Logon.Finger {
		g.Go(func() error { return e.RunReader(ctx, fprint.Config{Dir: *dir + "/fprint", Env: readerEnv(*dir)}) })
	}
	return g.Wait()
}

func listen(socket string) (net.Listener, error) {
	ls, err := activation.Listeners()
	if err != nil {
		return nil, fmt.Errorf("LISTEN_FDS: %w", err)
	}
	if len(ls) == 1 && ls[0] != nil {
		return ls[0], nil
	}
	if len(ls) > 0 {
		return nil, fmt.Errorf("LISTEN_FDS: %d sockets, want 1 that listens", len(ls))
	}
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	return net.Listen("unix", socket)
}
