// Command workinit is PID 1 of the Linux work domain that stands in for
// Windows. It starts guestagent (and labguest in lab images), restarts them
// when they die, and powers off when the power button is pressed.
package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"

	"sekisho/images/work"
)

const usage = `workinit is PID 1 of the Linux that stands in for Windows in the work domain.
The kernel starts it as /init. It mounts, loads modules, keeps guestagent
running, prints "work domain up" on the console and powers off when the power
button is pressed or on SIGTERM.

Exit status: 1 when it is not PID 1; as PID 1 it does not exit.
`

func main() {
	flag.Usage = func() { fmt.Fprint(os.Stderr, usage) }
	flag.Parse()
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	if os.Getpid() != 1 {
		log.Error("workinit is not PID 1; it runs only as init of a virtual machine")
		os.Exit(1)
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	work.Run(ctx, log)
	if err := work.PowerOff(); err != nil {
		log.Error("cannot power off", "err", err)
	}
	select {} // PID 1 must not exit: the kernel would panic
}
