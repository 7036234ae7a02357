// lab is the virtual laptop and its surroundings, for trying and testing the
// whole of Sekisho on one machine.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"sekisho/images/lab"
)

const usage = `lab boots the laptop in QEMU, with a home, a site and an LGWAN around it in
network namespaces. Nothing leaves the machine. It has to run as root.

usage: lab [-accel auto|kvm|tcg] [-logon] COMMAND [-accel auto|kvm|tcg]

  run                          build what is missing, boot, show the page, then the
                               state until Ctrl-C; with ONCE=1 or without a terminal
                               it ends after the page. Writes out/run/report.json
  up [--json] [--no-tpm]       boot, a line per stage; the laptop stays up
  status [--json]              netd, attestation, tunnel, work domain, services
  exec PLACE -- CMD [ARG...]   run CMD in work, host (lab images only), home, site or
                               lgwan; the exit status is the command's
  capture start|stop NAME      record the home uplink into out/NAME.pcap
  capture check [FILE.pcap]    judge a capture, or this run's: anything but ARP, ND,
                               DHCP and TLS 1.3 to the site's servers is a leak
  uplink wired|wifi|lte up|down  the cable, an access point (WPA3, lab images only;
                               its network is saved in the laptop), a USB stick
  scenario NAME                exactly the uplinks of a place: home (cable, Wi-Fi),
                               desk (cable), cafe (Wi-Fi), train (stick), away (none)
                               other networks: office, hotel, udp-blocked, mtu-1280, black-hole
  tamper cmdline|kernel|initramfs   change one component, sign again, boot: runs, but
                               attestation must refuse it
  unsigned                     boot an image without signature: firmware must refuse it
  bench [--json]               boot times against a yardstick, sizes, and streams over
                               vsock, guest link and tunnel (what make bench runs)
  down                         power the laptop off in order, take the rest down

-logon: run builds a laptop that is a smart card; its work domain has pcscd, OpenSC, kinit
files: out/lab/*.log, out/run/console.log, out/run/uplink.pcap

exit status: 0 done, and for up the page was read; 1 failed; 2 wrong usage;
  3 attestation refused; 4 the firmware refused the image; 5 not done in time;
  6 the capture holds a leak. tamper gives 3 and unsigned 4 when all is well
`

// exitStatus says how main ends; other errors are 1.
type exitStatus int

func (e exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

var errUsage = errors.New("usage")

func main() {
	flag.Usage = func() { fmt.Fprint(os.Stderr, usage) }
	accel, logon := flag.String("accel", "auto", "auto, kvm or tcg"), flag.Bool("logon", false, "the laptop is a smart card")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := dispatch(ctx, *accel, *logon, flag.Args())
	var code exitStatus
	switch {
	case err == nil:
		return
	case errors.As(err, &code):
		os.Exit(int(code))
	case errors.Is(err, errUsage):
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
	fmt.Fprintln(os.Stderr, "lab:", err)
	switch {
	case lab.Refused(err):
		os.Exit(3)
	case lab.FirmwareRefused(err):
		os.Exit(4)
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, lab.ErrLate):
		os.Exit(5)
	}
	os.Exit(1)
}

func dispatch(ctx context.Context, accel string, logon bool, args []string) error {
	if len(args) == 0 {
		return errUsage
	}
	if args[0] == "helper" { // one of our own background processes
		return helper(ctx, args[1:])
	}
	l, err := lab.New(".", os.Stderr)
	if err != nil {
		return err
	}
	l.Logon = logon
	if l.Accel, args, err = accelIn(accel, args); err != nil {
		return err
	}
	c, known := commands[args[0]]
	if !known {
		return errUsage
	}
	if c.changes {
		unlock, err := l.Lock()
		if err != nil {
			return err
		}
		defer unlock()
	}
	return c.do(ctx, l, args[1:])
}

// helper is what the lab starts and leaves running.
func helper(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return errUsage
	}
	switch args[0] {
	case "page":
		return lab.ServePage(ctx)
	case "assets":
		return lab.ServeAssets(ctx, lab.AssetsAddress)
	case "portal":
		return lab.ServePortal(ctx, lab.PortalAddress)
	case "sink":
		return lab.ServeSink(ctx, os.Stdout)
	case "probes":
		return lab.Probes(ctx, os.Stdout)
	case "console":
		// The end of the console is the end of QEMU; a signal would lose lines.
		return lab.StampConsole(os.Stdin, os.Stdout, time.Now)
	case "capture":
		if len(args) != 3 {
			return errUsage
		}
		return lab.RecordUplink(ctx, args[1], args[2], os.Stdout)
	}
	return errUsage
}

// terminal reports whether f is one.
func terminal(f *os.File) bool {
	st, err := f.Stat()
	return err == nil && st.Mode()&os.ModeCharDevice != 0 && st.Mode()&os.ModeDevice != 0 && f.Name() != os.DevNull
}
