package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"sekisho/attest"
	"sekisho/attest/approval"
	"sekisho/attest/fleet"
	"sekisho/attest/store"
)

// identityCommands are those about who may enrol.
func identityCommands() map[string]command {
	return map[string]command{
		"ticket list":    {0, listTickets, show(printTickets)},
		"ticket revoke":  {1, revokeTicket, show(printNothing)},
		"store backup":   {1, storeBackup, show(printBackup)},
		"device history": {1, deviceHistory, show(printFormer)},
		"device retire":  {1, retireDevice, show(printRetired)},

		"suspend device":       {1, suspend, show(printSuspension)},
		"suspend key":          {1, suspend, show(printSuspension)},
		"suspend policy":       {1, suspend, show(printSuspension)},
		"suspend user":         {1, suspend, show(printSuspension)},
		"suspend organization": {0, suspend, show(printSuspension)},
		"suspend list":         {0, listSuspensions, show(printSuspensions)},
		"resume device":        {1, resume, show(printSuspension)},
		"resume key":           {1, resume, show(printSuspension)},
		"resume policy":        {1, resume, show(printSuspension)},
		"resume user":          {1, resume, show(printSuspension)},
		"resume organization":  {0, resume, show(printSuspension)},
		"permit new":           {0, newPermit, show(printDocument[*approval.Signed])},
		"permit add":           {1, addPermit, show(printPermit)},
		"permit list":          {0, listPermits, show(printPermits)},
		"purchase add":         {1, addPurchase, show(printAdded)},
		"purchase list":        {0, listPurchase, show(printPurchase)},
	}
}

func listTickets(ctx context.Context, o *options, _ []string) (any, error) {
	return o.admin().Tickets(ctx)
}

func printTickets(w printer, list []fleet.Ticket) error {
	t, flush := w.table("チケット\t残り回数\t有効期限", "TICKET\tUSES LEFT\tEXPIRES")
	for _, x := range list {
		t.row(x.ID, x.Uses, t.when(x.Expires))
	}
	return flush()
}

func revokeTicket(ctx context.Context, o *options, args []string) (any, error) {
	return struct{}{}, o.admin().RevokeTicket(ctx, args[0])
}

func deviceHistory(ctx context.Context, o *options, args []string) (any, error) {
	return o.admin().Former(ctx, args[0])
}

func printFormer(w printer, list []fleet.Former) error {
	t, flush := w.table("端末\t登録\t終了\t後継\t許可または理由", "DEVICE\tENROLLED\tENDED\tREPLACED BY\tPERMIT OR REASON")
	for _, f := range list {
		by, why := f.ReplacedBy.String(), f.Permit.String()[:16]
		switch f.ReplacedBy {
		case f.ID:
			by = attest.Say("同じ端末の新しい鍵", "new key of the same device").In(t.language)
		case attest.Digest{}:
			by, why = attest.Say("なし", "nobody").In(t.language), f.Reason
		}
		t.row(f.ID, t.when(f.Enrolled), t.when(f.Ended), by, why)
	}
	return flush()
}

// storeBackup writes a new file, readable by its owner alone.
func storeBackup(ctx context.Context, o *options, args []string) (_ any, err error) {
	f, err := os.OpenFile(args[0], os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	b, err := o.admin().Backup(ctx, f)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return nil, errors.Join(err, os.Remove(args[0]))
	}
	return b, nil
}

func printBackup(w printer, b store.Backup) error {
	return w.say("%d 件の記録、%s 時点", "%d records, as of %s", b.Records, w.when(b.Time))
}

func retireDevice(ctx context.Context, o *options, args []string) (any, error) {
	return o.admin().Retire(ctx, args[0], o.reason)
}

func printRetired(w printer, f fleet.Former) error { return printFormer(w, []fleet.Former{f}) }

func newPermit(_ context.Context, o *options, _ []string) (any, error) {
	r := fleet.PermitRequest{Serial: rand.Text(), Reason: o.reason, Expires: o.until(24 * time.Hour)}
	if err := r.Device.UnmarshalText([]byte(o.device)); err != nil {
		return nil, fmt.Errorf("-device: %w", err)
	}
	if o.replacement != "" {
		var id attest.Digest
		if err := id.UnmarshalText([]byte(o.replacement)); err != nil {
			return nil, fmt.Errorf("-replacement: %w", err)
		}
		r.Replacement = &id
	}
	if r.Reason == "" {
		return nil, fmt.Errorf("%w: -reason says why, for the audit", errUsage)
	}
	return approval.New(fleet.ApprovePermit, r)
}

// until is the end of -expires, or of life if it is not given.
func (o *options) until(life time.Duration) time.Time {
	if o.expires > 0 {
		life = o.expires
	}
	return time.Now().Add(life).UTC().Truncate(time.Second)
}

func addPermit(ctx context.Context, o *options, args []string) (any, error) {
	data, err := readFile(args[0])
	if err != nil {
		return nil, err
	}
	return o.admin().AddPermit(ctx, data)
}

func printPermit(w printer, p fleet.Permit) error { return printPermits(w, []fleet.Permit{p}) }

func listPermits(ctx context.Context, o *options, _ []string) (any, error) {
	return o.admin().Permits(ctx)
}

func printPermits(w printer, list []fleet.Permit) error {
	t, flush := w.table("許可\t端末\t後継\t有効期限\t使用\t署名者数\t理由", "PERMIT\tDEVICE\tREPLACEMENT\tEXPIRES\tUSED\tSIGNERS\tREASON")
	for _, p := range list {
		replacement := "-"
		if p.Replacement != nil {
			replacement = p.Replacement.String()
		}
		t.row(fmt.Sprintf("%.16s", p.ID), p.Device, replacement, t.when(p.Expires), t.when(p.Used), len(p.Signers), p.Reason)
	}
	return flush()
}

func addPurchase(ctx context.Context, o *options, args []string) (any, error) {
	data, err := readFile(args[0])
	if err != nil {
		return nil, err
	}
	keys, err := fleet.ParsePurchase(data)
	if err != nil {
		return nil, err
	}
	return o.admin().AddPurchase(ctx, fleet.PurchaseRequest{Source: o.reason, Keys: keys})
}

func printAdded(w printer, n fleet.PurchaseResponse) error {
	return w.say("%d 件を追加しました", "%d new", n.Added)
}

func listPurchase(ctx context.Context, o *options, _ []string) (any, error) {
	return o.admin().Purchase(ctx)
}

func printPurchase(w printer, list map[attest.Digest]fleet.Purchase) error {
	t, flush := w.table("EK\t追加\t登録された端末\t出所", "EK\tADDED\tENROLLED AS\tSOURCE")
	keys := slices.SortedFunc(maps.Keys(list), func(a, b attest.Digest) int { return strings.Compare(a.String(), b.String()) })
	for _, k := range keys {
		as := "-"
		if d := list[k].Device; d != (attest.Digest{}) {
			as = d.String()
		}
		t.row(k, t.when(list[k].Added), as, list[k].Source)
	}
	return flush()
}
