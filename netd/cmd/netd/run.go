//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"sync"

	notify "github.com/coreos/go-systemd/v22/daemon"

	"sekisho/attest/gate"
	"sekisho/guestlink"
	"sekisho/netd"
	"sekisho/netd/daemon"
	"sekisho/netd/internal/api"
	"sekisho/netd/kernel"
	"sekisho/netd/plan"
	"sekisho/netd/tunnel"
	"sekisho/netd/tunnel/connectip"
)

// run is "netd run".
func run(ctx context.Context, o options) error {
	org, err := organization(o.config)
	if err != nil {
		return err
	}
	outside, inside, err := open(o.inside)
	if err != nil {
		return err
	}
	defer outside.Close()
	defer inside.Close()
	// What a killed predecessor left open is closed before anything else.
	if err := apply(outside, inside); err != nil {
		return err
	}
	dev, err := inside.CreateTUN(netd.TunnelLink, connectip.DefaultMTU)
	if err != nil {
		return err
	}
	socket, err := api.Listen(o.socket)
	if err != nil {
		dev.Close()
		return err
	}
	watchdog, err := notify.SdWatchdogEnabled(false)
	if err != nil {
		dev.Close()
		return fmt.Errorf("watchdog: %w", err)
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	driver := connectip.New(tunnel.NewDevice(dev))
	d := daemon.New(daemon.Config{
		Organization: org, Outside: outside, Inside: inside, Driver: driver,
		Attestation: gate.NewClient(o.attestd),
		Configure:   func(ctx context.Context, c guestlink.Config) error { return configure(ctx, o.linkd, c) },
		Notify:      func(s string) { notify.SdNotify(false, s) },
		Watchdog:    watchdog > 0,
		Unserved:    func() []netd.Unserved { return kernel.Unserved(os.DirFS("/sys")) },
		Log:         log,
	})
	stopped := ctx
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var parts sync.WaitGroup
	parts.Go(func() { cancel(driver.Run(ctx)) })
	parts.Go(func() {
		cancel(api.Serve(ctx, socket, api.OwnerOrRoot, func() any { return d.Status() }))
	})
	err = d.Run(ctx)
	cause := context.Cause(ctx)
	cancel(nil)
	parts.Wait()
	if stopped.Err() != nil {
		return nil
	}
	return fmt.Errorf("%w (%w)", cause, err)
}

// configure hands the work domain's configuration to linkd.
func configure(ctx context.Context, socket string, c guestlink.Config) error {
	body, err := json.Marshal(c)
	if err != nil {
		return err
	}
	return api.Do(ctx, socket, "PUT", "/v1/config", bytes.NewReader(body), nil)
}

// closed is "netd close".
func closed(_ context.Context, o options) error {
	if err := kernel.Create(o.inside); err != nil {
		return err
	}
	outside, inside, err := open(o.inside)
	if err != nil {
		return err
	}
	defer outside.Close()
	defer inside.Close()
	return apply(outside, inside)
}

func open(path string) (outside, inside *kernel.Namespace, err error) {
	if outside, err = kernel.Open(kernel.Current); err != nil {
		return nil, nil, err
	}
	if inside, err = kernel.Open(path); err != nil {
		outside.Close()
		return nil, nil, err
	}
	return outside, inside, nil
}

// apply closes both namespaces and reads them back.
func apply(outside, inside *kernel.Namespace) error {
	p := plan.Closed()
	if err := inside.Apply(p.Inside); err != nil {
		return err
	}
	return outside.Apply(p.Outside)
}
