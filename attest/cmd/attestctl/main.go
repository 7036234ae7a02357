// Attestctl is the security team's command line to a verifier.
//
// Synopsis:
//
//	attestctl [-socket PATH] [-json] COMMAND
//
// Exit status: 0 done, or affirming; 1 not affirming: refused, not signed by
// enough, or somebody would be; 2 it could not be done or judged.
package main

import (
	"context"
	"errors"
	"flag"
	"io"
	"os"
	"os/signal"
)

const usage = `usage: attestctl [-socket PATH] [-json] COMMAND

commands
  ticket create [-uses N] [-expires 1h]   make an enrolment ticket; its text is shown this once
  ticket list | ticket revoke ID          list tickets; make one worthless at once
  ticket write -state FILE [-offset N]    put the ticket on standard input on a state partition
  store backup FILE                       write all records of the verifier's store; it runs on
  device list                             list enrolled devices
  device show ID                          show one device
  device retire ID -reason WHY            end a device at once: affirmed no more, back by a permit alone
  suspend device ID | key SHA256 | policy N | user NAME | organization  -reason WHY
  resume  device ID | key SHA256 | policy N | user NAME | organization
                                          end something at once with all verifiers and gateways, and back
  suspend list                            what is suspended
  device history ID                       show the records that have ended
  permit new -device ID [-replacement ID] -reason WHY [-expires 24h]
                                          a permit for a new key or a new board, to be signed by two
  approval sign -key FILE FILE            sign a permit or a recovery request; prints it signed
  permit add FILE | permit list           present a signed permit; list all
  purchase add FILE | purchase list       EK hashes that enrol without a ticket
  seal sign -key FILE -epoch N REFERENCE  sign a release's policies for disk and logon keys, offline
  seal show FILE                          check and show them
  recovery escrow DEVICE                  fetch the escrow of a device's newest disk
  recovery request -escrow FILE -reason WHY [-expires 1h]
                                          ask for a recovery key; to be signed by two
  recovery release -escrow FILE -key FILE -approvers FILE REQUEST
                                          show the recovery key for a request that two have signed,
                                          once: the verifier records it (recovery list)
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
  release create FILE -organization O -image EFI -references REFERENCE -release SEALED
          [-minimum-from VERSION] [-expires 2160h]
                                          write the manifest of an image, to be signed
  release sign FILE -key KEY [-out FILE]  sign a manifest in JSON, or add a signature to a signed one
  release show FILE                       show a signed manifest
  release publish FILE -image EFI [-percent 100]
                                          give the verifier the image and offer it to the laptops
  release percent VERSION -percent N      offer it to more or fewer
  release list                            what is offered, oldest first
  report list DEVICE | get ID [-out FILE] | key
  firmware export | import FILE           how common firmware is, between organisations

  card check REQUEST -release FILE -device ID
  card check REQUEST -release FILE -ak FILE | -report FILE -verifier-key FILE
                                          is this certificate request for a smart card by a key in that
                                          device's TPM? REQUEST is of "logind request -json", FILE of
                                          "seal sign"; a device of the verifier, or offline
  card permit -device ID -user ACCOUNT -do ACTION -reason WHY [-expires 8h]
                                          a permit for that laptop's card, to be signed by two: setup
                                          [-name N], import -chain FILE, pin < PIN, unblock, enrol or
                                          delete [-finger F], pin-only -minutes N
  card add FILE                           present it; the laptop fetches it and does it once
  card show DEVICE | request DEVICE       its permits; its certificate request, for card check
  card logons DEVICE                      the audit: who signed in when, by what, or was refused

  audit key | copy DIR | proof REPORT | verify COPY
                                          the log of all reports: attestctl audit -h
  verify REPORT | explain REPORT | diff A B   check reports offline: attestctl verify -h
  eventlog LOG | ek CERT | quote          judge anyone's samples without a verifier: attestctl eventlog -h

Flags may stand anywhere. -json prints JSON. "ticket write" needs no verifier.
"enroll" is another word for "ticket".

exit status: 0 done, or affirming; 1 not affirming (result last, device show,
policy simulate: somebody would be refused; policy status: held; card check:
issue no certificate), or not signed
by enough (policy verify, recovery release); 2 it could not be done or judged

flags
`

// defaultSocket is where a verifier's admin socket is.
const defaultSocket = "/run/sekisho-verifier/admin.sock"

// errUsage is a wrong command line.
var errUsage = errors.New("wrong command line; attestctl -h shows the commands")

func main() {
	for _, run := range []func([]string, io.Writer, io.Writer) (int, bool){samples, reports, audits} {
		if exit, ok := run(os.Args[1:], os.Stdout, os.Stderr); ok {
			os.Exit(exit)
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	exit := administer(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(exit)
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
