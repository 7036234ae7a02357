//go:build linux

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"sekisho/netd"
	"sekisho/netd/internal/api"
	"sekisho/netd/journal"
)

// status is "netd status".
func status(ctx context.Context, o options) error {
	var s netd.Status
	if err := api.Do(ctx, o.socket, "GET", "/v1/status", nil, &s); err != nil {
		return fmt.Errorf("%w; is netd running?", err)
	}
	if o.json {
		return printJSON(os.Stdout, s)
	}
	return printStatus(os.Stdout, s)
}

func printStatus(w io.Writer, s netd.Status) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "%s\n%s\n\n", s.Words.EN, s.Words.JA)
	fmt.Fprintf(t, "state\t%s\n", s.Line())
	fmt.Fprintf(t, "since\t%s\n", s.Since.Format(time.DateTime))
	if s.Reason != "" {
		fmt.Fprintf(t, "reason\t%s: %s\n", s.Reason, s.Detail)
	}
	if u := s.Uplink; u.Usable() {
		fmt.Fprintf(t, "uplink\t%s %s router %s mtu %d lease until %s\n", u.Name, u.Addresses(), cmp.Or(u.Router, u.Router6), u.MTU, u.Expires.Format(time.DateTime))
	} else {
		fmt.Fprintf(t, "uplink\t%s %s\n", u.Name, u.Detail)
	}
	for i, u := range s.Uplinks {
		label := ""
		if i == 0 {
			label = "uplinks"
		}
		fmt.Fprintf(t, "%s\t%s\n", label, line(u, s.Uplink.Name))
	}
	for i, u := range s.Unserved {
		label := ""
		if i == 0 {
			label = "unserved"
		}
		fmt.Fprintf(t, "%s\t%s / %s\n", label, u.Words().EN, u.Words().JA)
	}
	for _, name := range slices.Sorted(maps.Keys(s.Signals)) {
		fmt.Fprintf(t, "signal\t%s %s\n", name, heard(s.Signals[name]))
	}
	if n := s.Tunnel; n != nil {
		fmt.Fprintf(t, "tunnel\tinner %s gateway %s by %s mtu %d\n", n.Inner, n.Gateway, n.Carriage, n.MTU)
		fmt.Fprintf(t, "\t%s since %s until %s\n", n.Cipher, n.Since.Format(time.DateTime), n.Until.Format(time.DateTime))
		fmt.Fprintf(t, "\tsent %d packets %d B, received %d packets %d B, dropped %d\n",
			n.Counters.SentPackets, n.Counters.SentBytes, n.Counters.ReceivedPackets, n.Counters.ReceivedBytes, n.Counters.Dropped)
	}
	if o := s.Office; o != nil {
		stay := ""
		if o.StayInTunnel {
			stay = ", but the organisation stays in the tunnel"
		}
		fmt.Fprintf(t, "office\t%s proven by %s on %s since %s%s\n", o.Site, o.Beacon, o.Link, o.Since.Format(time.DateTime), stay)
		fmt.Fprintf(t, "\treached directly: %v\n", o.Networks)
	}
	if a := s.Access; a != nil {
		w := a.Words()
		fmt.Fprintf(t, "networks\t%s / %s", w.EN, w.JA)
		if a.Detail != "" {
			fmt.Fprintf(t, " (%s)", a.Detail)
		}
		fmt.Fprintln(t)
		if a.Identity != "" {
			fmt.Fprintf(t, "identity\t%s until %s\n", a.Identity, a.IdentityUntil.Format(time.DateTime))
		}
	}
	for i, h := range s.History {
		label := ""
		if i == 0 {
			label = "history"
		}
		fmt.Fprintf(t, "%s\t%s %s %s\n", label, h.At.Format(time.DateTime), h.State, h.Detail)
	}
	return t.Flush()
}

// heard is a radio's history in one line.
func heard(list []netd.SignalSample) string {
	last := list[len(list)-1]
	best, worst, lost := -200, 0, 0
	for _, s := range list {
		if s.DBM == 0 {
			lost++
			continue
		}
		best, worst = max(best, s.DBM), min(worst, s.DBM)
	}
	now := "not joined"
	if last.DBM != 0 {
		now = fmt.Sprintf("%d dBm", last.DBM)
	}
	return fmt.Sprintf("%s; %d to %d dBm since %s, without a network %d times", now, worst, best, list[0].At.Format(time.DateTime), lost)
}

// showJournal is "netd journal".
func showJournal(ctx context.Context, o options) error {
	var r journal.Report
	if err := api.Do(ctx, o.socket, "GET", "/v1/journal", nil, &r); err != nil {
		return fmt.Errorf("%w; is netd running?", err)
	}
	print := printJournal
	if o.json {
		print = func(w io.Writer, r journal.Report) error { return printJSON(w, r) }
	}
	if o.save == "" {
		return print(os.Stdout, r)
	}
	f, err := os.OpenFile(o.save, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(print(f, r), f.Sync(), f.Close())
}

func printJournal(w io.Writer, r journal.Report) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	if r.Dropped > 0 {
		fmt.Fprintf(t, "%d older events are forgotten / 古い %d 件は破棄されました\n", r.Dropped, r.Dropped)
	}
	for _, e := range r.Events {
		fmt.Fprintf(t, "%s\t%s\t%s / %s\n", e.At.Format(time.DateTime+".000"), e.Kind, e.EN, e.JA)
	}
	return t.Flush()
}

// line is one uplink in one line.
func line(u netd.Uplink, inUse string) string {
	words := []string{u.Name, u.Kind}
	if u.Metered {
		words = append(words, "metered")
	}
	if u.Network != "" {
		words = append(words, fmt.Sprintf("%q %d dBm", u.Network, u.Signal))
	}
	switch {
	case u.Name == inUse && u.Usable():
		words = append(words, "in use", u.Addresses(), u.Health)
	case u.Usable():
		words = append(words, "ready", u.Addresses(), u.Health)
	default:
		words = append(words, u.Detail)
	}
	return strings.Join(words, " ")
}

// ciphers is "netd ciphers".
func ciphers(_ context.Context, o options) error {
	org, err := organization(o.config)
	if err != nil {
		return err
	}
	list := org.KeyAgreement.List()
	if o.json {
		return printJSON(os.Stdout, list)
	}
	t := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "USE\tALGORITHM\tBASIS")
	for _, a := range list {
		fmt.Fprintf(t, "%s\t%s\t%s\n", a.Use, a.Name, a.Basis)
	}
	return t.Flush()
}

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}
