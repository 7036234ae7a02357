package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
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
		"permit new":     {0, newPermit, show(printDocument[*approval.Signed])},
		"permit add":     {1, addPermit, show(printPermit)},
		"permit list":    {0, listPermits, show(printPermits)},
		"purchase add":   {1, addPurchase, show(printAdded)},
		"purchase list":  {0, listPurchase, show(printPurchase)},
	}
}

func listTickets(ctx context.Context, o *options, _ []string) (any, error) {
	return o.admin().Tickets(ctx)
}

func printTickets(w io.Writer, list []fleet.Ticket) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "TICKET\tUSES LEFT\tEXPIRES")
	for _, x := range list {
		fmt.Fprintf(t, "%s\t%d\t%s\n", x.ID, x.Uses, when(x.Expires))
	}
	return t.Flush()
}

func revokeTicket(ctx context.Context, o *options, args []string) (any, error) {
	return struct{}{}, o.admin().RevokeTicket(ctx, args[0])
}

func deviceHistory(ctx context.Context, o *options, args []string) (any, error) {
	return o.admin().Former(ctx, args[0])
}

func printFormer(w io.Writer, list []fleet.Former) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "DEVICE\tENROLLED\tENDED\tREPLACED BY\tPERMIT OR REASON")
	for _, f := range list {
		by, why := f.ReplacedBy.String(), f.Permit.String()[:16]
		switch f.ReplacedBy {
		case f.ID:
			by = "new key of the same device"
		case attest.Digest{}:
			by, why = "nobody", f.Reason
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", f.ID, when(f.Enrolled), when(f.Ended), by, why)
	}
	return t.Flush()
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

func printBackup(w io.Writer, b store.Backup) error {
	_, err := fmt.Fprintf(w, "%d records, as of %s\n", b.Records, when(b.Time))
	return err
}

func retireDevice(ctx context.Context, o *options, args []string) (any, error) {
	return o.admin().Retire(ctx, args[0], o.reason)
}

func printRetired(w io.Writer, f fleet.Former) error { return printFormer(w, []fleet.Former{f}) }

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

func printPermit(w io.Writer, p fleet.Permit) error { return printPermits(w, []fleet.Permit{p}) }

func listPermits(ctx context.Context, o *options, _ []string) (any, error) {
	return o.admin().Permits(ctx)
}

func printPermits(w io.Writer, list []fleet.Permit) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "PERMIT\tDEVICE\tREPLACEMENT\tEXPIRES\tUSED\tSIGNERS\tREASON")
	for _, p := range list {
		replacement := "-"
		if p.Replacement != nil {
			replacement = p.Replacement.String()
		}
		fmt.Fprintf(t, "%.16s\t%s\t%s\t%s\t%s\t%d\t%s\n", p.ID, p.Device, replacement, when(p.Expires), when(p.Used), len(p.Signers), p.Reason)
	}
	return t.Flush()
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

func printAdded(w io.Writer, n fleet.PurchaseResponse) error {
	_, err := fmt.Fprintf(w, "%d new\n", n.Added)
	return err
}

func listPurchase(ctx context.Context, o *options, _ []string) (any, error) {
	return o.admin().Purchase(ctx)
}

func printPurchase(w io.Writer, list map[attest.Digest]fleet.Purchase) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "EK\tADDED\tENROLLED AS\tSOURCE")
	keys := slices.SortedFunc(maps.Keys(list), func(a, b attest.Digest) int { return strings.Compare(a.String(), b.String()) })
	for _, k := range keys {
		as := "-"
		if d := list[k].Device; d != (attest.Digest{}) {
			as = d.String()
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", k, when(list[k].Added), as, list[k].Source)
	}
	return t.Flush()
}
