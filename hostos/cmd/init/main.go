//go:build linux

// Command init is PID 1 of the host domain. Run by hand it asks the running
// init for its status or for an orderly power-off.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"

	"sekisho/hostos/boot"
)

const usage = `init: PID 1 of the host domain

  init status [-json]   what init, its services and the work domain are doing
  init poweroff         orderly power-off: work domain, services, machine
  init wake             end the sleep of a work domain that is suspended
  init recover          open the work domain's disk by the recovery key on standard
                        input, and start the work domain
  init restart          orderly restart
  init update           ask the verifiers for a release now
  init update FILE      write a signed release to the slot that does not run; it is
                        tried at the next start, and becomes the good one once
                        attestation and tunnel succeed, otherwise the laptop goes back
  init wipe -yes        destroy the key of the work domain's disk, for ever and for
                        the recovery key too, and switch off

As PID 1 it takes no arguments and boots the host domain. The commands need
root. Exit codes: 0 done, 1 failed, 2 wrong usage.
`

func main() {
	switch args := os.Args[1:]; {
	case os.Getpid() == 1:
		// The kernel passes words of its command line that it does not know;
		// they are not for init.
		fail(boot.Run())
	case len(args) == 0:
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	case args[0] == "exec":
		fmt.Fprintln(os.Stderr, boot.Exec(args[1:]))
		os.Exit(boot.ExecFailed)
	case args[0] == "status":
		fail(status(args[1:]))
	case args[0] == "poweroff" && len(args) == 1:
		fail(boot.NewClient(boot.InitSocket).PowerOff(context.Background()))
	case args[0] == "wake" && len(args) == 1:
		fail(boot.NewClient(boot.InitSocket).Wake(context.Background()))
	case args[0] == "restart" && len(args) == 1:
		fail(boot.NewClient(boot.InitSocket).Restart(context.Background()))
	case args[0] == "update" && len(args) == 1:
		fail(boot.NewClient(boot.InitSocket).AskUpdate(context.Background()))
	case args[0] == "update" && len(args) == 2:
		fail(stage(args[1]))
	case args[0] == "recover" && len(args) == 1:
		fail(recoverDisk())
	case args[0] == "wipe" && len(args) == 2 && args[1] == "-yes":
		fail(boot.NewClient(boot.InitSocket).Wipe(context.Background()))
	case args[0] == "-h" || args[0] == "--help" || args[0] == "help":
		fmt.Print(usage)
	default:
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
}

func status(args []string) error {
	flags := flag.NewFlagSet("init status", flag.ExitOnError)
	asJSON := flags.Bool("json", false, "print the answer as JSON")
	_ = flags.Parse(args) // exits on error
	s, raw, err := boot.NewClient(boot.InitSocket).Status(context.Background())
	if err != nil {
		return err
	}
	if *asJSON {
		_, err = fmt.Printf("%s", raw)
		return err
	}
	boot.WriteStatus(os.Stdout, s)
	return nil
}

func stage(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	return boot.NewClient(boot.InitSocket).Update(context.Background(), f, st.Size())
}

func recoverDisk() error {
	typed, err := io.ReadAll(io.LimitReader(os.Stdin, 256))
	if err != nil {
		return err
	}
	return boot.NewClient(boot.InitSocket).Recover(context.Background(), string(typed))
}

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "init:", err)
		os.Exit(1)
	}
}
