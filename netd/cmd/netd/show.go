//go:build linux

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"text/tabwriter"
	"time"

	"sekisho/attest/cryptrec"
	"sekisho/netd"
	"sekisho/netd/internal/api"
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
	fmt.Fprintf(t, "state\t%s\n", s.Line())
	fmt.Fprintf(t, "since\t%s\n", s.Since.Format(time.DateTime))
	if s.Reason != "" {
		fmt.Fprintf(t, "reason\t%s: %s\n", s.Reason, s.Detail)
	}
	if u := s.Uplink; u.Usable() {
		fmt.Fprintf(t, "uplink\t%s %s router %s mtu %d lease until %s\n", u.Name, u.Address, u.Router, u.MTU, u.Expires.Format(time.DateTime))
	} else {
		fmt.Fprintf(t, "uplink\t%s %s\n", u.Name, u.Detail)
	}
	if n := s.Tunnel; n != nil {
		fmt.Fprintf(t, "tunnel\tinner %s gateway %s mtu %d\n", n.Inner, n.Gateway, n.MTU)
		fmt.Fprintf(t, "\t%s since %s until %s\n", n.Cipher, n.Since.Format(time.DateTime), n.Until.Format(time.DateTime))
		fmt.Fprintf(t, "\tsent %d packets %d B, received %d packets %d B, dropped %d\n",
			n.Counters.SentPackets, n.Counters.SentBytes, n.Counters.ReceivedPackets, n.Counters.ReceivedBytes, n.Counters.Dropped)
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

// ciphers is "netd ciphers".
func ciphers(_ context.Context, o options) error {
	list := cryptrec.List()
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
