package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"sekisho/attest"
	"sekisho/attest/attester"
	"sekisho/attest/fleet"
)

// options are the values of the flags.
type options struct {
	socket   string
	json     bool
	language string
	uses     int
	expires  time.Duration
	device   string
	state    string
	offset   int64
	sealOptions
	policy policyOptions
	card   cardOptions
}

// command is one of attestctl's: run does it, print shows what run returned.
type command struct {
	args  int
	run   func(context.Context, *options, []string) (any, error)
	print func(io.Writer, any) error
}

func commands() map[string]command {
	all := map[string]command{
		"ticket create":    {0, createTicket, show(printTicket)},
		"ticket write":     {0, writeTicket, show(printNothing)},
		"device list":      {0, listDevices, show(printDevices)},
		"device show":      {1, showDevice, show(printDevice)},
		"result last":      {0, lastResult, show(printResult)},
		"reference add":    {1, addReference, show(printReference)},
		"reference list":   {0, listReferences, show(printReferences)},
		"reference remove": {1, removeReference, show(printNothing)},
	}
	maps.Copy(all, identityCommands())
	maps.Copy(all, sealCommands())
	maps.Copy(all, policyCommands())
	maps.Copy(all, cardCommands())
	return all
}

// show adapts a printer of one type.
func show[T any](f func(io.Writer, T) error) func(io.Writer, any) error {
	return func(w io.Writer, v any) error {
		t, ok := v.(T)
		if !ok {
			return fmt.Errorf("cannot print a %T", v)
		}
		return f(w, t)
	}
}

func (o *options) admin() *fleet.Admin { return fleet.NewAdmin(o.socket) }

func createTicket(ctx context.Context, o *options, _ []string) (any, error) {
	if o.expires == 0 {
		o.expires = time.Hour
	}
	return o.admin().CreateTicket(ctx, o.uses, o.expires)
}

// printTicket prints the text alone on standard output, to be passed on.
func printTicket(w io.Writer, t fleet.TicketResponse) error {
	fmt.Fprintf(os.Stderr, "ticket %s: %d uses, expires %s; it is not shown again\n", t.ID, t.Uses, t.Expires.Format(time.RFC3339))
	_, err := fmt.Fprintln(w, t.Ticket)
	return err
}

func writeTicket(_ context.Context, o *options, _ []string) (any, error) {
	if o.state == "" {
		return nil, errUsage
	}
	text, err := io.ReadAll(io.LimitReader(os.Stdin, 1024))
	if err != nil {
		return nil, err
	}
	f := attester.StateFile{Path: o.state, Offset: o.offset}
	return struct{}{}, attester.WriteTicket(f, attest.NewTicket(strings.TrimSpace(string(text))))
}

func printNothing(io.Writer, struct{}) error { return nil }

func listDevices(ctx context.Context, o *options, _ []string) (any, error) {
	return o.admin().Devices(ctx)
}

func printDevices(w io.Writer, list []fleet.Device) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "DEVICE\tENROLLED\tAFFIRMED\tIMAGE")
	for _, d := range list {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", d.ID, when(d.Enrolled), when(d.Affirmed), d.Image)
	}
	return t.Flush()
}

func showDevice(ctx context.Context, o *options, args []string) (any, error) {
	return o.admin().Device(ctx, args[0])
}

func printDevice(w io.Writer, d fleet.Device) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "device\t%s\nticket\t%s\nenrolled\t%s\naffirmed\t%s\nimage\t%s\nTPM firmware\t%016x\n",
		d.ID, d.TicketID, when(d.Enrolled), when(d.Affirmed), d.Image, d.Firmware)
	if d.Clock != nil {
		fmt.Fprintf(t, "TPM resets\t%d\n", d.Clock.ResetCount)
	}
	return t.Flush()
}

func lastResult(ctx context.Context, o *options, _ []string) (any, error) {
	list, err := o.admin().Results(ctx)
	if err != nil {
		return nil, err
	}
	for i := len(list) - 1; i >= 0; i-- {
		if o.device == "" || list[i].Device.String() == o.device {
			return list[i], nil
		}
	}
	return nil, errors.New("no result since the verifier started")
}

func printResult(w io.Writer, r attest.Result) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "status\t%s\ndevice\t%s\ntime\t%s\n", r.Status, r.Device, when(time.Unix(r.IssuedAt, 0)))
	if r.Image != "" {
		fmt.Fprintf(t, "image\t%s\n", r.Image)
	}
	for _, e := range r.Events {
		fmt.Fprintf(t, "event\t%s\n", e)
	}
	if r.Policy != nil {
		fmt.Fprintf(t, "policy\t%s\n", r.Policy)
	}
	if r.Report != "" {
		fmt.Fprintf(t, "report\t%s\n", r.Report)
	}
	if r.Reason != attest.ReasonNone {
		fmt.Fprintf(t, "reason\t%s\ndetail\t%s\n", r.Reason, r.Detail)
	}
	for _, f := range r.Findings {
		f = f.Explained()
		fmt.Fprintf(t, "finding\t%s %s: %s\n\t%s\n\texpected %s\n\tseen     %s\n\t→ %s\n",
			f.Severity, f.Reason, f.Sentence.In(speaks(w)), f, f.Expected, f.Seen, f.Action.In(speaks(w)))
	}
	return t.Flush()
}

func addReference(ctx context.Context, o *options, args []string) (any, error) {
	data, err := os.ReadFile(args[0])
	if err != nil {
		return nil, err
	}
	return o.admin().AddReference(ctx, data)
}

func printReference(w io.Writer, r fleet.Reference) error {
	_, err := fmt.Fprintln(w, r.ID)
	return err
}

func listReferences(ctx context.Context, o *options, _ []string) (any, error) {
	return o.admin().References(ctx)
}

func printReferences(w io.Writer, list []fleet.Reference) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "IMAGE\tFROM\tPCRS")
	for _, r := range list {
		fmt.Fprintf(t, "%s\t%s\t%d\n", r.ID, r.Source, len(r.PCRs))
	}
	return t.Flush()
}

func removeReference(ctx context.Context, o *options, args []string) (any, error) {
	return struct{}{}, o.admin().RemoveReference(ctx, args[0])
}

func when(t time.Time) string {
	if t.IsZero() || t.Unix() == 0 {
		return "never"
	}
	return t.UTC().Format(time.RFC3339)
}
