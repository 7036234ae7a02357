package work

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// service is a program that is always running.
type service struct {
	args []string // args[0] is the program's path

	pid     int           // 0 while it does not run
	started time.Time     // of the last start
	delay   time.Duration // before the next start
	due     time.Time     // of the next start, while pid is 0
}

// Restarts back off from minDelay to maxDelay; a service that ran for as long
// as maxDelay begins anew. A service has stopGrace to end by itself at
// power-off.
const (
	minDelay  = 500 * time.Millisecond
	maxDelay  = 10 * time.Second
	stopGrace = 5 * time.Second
)

// supervisor keeps services running. As PID 1 it is the parent of every
// orphan, so it alone waits for children, by SIGCHLD, and nothing else of this
// process may start any.
type supervisor struct {
	log        *slog.Logger
	services   []*service
	childEnded <-chan os.Signal
	now        func() time.Time
}

// run starts the services, restarts those that end, and ends them all when ctx
// is done.
func (s *supervisor) run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			s.stop()
			return
		case <-s.childEnded:
			s.reap()
		case <-timer.C:
		}
		timer.Reset(s.startDue())
	}
}

// startDue starts what is due and returns the time until the next is.
func (s *supervisor) startDue() time.Duration {
	next := time.Hour
	for _, v := range s.services {
		if v.pid == 0 && !s.now().Before(v.due) {
			if err := v.start(s.now()); err != nil {
				s.log.Error("cannot start", "service", v.args[0], "err", err)
				v.ended(s.now())
			}
		}
		if v.pid == 0 {
			next = min(next, max(v.due.Sub(s.now()), time.Millisecond))
		}
	}
	return next
}

// start runs the service in a session of its own, with the console for its
// words.
func (v *service) start(now time.Time) error {
	v.started = now
	pid, err := syscall.ForkExec(v.args[0], v.args, &syscall.ProcAttr{
		Dir: "/", Env: []string{path, "HOME=/"},
		Files: []uintptr{0, 1, 2},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return fmt.Errorf("start %s: %w", v.args[0], err)
	}
	v.pid = pid
	return nil
}

// ended notes that the service does not run and when it shall again.
func (v *service) ended(now time.Time) {
	v.pid = 0
	if now.Sub(v.started) >= maxDelay {
		v.delay = 0
	}
	v.delay = min(max(2*v.delay, minDelay), maxDelay)
	v.due = now.Add(v.delay)
}

// reap waits for every child that has ended, ours and orphans.
func (s *supervisor) reap() {
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, unix.WNOHANG, nil)
		if err == unix.EINTR {
			continue
		}
		if pid <= 0 {
			return
		}
		for _, v := range s.services {
			if v.pid == pid {
				v.ended(s.now())
				s.log.Warn("service ended", "service", v.args[0], "status", describe(status), "pause", v.delay)
			}
		}
	}
}

// describe puts an exit status in words.
func describe(w unix.WaitStatus) string {
	if w.Signaled() {
		return "killed by " + w.Signal().String()
	}
	return fmt.Sprintf("exit %d", w.ExitStatus())
}

// stop ends every service: SIGTERM, and SIGKILL after stopGrace.
func (s *supervisor) stop() {
	s.signal(unix.SIGTERM)
	grace := time.NewTimer(stopGrace)
	defer grace.Stop()
	for {
		s.reap()
		if !s.running() {
			return
		}
		select {
		case <-s.childEnded:
		case <-grace.C:
			s.signal(unix.SIGKILL)
			return
		}
	}
}

func (s *supervisor) running() bool {
	for _, v := range s.services {
		if v.pid != 0 {
			return true
		}
	}
	return false
}

func (s *supervisor) signal(sig syscall.Signal) {
	for _, v := range s.services {
		if v.pid != 0 {
			if err := unix.Kill(v.pid, sig); err != nil {
				s.log.Warn("cannot signal", "service", v.args[0], "err", err)
			}
		}
	}
}
