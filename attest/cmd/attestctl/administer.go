package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"strings"

	"sekisho/attest"
	"sekisho/attest/approval"
	"sekisho/attest/fleet"
	"sekisho/attest/policy"
)

// administer runs a command of those who keep a verifier, and returns its exit
// status.
func administer(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	var o options
	f := flag.NewFlagSet("attestctl", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&o.socket, "socket", defaultSocket, "verifier's admin socket")
	f.BoolVar(&o.json, "json", false, "print JSON")
	f.StringVar(&o.language, "lang", "", "`language`: ja or en (default: the locale's)")
	f.IntVar(&o.uses, "uses", 1, "devices that a ticket may enrol")
	f.DurationVar(&o.expires, "expires", 0, "life of a ticket, such as 1h (default 1h)")
	f.StringVar(&o.device, "device", "", "only results of this device `id`")
	f.StringVar(&o.state, "state", "", "state partition or file")
	o.policy.flags(f)
	f.Int64Var(&o.offset, "offset", 0, "first byte of the state partition in the file")
	o.sealOptions.flags(f)
	o.card.flags(f)
	o.update.flags(f)
	f.Usage = func() {
		fmt.Fprint(f.Output(), usage)
		f.PrintDefaults()
	}
	words, err := parse(f, args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return exitPass
	case err != nil:
		return exitNone
	}
	if o.language, err = language(o.language); err == nil {
		var result any
		if result, err = o.run(ctx, words, stdout); err == nil {
			return exitOf(result)
		}
	}
	fmt.Fprintln(stderr, "attestctl:", err)
	if errors.Is(err, policy.ErrUnsigned) || errors.Is(err, approval.ErrNotApproved) || errors.Is(err, fleet.ErrRefused) {
		return exitRefuse
	}
	return exitNone
}

// exitOf is the exit status of a command that was done: what it shows may be a
// verdict.
func exitOf(result any) int {
	bad := false
	switch r := result.(type) {
	case attest.Result:
		bad = r.Status != attest.StatusAffirming
	case fleet.Device:
		bad = r.Status != attest.StatusAffirming
	case fleet.Simulation:
		bad = r.Refused > 0
	case *cardReport:
		bad = len(r.Findings) > 0
	case fleet.PolicyStatus:
		bad = r.Hold != nil
	}
	if bad {
		return exitRefuse
	}
	return exitPass
}

// run does one command and prints what it gave.
func (o *options) run(ctx context.Context, args []string, stdout io.Writer) (any, error) {
	if len(args) < 2 {
		return nil, errUsage
	}
	if args[0] == "enroll" {
		args = append([]string{"ticket"}, args[1:]...)
	}
	command, rest := strings.Join(args[:2], " "), args[2:]
	c, ok := commands()[command]
	if !ok || len(rest) != c.args {
		return nil, errUsage
	}
	o.kind = args[1]
	result, err := c.run(ctx, o, rest)
	if err != nil {
		return nil, err
	}
	if o.json {
		e := json.NewEncoder(stdout)
		e.SetIndent("", "  ")
		return result, e.Encode(result)
	}
	return result, c.print(printer{harmless{stdout}, o.language}, result)
}
