package boot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"
)

const (
	// startTimeout is how long a service may take to say READY=1.
	startTimeout = 60 * time.Second
	// stopTimeout is how long it may take to end after SIGTERM.
	stopTimeout = 5 * time.Second
	// abortTimeout is how long a hung service gets, after SIGABRT, to leave a
	// trace of where it hangs in its log.
	abortTimeout = 2 * time.Second
	// logTimeout is how long output of processes that outlive their service is
	// still waited for.
	logTimeout = time.Second
)

// ServiceState is where a service stands. The zero value is stopped.
type ServiceState uint8

// States of a service; the words leave the process.
const (
	Stopped  ServiceState = 0
	Starting ServiceState = 1 // process runs, not ready yet
	Running  ServiceState = 2
	Waiting  ServiceState = 3 // ended, restart is due after the back-off
	Stopping ServiceState = 4
)

func (s ServiceState) String() string {
	switch s {
	case Starting:
		return "starting"
	case Running:
		return "running"
	case Waiting:
		return "waiting"
	case Stopping:
		return "stopping"
	}
	return "stopped"
}

// MarshalText implements encoding.TextMarshaler.
func (s ServiceState) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *ServiceState) UnmarshalText(b []byte) error {
	for v := Stopped; v <= Stopping; v++ {
		if v.String() == string(b) {
			*s = v
			return nil
		}
	}
	return fmt.Errorf("service state %q: not known", b)
}

// ServiceStatus is what init says of one service.
type ServiceStatus struct {
	Name     string       `json:"name"`
	State    ServiceState `json:"state"`
	Since    time.Time    `json:"since"`
	PID      int          `json:"pid"` // 0 while no process runs
	Restarts int          `json:"restarts"`
	Status   string       `json:"status"`    // last STATUS= of this run
	LastExit string       `json:"last_exit"` // how the last run ended
}

// supervisor runs services and restarts what ends.
type supervisor struct {
	children *children
	self     string // program that does `init exec`
	notify   string // path of the notify socket
	console  *console
	now      func() time.Time

	mu       sync.Mutex
	services []*supervised
}

// supervised is one service and what init keeps for it across its runs.
type supervised struct {
	Service
	listener *os.File // nil without a socket
	output   *os.File // write end of the log's pipe
	notes    chan notification
	stop     context.CancelFunc
	done     chan struct{}
	logged   chan struct{}

	mu     sync.Mutex // guards what follows
	status ServiceStatus
	final  bool // do not restart
}

func (s *supervised) set(f func(*ServiceStatus)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(&s.status)
}

// add opens what svc needs and runs it until ctx is done or drop is called.
func (v *supervisor) add(ctx context.Context, svc Service) (*supervised, error) {
	s := &supervised{Service: svc, notes: make(chan notification, 16), done: make(chan struct{}), logged: make(chan struct{})}
	s.status = ServiceStatus{Name: svc.Name, Since: v.now()}
	if svc.Dir != "" {
		if err := ownDir(svc.Dir, svc.User); err != nil {
			return nil, fmt.Errorf("%s: %w", svc.Name, err)
		}
	}
	if svc.Socket != "" {
		f, err := listenAPI(svc.Socket, svc.User)
		if err != nil {
			return nil, fmt.Errorf("%s: api socket: %w", svc.Name, err)
		}
		s.listener = f
	}
	path := svc.Log
	if path == "" {
		path = LogDir + "/" + svc.Name + ".log"
	}
	log, err := openLog(path)
	if err != nil {
		return nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("%s: log: %w", svc.Name, err)
	}
	s.output = w
	go func() {
		defer close(s.logged)
		io.Copy(log, r)
		r.Close()
		log.Close()
	}()
	ctx, s.stop = context.WithCancel(ctx)
	v.mu.Lock()
	v.services = append(v.services, s)
	v.mu.Unlock()
	go func() {
		defer close(s.done)
		v.run(ctx, s)
		s.output.Close()
		r.SetReadDeadline(v.now().Add(logTimeout))
		if s.listener != nil {
			s.listener.Close()
			os.Remove(svc.Socket)
		}
	}()
	return s, nil
}

// ownDir makes a directory for user and its group.
func ownDir(path, user string) error {
	if err := os.MkdirAll(path, 0o750); err != nil {
		return err
	}
	uid, _ := lookup(user)
	return os.Chown(path, int(uid), int(uid))
}

// listenAPI opens a unix stream socket, mode 0660, that belongs to user, or to
// the caller when user is empty.
func listenAPI(path, user string) (*os.File, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	defer l.Close()
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o660); err != nil {
		return nil, err
	}
	if user != "" {
		uid, _ := lookup(user)
		if err := os.Chown(path, int(uid), int(uid)); err != nil {
			return nil, err
		}
	}
	return l.File()
}

// run starts s again and again.
func (v *supervisor) run(ctx context.Context, s *supervised) {
	var wait time.Duration
	for {
		began := v.now()
		how := v.once(ctx, s)
		s.mu.Lock()
		final := s.final || ctx.Err() != nil
		ran := v.now().Sub(began)
		wait = nextWait(wait, ran)
		s.status.PID, s.status.Status, s.status.LastExit, s.status.Since = 0, "", how, v.now()
		s.status.State = Waiting
		if final {
			s.status.State = Stopped
		} else {
			s.status.Restarts++
		}
		s.mu.Unlock()
		if final {
			v.console.line(s.Name, "stopped (%s)", how)
			return
		}
		v.console.line(s.Name, "failed (%s), restart in %v", how, wait)
		select {
		case <-ctx.Done():
			s.set(func(st *ServiceStatus) { st.State = Stopped })
			return
		case <-time.After(wait):
		}
	}
}

// once runs s one time and returns how it ended, in words.
func (v *supervisor) once(ctx context.Context, s *supervised) string {
	if ctx.Err() != nil {
		return "not started"
	}
	for len(s.notes) > 0 {
		<-s.notes // of the run before
	}
	s.mu.Lock() // the first message must find the pid
	pid, exited, err := v.fork(s)
	if err != nil {
		s.mu.Unlock()
		return err.Error()
	}
	s.status.PID, s.status.Since, s.status.State = pid, v.now(), Running
	if s.Notify {
		s.status.State = Starting
	}
	s.mu.Unlock()
	if s.Started != nil {
		s.Started()
	}

	var limit <-chan time.Time
	timer := time.NewTimer(startTimeout)
	defer timer.Stop()
	if s.Notify {
		limit = timer.C
	}
	ready := !s.Notify
	stop := ctx.Done()
	var why string
	for {
		select {
		case ws := <-exited:
			if why != "" {
				return why + ", " + exitText(ws)
			}
			return exitText(ws)
		case n := <-s.notes:
			if v.noted(s, n, &ready) && ready && s.Watchdog > 0 && why == "" {
				limit = timer.C
				timer.Reset(s.Watchdog)
			} else if ready && s.Watchdog == 0 && why == "" {
				limit = nil
			}
		case <-stop:
			stop = nil
			s.set(func(st *ServiceStatus) { st.State = Stopping })
			why = "told to stop"
			v.children.signal(pid, syscall.SIGTERM)
			limit = timer.C
			timer.Reset(stopTimeout)
		case <-limit:
			if why != "" {
				v.children.signal(pid, syscall.SIGKILL)
				limit = nil
				continue
			}
			if why = "watchdog"; !ready {
				why = "not ready in time"
			}
			v.children.signal(pid, syscall.SIGABRT)
			timer.Reset(abortTimeout)
		}
	}
}

// noted takes one message and reports whether it shows that s is alive.
func (v *supervisor) noted(s *supervised, n notification, ready *bool) bool {
	becameReady := n.ready && !*ready
	s.set(func(st *ServiceStatus) {
		if becameReady {
			*ready = true
			if st.State == Starting {
				st.State, st.Since = Running, v.now()
			}
		}
		if n.hasState && n.status != st.Status {
			st.Status = n.status
			v.console.line(s.Name, "%s", n.status)
		}
	})
	return n.watchdog || becameReady
}

// fork starts the process of s by way of `init exec`.
func (v *supervisor) fork(s *supervised) (int, <-chan syscall.WaitStatus, error) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, nil, err
	}
	defer null.Close()
	files := []uintptr{null.Fd(), s.output.Fd(), s.output.Fd()}
	env := []string{"PATH=/bbin:/usr/bin:/bin", "HOME=/"}
	if s.Notify {
		env = append(env, "NOTIFY_SOCKET="+v.notify)
	}
	if s.listener != nil {
		files = append(files, s.listener.Fd())
		env = append(env, "LISTEN_FDS=1", "LISTEN_FDNAMES=api")
	}
	if s.Watchdog > 0 {
		env = append(env, "WATCHDOG_USEC="+strconv.FormatInt(s.Watchdog.Microseconds(), 10))
	}
	return v.children.start(v.self, append([]string{"init", "exec"}, s.Args...), &syscall.ProcAttr{
		Dir: "/", Env: env, Files: files, Sys: s.attributes(),
	}, s.Netns)
}

// attributes returns user, capabilities and namespace of s's process.
func (s *Service) attributes() *syscall.SysProcAttr {
	a := &syscall.SysProcAttr{Setsid: true}
	if s.User != "" {
		id, groups := lookup(s.User)
		a.Credential = &syscall.Credential{Uid: id, Gid: id, Groups: groups}
		a.AmbientCaps = s.Caps
	}
	if s.NewNetns {
		a.Cloneflags = syscall.CLONE_NEWNET
	}
	return a
}

// deliver hands a message to the service whose main process sent it. One that
// does not speak the protocol, such as QEMU, is not listened to.
func (v *supervisor) deliver(pid int, n notification) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, s := range v.services {
		s.mu.Lock()
		mine := s.status.PID == pid && s.Notify
		s.mu.Unlock()
		if mine {
			select {
			case s.notes <- n:
			default: // a service that floods its manager loses messages
			}
			return
		}
	}
}

// last makes the present run of s its last, however it ends.
func (s *supervised) last() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.final = true
}

// stopAll stops the services in the reverse order of starting.
func (v *supervisor) stopAll() {
	v.mu.Lock()
	services := v.services
	v.mu.Unlock()
	for i := len(services) - 1; i >= 0; i-- {
		services[i].stop()
		<-services[i].done
		<-services[i].logged
	}
}

// status returns the state of every service.
func (v *supervisor) status() []ServiceStatus {
	v.mu.Lock()
	defer v.mu.Unlock()
	list := make([]ServiceStatus, 0, len(v.services))
	for _, s := range v.services {
		s.mu.Lock()
		list = append(list, s.status)
		s.mu.Unlock()
	}
	return list
}

func exitText(ws syscall.WaitStatus) string {
	switch {
	case ws.Signaled():
		return "signal " + ws.Signal().String()
	case ws.ExitStatus() == ExecFailed:
		return "program could not be executed"
	}
	return fmt.Sprintf("exit status %d", ws.ExitStatus())
}
