// Attestd attests this machine to the organisation's verifier and keeps the
// credential that the verifier grants.
//
// Synopsis:
//
//	attestd -config FILE -tpm DEVICE -state DEVICE
//
// It enrols with the ticket on the state partition, then attests, renews at
// half life, and answers gate.Client on its unix socket (LISTEN_FDS, or
// -socket). Without a TPM it runs on and says so. It speaks the systemd
// service protocol: READY, STATUS and WATCHDOG.
//
// Exit status: 0 after SIGTERM or SIGINT, 1 if it could not start, 2 for a
// wrong command line.
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

	"golang.org/x/sync/errgroup"

	"sekisho/attest"
	"sekisho/attest/attester"
	"sekisho/attest/internal/service"
	"sekisho/attest/tpm"
)

func main() {
	config := flag.String("config", attest.OrganizationFile, "organisation's configuration `file`")
	device := flag.String("tpm", "/dev/tpmrm0", "TPM `device`, or the unix socket of an emulator")
	state := flag.String("state", "/dev/disk/by-partlabel/sekisho-state", "state partition, a block `device` or file")
	events := flag.String("eventlog", tpm.EventLogFile, "firmware event log `file`")
	runlog := flag.String("events", "", "log `file` of run-time events; it must exist before anything is measured")
	socket := flag.String("socket", "", "unix socket `path` to listen on, if none is passed by LISTEN_FDS")
	client := flag.String("client", "netd", "`user` who, beside root, may use the API socket")
	logon := flag.String("logon", "logind", "`user` who may use keys of the smart card, where the organisation has logon")
	release := flag.String("release", attester.ReleaseFile, "the image's signed policies, `file`; absent: logon keys are bound to the TPM alone, and no networks are kept")
	flag.Usage = func() {
		fmt.Fprintf(flag.CommandLine.Output(), "usage: attestd -config FILE -tpm DEVICE -state DEVICE [flags]\n\nattests this machine and keeps its credential; runs until SIGTERM\n\n")
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "attestd: unexpected argument %q\n", flag.Arg(0))
		os.Exit(2)
	}
	if err := run(*config, *device, *state, *events, *runlog, *socket, *client, *logon, *release); err != nil {
		fmt.Fprintln(os.Stderr, "attestd:", err)
		os.Exit(1)
	}
}

func run(config, device, state, events, runlog, socket, client, logon, release string) error {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	org, err := readConfig(config)
	if err != nil {
		return err
	}
	l, err := service.Listen("unix", socket, "-socket")
	if err != nil {
		return err
	}
	clients, logind := users(log, client), users(log, logon)
	card, err := attester.NewLogon(org, logind, release, state)
	if err != nil {
		return errors.Join(err, l.Close())
	}
	a, err := attester.New(attester.Config{
		Organization: org,
		OpenTPM: func() (attester.Hardware, error) {
			t, err := tpm.Open(device)
			if err != nil {
				return nil, err
			}
			return t, nil
		},
		EventLog: func() ([]byte, error) { return tpm.ReadEventLog(events) },
		RunLog:   attester.OpenRunLog(runlog),
		Model:    attester.Model(os.DirFS("/sys/class/dmi/id")),
		State:    attester.StateFile{Path: state},
		Logon:    card,
		Network:  attester.NewNetwork(clients, release, state),
		Now:      time.Now,
		Log:      log,
	})
	if err != nil {
		return errors.Join(err, l.Close())
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return a.Run(ctx) })
	g.Go(func() error { return a.Serve(ctx, l, append(clients, logind...)) })
	g.Go(func() error { return a.Notify(ctx) })
	return g.Wait()
}

func readConfig(path string) (*attest.Organization, error) {
	data, err := os.ReadFile(path) // measured, as part of the image
	if err != nil {
		return nil, err
	}
	return attest.ParseOrganization(data)
}

// users returns the id of a user who may use the socket; none if there is no
// such user.
func users(log *slog.Logger, name string) []uint32 {
	u, err := user.Lookup(name)
	if err == nil {
		var uid uint64
		if uid, err = strconv.ParseUint(u.Uid, 10, 32); err == nil {
			return []uint32{uint32(uid)}
		}
	}
	log.Warn("a client that may not use the socket", "client", name, "cause", err)
	return nil
}
