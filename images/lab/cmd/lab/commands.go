package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"sekisho/images/lab"
	"sekisho/images/lab/capture"
	"sekisho/images/lab/hook"
)

// command is one of lab's; changes: it makes or unmakes the lab, so only one
// of them runs at a time.
type command struct {
	changes bool
	do      func(context.Context, *lab.Lab, []string) error
}

var commands = map[string]command{
	"run":      {true, run},
	"up":       {true, up},
	"down":     {true, down},
	"tamper":   {true, tamper},
	"unsigned": {true, unsigned},
	"status":   {false, status},
	"exec":     {false, execute},
	"capture":  {false, captures},
	"uplink":   {true, plug},
	"scenario": {true, scenario},
	"bench":    {true, bench},
}

func run(ctx context.Context, l *lab.Lab, args []string) error {
	if len(args) != 0 {
		return errUsage
	}
	if err := l.Build(ctx); err != nil {
		return err
	}
	once := os.Getenv("ONCE") == "1" || !terminal(os.Stdout)
	return l.Run(ctx, lab.Boot{}, once)
}

func bench(ctx context.Context, l *lab.Lab, args []string) error {
	asJSON := false
	rest, err := options("bench", args, func(f *flag.FlagSet) { f.BoolVar(&asJSON, "json", false, "figures as JSON") })
	if err != nil || len(rest) != 0 {
		return errUsage
	}
	if err := l.Build(ctx); err != nil {
		return err
	}
	b, err := l.Bench(ctx)
	if err != nil {
		return err
	}
	if asJSON {
		return printJSON(b)
	}
	fmt.Print(b)
	return nil
}

// accelIn takes -accel out of what stands behind a command's name, up to the
// "--" after which the words are another program's; otherwise accel holds.
func accelIn(accel string, args []string) (string, []string, error) {
	own := slices.Index(args, "--")
	if own < 0 {
		own = len(args)
	}
	rest := []string{}
	for i := 0; i < own; i++ {
		name, value, given := strings.Cut(args[i], "=")
		if name != "-accel" && name != "--accel" {
			rest = append(rest, args[i])
			continue
		}
		if !given {
			if i++; i >= own {
				return "", nil, errUsage
			}
			value = args[i]
		}
		accel = value
	}
	return accel, append(rest, args[own:]...), nil
}

// options parses flags that come after a command's name.
func options(name string, args []string, define func(*flag.FlagSet)) ([]string, error) {
	f := flag.NewFlagSet(name, flag.ContinueOnError)
	f.SetOutput(io.Discard)
	define(f)
	if f.Parse(args) != nil {
		return nil, errUsage
	}
	return f.Args(), nil
}

func printJSON(v any) error {
	e := json.NewEncoder(os.Stdout)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

func up(ctx context.Context, l *lab.Lab, args []string) error {
	var b lab.Boot
	asJSON := false
	rest, err := options("up", args, func(f *flag.FlagSet) {
		f.BoolVar(&asJSON, "json", false, "result as JSON")
		f.BoolVar(&b.NoTPM, "no-tpm", false, "a machine without TPM")
		f.DurationVar(&b.Life, "life", 0, "lifetime of a device's certificate")
		f.DurationVar(&b.Timeout, "timeout", 0, "time for all of it")
	})
	if err != nil || len(rest) != 0 {
		return errUsage
	}
	return boot(ctx, l, b, asJSON)
}

func boot(ctx context.Context, l *lab.Lab, b lab.Boot, asJSON bool) error {
	r, err := l.Up(ctx, b)
	if asJSON {
		if perr := printJSON(r); perr != nil {
			return perr
		}
	} else if r.OK {
		fmt.Print(r.Page)
	}
	return err
}

func tamper(ctx context.Context, l *lab.Lab, args []string) error {
	if len(args) != 1 || !slices.Contains(lab.Components(), args[0]) {
		return errUsage
	}
	image, err := l.Tamper(args[0])
	if err != nil {
		return err
	}
	return boot(ctx, l, lab.Boot{Image: image}, false)
}

func unsigned(ctx context.Context, l *lab.Lab, args []string) error {
	if len(args) != 0 {
		return errUsage
	}
	image, err := l.Unsign()
	if err != nil {
		return err
	}
	return boot(ctx, l, lab.Boot{Image: image}, false)
}

func down(ctx context.Context, l *lab.Lab, args []string) error {
	if len(args) != 0 {
		return errUsage
	}
	return l.Down(ctx)
}

func status(ctx context.Context, l *lab.Lab, args []string) error {
	asJSON := false
	rest, err := options("status", args, func(f *flag.FlagSet) { f.BoolVar(&asJSON, "json", false, "as JSON") })
	if err != nil || len(rest) != 0 {
		return errUsage
	}
	s, err := l.Status(ctx)
	if err != nil {
		return err
	}
	if asJSON {
		return printJSON(s)
	}
	fmt.Print(s)
	return nil
}

func execute(ctx context.Context, l *lab.Lab, args []string) error {
	if len(args) > 1 && args[1] == "--" {
		args = slices.Delete(slices.Clone(args), 1, 2)
	}
	if len(args) < 2 {
		return errUsage
	}
	if c, ok := lab.InPlace(ctx, args[0], args[1:]); ok {
		c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
		return exitOf(c.Run())
	}
	target := hook.Target(args[0])
	if target != hook.Host && target != hook.Work {
		return errUsage
	}
	r := hook.Request{Target: target, Argv: args[1:], Timeout: 5 * time.Minute}
	if !terminal(os.Stdin) {
		in, err := io.ReadAll(io.LimitReader(os.Stdin, 1<<20))
		if err != nil {
			return err
		}
		r.Stdin = in
	}
	a, err := l.Call(ctx, r)
	if err != nil {
		return err
	}
	os.Stdout.Write(a.Stdout)
	os.Stderr.Write(a.Stderr)
	if a.Cut {
		fmt.Fprintln(os.Stderr, "lab: the output was longer than is kept")
	}
	if a.Exit != 0 {
		return exitStatus(a.Exit)
	}
	return nil
}

// exitOf turns a command's own failure into ours.
func exitOf(err error) error {
	if e, ok := err.(*exec.ExitError); ok && e.ExitCode() > 0 {
		return exitStatus(e.ExitCode())
	}
	return err
}

func captures(ctx context.Context, l *lab.Lab, args []string) error {
	switch {
	case len(args) == 2 && args[0] == "start":
		return l.StartCapture(ctx, args[1])
	case len(args) == 2 && args[0] == "stop":
		return l.StopCapture(ctx, args[1])
	case (len(args) == 1 || len(args) == 2) && args[0] == "check":
		check := l.CheckUplink // from the first frame on
		if len(args) == 2 {
			check = func() (capture.Report, error) { return lab.CheckFile(args[1]) }
		}
		r, err := check()
		if err != nil {
			return err
		}
		clean := r.Clean()
		fmt.Println(&r)
		if len(args) == 1 {
			others, err := l.CheckOthers()
			if err != nil {
				return err
			}
			for name, o := range others {
				fmt.Printf("%s: %s\n", name, &o)
				r.Leaks, clean = append(r.Leaks, o.Leaks...), clean && o.Leaked == 0
			}
		}
		for _, leak := range r.Leaks {
			fmt.Println(strings.TrimSpace(leak.String()))
		}
		if !clean {
			return exitStatus(6)
		}
		return nil
	}
	return errUsage
}

func plug(ctx context.Context, l *lab.Lab, args []string) error {
	if len(args) != 2 || !slices.Contains(lab.Uplinks(), args[0]) || args[1] != "up" && args[1] != "down" {
		return errUsage
	}
	return l.Uplink(ctx, args[0], args[1] == "up")
}

func scenario(ctx context.Context, l *lab.Lab, args []string) error {
	if len(args) != 1 {
		return errUsage
	}
	network, place := slices.Contains(lab.Surroundings(), args[0]), slices.Contains(lab.Scenarios(), args[0])
	if !network && !place {
		return errUsage
	}
	if network {
		if err := l.Surround(ctx, args[0]); err != nil {
			return err
		}
	}
	if place {
		return l.Scenario(ctx, args[0])
	}
	return nil
}
