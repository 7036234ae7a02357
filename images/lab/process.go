package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// process is one that the lab started and left running. A process id is used
// again some day, so it only counts together with its start time.
type process struct {
	Name  string `json:"name"`
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // proc_pid_stat(5) field 22, clock ticks since boot
}

// startTime returns when pid was started; ok is false when there is no such
// process, or only what is left of one that ended.
func startTime(pid int) (ticks uint64, ok bool) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, false
	}
	// The name may hold anything; the fields go on after its last parenthesis.
	fields := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(fields) < 20 || bytes.ContainsAny(fields[0], "ZX") {
		return 0, false
	}
	ticks, err = strconv.ParseUint(string(fields[19]), 10, 64)
	return ticks, err == nil
}

func (p process) alive() bool {
	start, ok := startTime(p.PID)
	return ok && start == p.Start
}

// kill sends a signal, unless the process is not ours any more.
func (p process) kill(s syscall.Signal) error {
	if !p.alive() {
		return fmt.Errorf("lab: %s is not running", p.Name)
	}
	return syscall.Kill(p.PID, s)
}

// wait returns when the process has ended.
func (p process) wait(ctx context.Context) error {
	return waitFor(ctx, "the end of "+p.Name, func() (bool, error) {
		// A child of ours has to be reaped; others are not ours to wait for.
		_, _ = unix.Wait4(p.PID, nil, unix.WNOHANG, nil)
		return !p.alive(), nil
	})
}

// stop asks the process to end, and makes it end when grace is over.
func (p process) stop(ctx context.Context, grace time.Duration) error {
	if !p.alive() {
		return nil
	}
	if err := p.kill(syscall.SIGTERM); err != nil {
		return err
	}
	soft, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	if p.wait(soft) == nil {
		return nil
	}
	if err := p.kill(syscall.SIGKILL); err != nil && p.alive() {
		return err
	}
	hard, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	return p.wait(hard)
}

// spec says how to start a process.
type spec struct {
	name      string
	namespace string // full name, empty for ours
	argv      []string
	env       []string
	stdin     *os.File // nil: nothing
	stdout    *os.File // nil: the log
}

// start runs a process detached from this one, with its output in
// out/lab/NAME.log, and remembers it for the invocations to come.
func (l *Lab) start(s spec) (process, error) {
	log, err := os.OpenFile(l.lab(s.name+".log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return process{}, fmt.Errorf("lab: %w", err)
	}
	defer log.Close()
	c := exec.Command(s.argv[0], s.argv[1:]...)
	c.Dir, c.Env = l.Root, append(os.Environ(), s.env...)
	c.Stdout, c.Stderr = log, log
	if s.stdin != nil {
		c.Stdin = s.stdin
	}
	if s.stdout != nil {
		c.Stdout = s.stdout
	}
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := inNamespace(s.namespace, c.Start); err != nil {
		return process{}, fmt.Errorf("lab: start %s: %w", s.name, err)
	}
	p := process{Name: s.name, PID: c.Process.Pid}
	var ok bool
	if p.Start, ok = startTime(p.PID); !ok {
		return p, fmt.Errorf("lab: %s ended at once; see %s", s.name, l.lab(s.name+".log"))
	}
	return p, l.update(func(st *state) {
		st.Processes = slices.DeleteFunc(st.Processes, func(o process) bool { return o.Name == s.name })
		st.Processes = append(st.Processes, p)
	})
}

// find returns the running process of that name.
func (l *Lab) find(name string) (process, error) {
	s, err := l.load()
	if err != nil {
		return process{}, err
	}
	for _, p := range s.Processes {
		if p.Name == name && p.alive() {
			return p, nil
		}
	}
	return process{}, fmt.Errorf("lab: %s is not running", name)
}

// stopAll ends what is left running, last started first.
func (l *Lab) stopAll(ctx context.Context) error {
	s, err := l.load()
	if err != nil {
		return err
	}
	var errs []error
	for _, p := range slices.Backward(s.Processes) {
		errs = append(errs, p.stop(ctx, 5*time.Second))
	}
	return errors.Join(errs...)
}
