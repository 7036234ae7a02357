package winsvc

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/windows"
	"golang.org/x/sys/windows/svc"
	"golang.org/x/sys/windows/svc/eventlog"
	"golang.org/x/sys/windows/svc/mgr"
)

// System is the service control manager of this machine.
type System struct{}

// Install registers this program with args, to be started with Windows and
// again whenever it fails, and its source of the event log.
func (System) Install(args []string) error {
	path, err := os.Executable()
	if err != nil {
		return err
	}
	m, err := mgr.Connect()
	if err != nil {
		return err
	}
	defer m.Disconnect()
	s, err := m.CreateService(Name, path, mgr.Config{
		StartType: mgr.StartAutomatic, ErrorControl: mgr.ErrorNormal,
		DisplayName: DisplayName, Description: Description,
	}, append([]string{Argument}, args...)...)
	if err != nil {
		return err
	}
	defer s.Close()
	restart := []mgr.RecoveryAction{
		{Type: mgr.ServiceRestart, Delay: time.Second},
		{Type: mgr.ServiceRestart, Delay: 5 * time.Second},
		{Type: mgr.ServiceRestart, Delay: 30 * time.Second},
	}
	const forget = 3600 // seconds without a failure after which the count begins anew
	if err := s.SetRecoveryActions(restart, forget); err != nil {
		s.Delete()
		return fmt.Errorf("set recovery: %w", err)
	}
	// An exit with an error counts as a failure too. Old systems lack the option.
	s.SetRecoveryActionsOnNonCrashFailures(true)
	if err := eventlog.InstallAsEventCreate(Name, eventlog.Error|eventlog.Warning|eventlog.Info); err != nil {
		s.Delete()
		return fmt.Errorf("event log: %w", err)
	}
	return nil
}

// Control implements Manager.
func (System) Control(action string) error {
	return with(func(s *mgr.Service) error {
		switch action {
		case "start":
			return s.Start()
		case "stop":
			_, err := s.Control(svc.Stop)
			return err
		case "uninstall":
			return errors.Join(s.Delete(), eventlog.Remove(Name))
		}
		return fmt.Errorf("action %q", action)
	})
}

// Query implements Manager. A service that does not exist is "absent".
func (System) Query() (Status, error) {
	var st Status
	err := with(func(s *mgr.Service) error {
		q, err := s.Query()
		if err != nil {
			return err
		}
		st.State, st.PID = stateWord(q.State), q.ProcessId
		start, line, err := config(s.Handle)
		if err != nil {
			return err
		}
		switch start {
		case mgr.StartAutomatic:
			st.Start = "automatic"
		case mgr.StartManual:
			st.Start = "manual"
		case mgr.StartDisabled:
			st.Start = "disabled"
		}
		st.Args, err = windows.DecomposeCommandLine(line)
		if len(st.Args) > 1 && st.Args[1] == Argument {
			st.Args = st.Args[2:]
		}
		return err
	})
	if errors.Is(err, windows.ERROR_SERVICE_DOES_NOT_EXIST) {
		return Status{State: "absent"}, nil
	}
	return st, err
}

// config returns how the service starts and by which command line. The package
// mgr asks for more, which not every system answers.
func config(h windows.Handle) (start uint32, line string, err error) {
	const limit = 8 << 10 // bytes, the most that the call needs (QueryServiceConfigW)
	buf := make([]uint64, limit/8)
	c := (*windows.QUERY_SERVICE_CONFIG)(unsafe.Pointer(&buf[0]))
	var need uint32
	if err := windows.QueryServiceConfig(h, c, limit, &need); err != nil {
		return 0, "", err
	}
	return c.StartType, windows.UTF16PtrToString(c.BinaryPathName), nil
}

func with(f func(*mgr.Service) error) error {
	m, err := mgr.Connect()
	if err != nil {
		return err
	}
	defer m.Disconnect()
	s, err := m.OpenService(Name)
	if err != nil {
		return err
	}
	defer s.Close()
	return f(s)
}

func stateWord(s svc.State) string {
	switch s {
	case svc.Stopped:
		return "stopped"
	case svc.StartPending, svc.ContinuePending:
		return "starting"
	case svc.StopPending, svc.PausePending:
		return "stopping"
	case svc.Running:
		return "running"
	}
	return fmt.Sprintf("state %d", s)
}

// Serve runs f as the service until the service manager stops it or f ends.
func Serve(f func(ctx context.Context) error) error {
	return svc.Run(Name, service{f})
}

// service implements svc.Handler.
type service struct{ run func(context.Context) error }

func (s service) Execute(_ []string, requests <-chan svc.ChangeRequest, changes chan<- svc.Status) (specific bool, code uint32) {
	const accepts = svc.AcceptStop | svc.AcceptShutdown
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	done := make(chan error, 1)
	changes <- svc.Status{State: svc.StartPending}
	go func() { done <- s.run(ctx) }()
	changes <- svc.Status{State: svc.Running, Accepts: accepts}
	for {
		select {
		case err := <-done:
			changes <- svc.Status{State: svc.StopPending}
			if err != nil && ctx.Err() == nil {
				return true, 1
			}
			return false, 0
		case r := <-requests:
			switch r.Cmd {
			case svc.Interrogate:
				changes <- r.CurrentStatus
			case svc.Stop, svc.Shutdown:
				changes <- svc.Status{State: svc.StopPending}
				cancel()
			}
		}
	}
}

// OpenLog opens the event log under the service's name.
func OpenLog() (*eventlog.Log, error) { return eventlog.Open(Name) }
