//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"sync"
	"time"

	notify "github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"

	"sekisho/attest"
	"sekisho/attest/gate"
	"sekisho/guestlink"
	"sekisho/netd"
	"sekisho/netd/daemon"
	"sekisho/netd/internal/api"
	"sekisho/netd/kernel"
	"sekisho/netd/office"
	"sekisho/netd/path"
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
	pipe, err := officePipe(org, outside, inside)
	if err != nil {
		dev.Close()
		return err
	}
	attestd := gate.NewClient(o.attestd)
	config := daemon.Config{
		Organization: org, Outside: outside, Inside: inside, Driver: driver,
		Attestation: attestd,
		Configure:   func(ctx context.Context, c guestlink.Config) error { return configure(ctx, o.linkd, c) },
		Notify:      func(s string) { notify.SdNotify(false, s) },
		SetClock:    setClock,
		Times:       path.Kept{Path: o.times},
		Watchdog:    watchdog > 0,
		Unserved:    func() []netd.Unserved { return kernel.Unserved(os.DirFS("/sys")) },
		Log:         log,
	}
	if pipe != nil {
		config.Pipe = pipe
	}
	var more []func(*http.ServeMux)
	r := newRadio(o, org, attestd, log)
	if r != nil {
		config.Wifi, config.Wired, config.Access = r.Wifi, r.wired(), r.Status
		more = append(more, r.serve)
	}
	d := daemon.New(config)
	stopped := ctx
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var parts sync.WaitGroup
	parts.Go(func() { cancel(driver.Run(ctx)) })
	if r != nil {
		parts.Go(func() { r.Run(ctx) })
	}
	if pipe != nil {
		parts.Go(func() { cancel(pipe.Run(ctx)) })
	}
	parts.Go(func() {
		more = append(more, api.JSON("/v1/journal", func() any { return d.Journal.Report(time.Now()) }))
		cancel(api.Serve(ctx, socket, api.OwnerOrRoot, func() any { return d.Status() }, more...))
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

// setClock sets the system's clock (clock_settime(2)); it needs CAP_SYS_TIME.
func setClock(t time.Time) error {
	ts := unix.NsecToTimespec(t.UnixNano())
	return unix.ClockSettime(unix.CLOCK_REALTIME, &ts)
}

// officePipe makes the way to an office's LAN, if the organisation has offices.
func officePipe(org *attest.Organization, outside, inside *kernel.Namespace) (*office.Pipe, error) {
	if org.Office == nil {
		return nil, nil
	}
	in, err := inside.CreateTUN(netd.OfficeLink, connectip.DefaultMTU)
	if err != nil {
		return nil, err
	}
	out, err := outside.CreateTUN(netd.OfficeOuterLink, connectip.DefaultMTU)
	if err != nil {
		in.Close()
		return nil, err
	}
	return office.NewPipe(tunnel.NewDevice(in), tunnel.NewDevice(out)), nil
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
