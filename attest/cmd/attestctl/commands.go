package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"strings"
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
	kind     string // second word of the command
	state    string
	offset   int64
	sealOptions
	policy policyOptions
	card   cardOptions
	update releaseOptions
}

// command is one of attestctl's: run does it, print shows what run returned.
type command struct {
	args  int
	run   func(context.Context, *options, []string) (any, error)
	print func(printer, any) error
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
	maps.Copy(all, releaseCommands())
	return all
}

// show adapts a printer of one type.
func show[T any](f func(printer, T) error) func(printer, any) error {
	return func(w printer, v any) error {
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
func printTicket(w printer, t fleet.TicketResponse) error {
	printer{os.Stderr, w.language}.say("登録チケット %s：%d 回まで、有効期限 %s。再表示はできません。", "ticket %s: %d uses, expires %s; it is not shown again", t.ID, t.Uses, t.Expires.Format(time.RFC3339))
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

func printNothing(printer, struct{}) error { return nil }

func listDevices(ctx context.Context, o *options, _ []string) (any, error) {
	return o.admin().Devices(ctx)
}

func printDevices(w printer, list []fleet.Device) error {
	t, flush := w.table("端末\t登録\t最終承認\tイメージ", "DEVICE\tENROLLED\tAFFIRMED\tIMAGE")
	for _, d := range list {
		t.row(d.ID, t.when(d.Enrolled), t.when(d.Affirmed), d.Image)
	}
	return flush()
}

func showDevice(ctx context.Context, o *options, args []string) (any, error) {
	return o.admin().Device(ctx, args[0])
}

func printDevice(w printer, d fleet.Device) error {
	t, flush := w.table("", "")
	t.say("端末\t%s\nチケット\t%s\n登録\t%s\n最終承認\t%s\nイメージ\t%s\nTPM ファームウェア\t%016x", "device\t%s\nticket\t%s\nenrolled\t%s\naffirmed\t%s\nimage\t%s\nTPM firmware\t%016x",
		d.ID, d.TicketID, t.when(d.Enrolled), t.when(d.Affirmed), d.Image, d.Firmware)
	if d.Clock != nil {
		t.say("TPM リセット\t%d 回", "TPM resets\t%d", d.Clock.ResetCount)
	}
	return flush()
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

func printResult(w printer, r attest.Result) error {
	t, flush := w.table("", "")
	t.say("判定\t%s\n端末\t%s\n時刻\t%s", "status\t%s\ndevice\t%s\ntime\t%s", r.Status, r.Device, t.when(time.Unix(r.IssuedAt, 0)))
	if r.Image != "" {
		t.say("イメージ\t%s", "image\t%s", r.Image)
	}
	for _, e := range r.Events {
		t.say("起動後のイベント\t%s", "event\t%s", e)
	}
	if r.Policy != nil {
		t.say("ポリシー\t%s", "policy\t%s", r.Policy)
	}
	if r.Report != "" {
		t.say("レポート\t%s", "report\t%s", r.Report)
	}
	if r.Reason != attest.ReasonNone {
		t.say("理由\t%[1]s：%[3]s\n詳細\t%[2]s", "reason\t%[1]s\ndetail\t%[2]s", r.Reason, r.Detail, r.Reason.Words().Sentence.JA)
	}
	for _, f := range r.Findings {
		f = f.Explained()
		t.say("所見\t%s %s：%s\n\t%s\n\t期待値 %s\n\t実際　 %s\n\t→ %s", "finding\t%s %s: %s\n\t%s\n\texpected %s\n\tseen     %s\n\t→ %s",
			f.Severity, f.Reason, f.Sentence.In(t.language), f, f.Expected, f.Seen, f.Action.In(t.language))
	}
	return flush()
}

func addReference(ctx context.Context, o *options, args []string) (any, error) {
	data, err := os.ReadFile(args[0])
	if err != nil {
		return nil, err
	}
	return o.admin().AddReference(ctx, data)
}

func printReference(w printer, r fleet.Reference) error {
	_, err := fmt.Fprintln(w, r.ID)
	return err
}

func listReferences(ctx context.Context, o *options, _ []string) (any, error) {
	return o.admin().References(ctx)
}

func printReferences(w printer, list []fleet.Reference) error {
	t, flush := w.table("イメージ\t出所\tPCR 数", "IMAGE\tFROM\tPCRS")
	for _, r := range list {
		t.row(r.ID, r.Source, len(r.PCRs))
	}
	return flush()
}

func removeReference(ctx context.Context, o *options, args []string) (any, error) {
	return struct{}{}, o.admin().RemoveReference(ctx, args[0])
}
