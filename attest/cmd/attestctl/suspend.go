package main

import (
	"context"
	"time"

	"sekisho/attest"
	"sekisho/attest/fleet"
)

// suspend and resume are told by their words what they are about.
func suspend(ctx context.Context, o *options, args []string) (any, error) {
	return o.suspension(ctx, args, false)
}

func resume(ctx context.Context, o *options, args []string) (any, error) {
	return o.suspension(ctx, args, true)
}

func (o *options) suspension(ctx context.Context, args []string, end bool) (any, error) {
	r := fleet.SuspensionRequest{Kind: o.kind, Resume: end, Reason: o.reason}
	if len(args) > 0 {
		r.Subject = args[0]
	}
	return o.admin().Suspend(ctx, r)
}

func listSuspensions(ctx context.Context, o *options, _ []string) (any, error) {
	return o.admin().Suspensions(ctx)
}

func printSuspension(w printer, v attest.Revocation) error {
	return printSuspensions(w, []attest.Revocation{v})
}

func printSuspensions(w printer, list []attest.Revocation) error {
	t, flush := w.table("対象\t停止\t時刻\t端末数\t理由", "SUBJECT\tSUSPENDED\tTIME\tDEVICES\tREASON")
	for _, v := range list {
		t.row(v.Subject(), v.Revoked, t.when(time.Unix(v.Time, 0)), len(v.Devices), v.Reason)
	}
	return flush()
}
