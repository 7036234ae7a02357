// Command mkimage builds what the laptop boots: the signed host domain image
// with its reference values, the work domain's disk and the laptop's disk.
// "mkimage -h" says how.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"sekisho/images"
)

const usage = `mkimage builds what the laptop boots.

  mkimage keys                        make the Secure Boot keys (PK, KEK, db), or show them
  mkimage host -org FILE [-lab] [-version V]
                                      host domain: OUT/host.efi, signed; host.unsigned.efi;
                                      host.manifest.json; host.reference.json (for the verifier)
  mkimage host -tamper cmdline|kernel|initramfs -out out/tamper-X [-from out/host.efi]
                                      the same, correctly signed, with that component changed:
                                      boots, and must be refused by the verifier
  mkimage host -policy FILE [-from out/host.efi]
                                      put the signed policies for disk and logon keys into it
  mkimage work [-lab]                 stand-in work domain: OUT/work.img, work.manifest.json
  mkimage disk [-work out/work.img]   from OUT/host.efi: OUT/laptop.img and OUT/OVMF_VARS.fd
  mkimage predict FILE.efi            print the PCR values that a boot of FILE.efi gives

Order: host and work, then disk. A release has no lab hook and no shell; with -lab it has
both, and its os-release says so. Needs apt-get and the packages ovmf, mtools, syslinux and syslinux-common; not root.

Exit status: 0 done, 1 failed, 2 wrong use.

Options:
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// options are the flags of all commands.
type options struct {
	org, version, tamper, from, work, policy string
	lab, refresh, json                       bool
	build                                    images.Builder
}

// run is main with its surroundings as arguments; it returns the exit status.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	o := options{build: images.Builder{Now: time.Now, Progress: progress(stderr)}}
	f := flag.NewFlagSet("mkimage", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.Usage = func() { fmt.Fprint(stderr, usage); f.PrintDefaults() }
	f.StringVar(&o.build.Out, "out", "out", "`directory` for results")
	f.StringVar(&o.build.Keys, "keys", "out/keys", "`directory` of the Secure Boot keys, made on first use")
	f.StringVar(&o.build.Cache, "cache", "out/cache", "`directory` kept between builds")
	f.StringVar(&o.build.Source, "source", ".", "root `directory` of the source tree")
	f.StringVar(&o.org, "org", "", "organization.json `file` to build into the host image")
	f.StringVar(&o.version, "version", "0-dev", "`version` of the release")
	f.StringVar(&o.tamper, "tamper", "", "`component` to change: cmdline, kernel or initramfs")
	f.StringVar(&o.from, "from", "out/host.efi", "`image` that -tamper or -policy changes")
	f.StringVar(&o.policy, "policy", "", "signed policies of -from, to build into it: `file` by attestctl seal sign")
	f.StringVar(&o.work, "work", "out/work.img", "work domain's disk `image` for the laptop's disk")
	f.BoolVar(&o.lab, "lab", false, "build in the hooks of the virtual lab; never for a real laptop")
	f.BoolVar(&o.refresh, "refresh", false, "ask Debian's mirror for newer packages")
	f.BoolVar(&o.json, "json", false, "print the result as JSON")
	if len(args) == 0 {
		f.Usage()
		return 2
	}
	command, rest := args[0], args[1:]
	if command == "help" || command == "-h" || command == "--help" {
		f.SetOutput(stdout)
		fmt.Fprint(stdout, usage)
		f.PrintDefaults()
		return 0
	}
	// Flags may stand before and after the file of "predict".
	var files []string
	for {
		if err := f.Parse(rest); errors.Is(err, flag.ErrHelp) {
			return 0
		} else if err != nil {
			return 2
		}
		if f.NArg() == 0 {
			break
		}
		files, rest = append(files, f.Arg(0)), f.Args()[1:]
	}
	result, err := o.command(ctx, command, files)
	if misuse := usageError(""); errors.As(err, &misuse) {
		fmt.Fprintf(stderr, "mkimage: %v\nhint: mkimage -h\n", err)
		return 2
	}
	if err != nil {
		fmt.Fprintf(stderr, "mkimage: %v\n", err)
		return 1
	}
	if o.json {
		e := json.NewEncoder(stdout)
		e.SetIndent("", "\t")
		err = e.Encode(result)
	} else {
		err = result.print(stdout)
	}
	if err != nil {
		fmt.Fprintf(stderr, "mkimage: output: %v\n", err)
		return 1
	}
	return 0
}

// progress prints a line for each new step, with the seconds since the start.
func progress(w io.Writer) func(string, int64, int64) {
	start, last, quarter := time.Now(), "", int64(-1)
	return func(what string, done, total int64) {
		now := int64(0)
		if total > 0 {
			now = done * 4 / total // a line for each quarter of a long step
		}
		if what == last && now == quarter {
			return
		}
		if what == last && total > 0 {
			fmt.Fprintf(w, "mkimage [%6.1f] %s %d%%\n", time.Since(start).Seconds(), what, now*25)
		} else {
			fmt.Fprintf(w, "mkimage [%6.1f] %s\n", time.Since(start).Seconds(), what)
		}
		last, quarter = what, now
	}
}
