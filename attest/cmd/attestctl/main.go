// Attestctl is the security team's command line to a verifier.
//
// Synopsis:
//
//	attestctl [-socket PATH] [-json] COMMAND
//
// Exit status: 0 done, 1 failed, 2 wrong command line. Commands that judge
// samples (eventlog, ek, quote): 0 pass, 1 refuse, 2 could not appraise.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
)

const usage = `usage: attestctl [-socket PATH] [-json] COMMAND

commands
  ticket create [-uses N] [-expires 1h]   make an enrolment ticket; its text is shown this once
  ticket list | ticket revoke ID          list tickets; make one worthless at once
  ticket write -state FILE [-offset N]    put the ticket on standard input on a state partition
  device list                             list enrolled devices
  device show ID                          show one device
  device retire ID -reason WHY            end a device at once: affirmed no more, back by a permit alone
  device history ID                       show the records that have ended
  permit new -device ID [-replacement ID] -reason WHY [-expires 24h]
                                          a permit for a new key or a new board, to be signed by two
  approval sign -key FILE FILE            sign a permit or a recovery request; prints it signed
  permit add FILE | permit list           present a signed permit; list all
  purchase add FILE | purchase list       EK hashes that enrol without a ticket
  seal sign -key FILE -epoch N REFERENCE  sign a release's policies for disk and logon keys, offline
  seal show FILE                          check and show them
  recovery request -escrow FILE -reason WHY [-expires 1h]
                                          ask for a recovery key; to be signed by two
  recovery release -escrow FILE -key FILE -approvers FILE REQUEST
                                          show the recovery key for a request that two have signed
  result last [-device ID]                show the last appraisal
  reference add FILE                      accept the image with these reference values
  reference list                          list accepted images
  reference remove "IMAGE VERSION"        accept an image no longer

  policy keygen NAME                      make a key that signs policies: NAME.key, NAME.pub
  policy draft FILE -organization O -references A,B [-supersedes P] [-not-before T]
  policy sign FILE -key KEY [-out FILE]   sign a policy in JSON, or add a signature to a signed one
  policy verify FILE -keys A,B [-threshold N]
  policy show FILE                        show what a policy says
  policy simulate FILE                    whom it would refuse, before it is published
  policy publish FILE [-shadow] [-force]  bring it into force from its time on, or only evaluate it
  policy status | release | unshadow      what is in force; end a hold; end the shadow
  report list DEVICE | get ID [-out FILE] | key
  firmware export | import FILE           how common firmware is, between organisations

  verify REPORT | explain REPORT | diff A B   check reports offline: attestctl verify -h
  eventlog LOG | ek CERT | quote          judge anyone's samples without a verifier: attestctl eventlog -h

Flags may stand anywhere. -json prints JSON. "ticket write" needs no verifier.

flags
`

// errUsage is a wrong command line.
var errUsage = errors.New("wrong command line; attestctl -h shows the commands")

func main() {
	if exit, ok := samples(os.Args[1:], os.Stdout, os.Stderr); ok {
		os.Exit(exit)
	}
	if exit, ok := reports(os.Args[1:], os.Stdout, os.Stderr); ok {
		os.Exit(exit)
	}
	var o options
	f := flag.NewFlagSet("attestctl", flag.ContinueOnError)
	f.StringVar(&o.socket, "socket", "/run/sekisho-verifier/admin.sock", "verifier's admin socket")
	f.BoolVar(&o.json, "json", false, "print JSON")
	f.IntVar(&o.uses, "uses", 1, "devices that a ticket may enrol")
	f.DurationVar(&o.expires, "expires", 0, "life of a ticket, such as 1h (default 1h)")
	f.StringVar(&o.device, "device", "", "only results of this device `id`")
	f.StringVar(&o.state, "state", "", "state partition or file")
	o.policy.flags(f)
	f.Int64Var(&o.offset, "offset", 0, "first byte of the state partition in the file")
	o.sealOptions.flags(f)
	f.Usage = func() {
		fmt.Fprint(f.Output(), usage)
		f.PrintDefaults()
	}
	args, err := parse(f, os.Args[1:])
	switch {
	case errors.Is(err, flag.ErrHelp):
		os.Exit(0)
	case err != nil:
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := o.run(ctx, args); err != nil {
		fmt.Fprintln(os.Stderr, "attestctl:", err)
		if errors.Is(err, errUsage) {
			os.Exit(2)
		}
		os.Exit(1)
	}
}

// parse reads flags wherever they stand and returns the words between them.
func parse(f *flag.FlagSet, args []string) (words []string, err error) {
	for {
		if err := f.Parse(args); err != nil {
			return nil, err
		}
		if f.NArg() == 0 {
			return words, nil
		}
		words, args = append(words, f.Arg(0)), f.Args()[1:]
	}
}

func (o *options) run(ctx context.Context, args []string) error {
	if len(args) < 2 {
		return errUsage
	}
	command, rest := strings.Join(args[:2], " "), args[2:]
	c, ok := commands()[command]
	if !ok || len(rest) != c.args {
		return errUsage
	}
	result, err := c.run(ctx, o, rest)
	if err != nil {
		return err
	}
	if o.json {
		e := json.NewEncoder(os.Stdout)
		e.SetIndent("", "  ")
		return e.Encode(result)
	}
	return c.print(os.Stdout, result)
}
