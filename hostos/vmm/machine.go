package vmm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// State is where the work domain stands. The zero value is absent.
type State uint8

// States of the work domain; the words leave the process.
const (
	Absent    State = 0 // no QEMU, or it does not answer
	Running   State = 1
	Paused    State = 2
	Shutdown  State = 3 // it has switched itself off
	Panicked  State = 4 // its kernel reported that it cannot go on
	Suspended State = 5 // it sleeps (ACPI S3) until Wake
)

func (s State) String() string {
	switch s {
	case Running:
		return "running"
	case Paused:
		return "paused"
	case Shutdown:
		return "shutdown"
	case Panicked:
		return "panicked"
	case Suspended:
		return "suspended"
	}
	return "absent"
}

// MarshalText implements encoding.TextMarshaler.
func (s State) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *State) UnmarshalText(b []byte) error {
	for v := Absent; v <= Suspended; v++ {
		if v.String() == string(b) {
			*s = v
			return nil
		}
	}
	return fmt.Errorf("work domain state %q: not known", b)
}

// Status is what is known of the work domain.
type Status struct {
	State  State     `json:"state"`
	Since  time.Time `json:"since"`
	Resets int       `json:"resets"` // restarts that the guest made itself
	Detail string    `json:"detail"`
}

// retryDial is how long to wait between attempts to reach a QEMU that is not
// there yet; it is on the same machine and opens its socket first thing.
const retryDial = 100 * time.Millisecond

// Machine follows one work domain over QMP, across restarts of QEMU.
type Machine struct {
	path    string
	now     func() time.Time
	changed func(Status)

	mu     sync.Mutex
	status Status
	conn   *qmp
}

// NewMachine returns a Machine whose control socket is path. Changed is called
// at every change of state.
func NewMachine(path string, now func() time.Time, changed func(Status)) *Machine {
	return &Machine{path: path, now: now, changed: changed, status: Status{Since: now(), Detail: "not started"}}
}

// Status returns the present status.
func (m *Machine) Status() Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.status
}

func (m *Machine) set(s State, detail string) {
	m.mu.Lock()
	if m.status.State == s && m.status.Detail == detail {
		m.mu.Unlock()
		return
	}
	m.status.State, m.status.Detail, m.status.Since = s, detail, m.now()
	st := m.status
	m.mu.Unlock()
	m.changed(st)
}

// Run follows the machine until ctx is done.
func (m *Machine) Run(ctx context.Context) {
	for ctx.Err() == nil {
		if err := m.follow(ctx); err != nil && !errors.Is(err, os.ErrNotExist) {
			if s := m.Status().State; s == Running || s == Paused || s == Suspended {
				detail := "QEMU does not answer: " + err.Error()
				if errors.Is(err, io.EOF) {
					detail = "QEMU has ended"
				}
				m.set(Absent, detail)
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(retryDial):
		}
	}
}

// follow keeps one connection until it ends.
func (m *Machine) follow(ctx context.Context) error {
	q, err := dialQMP(ctx, m.path, m.event)
	if err != nil {
		return err
	}
	defer q.close()
	stop := context.AfterFunc(ctx, func() { q.conn.Close() })
	defer stop()
	m.mu.Lock()
	m.conn = q
	m.mu.Unlock()
	err = q.execute(ctx, "query-status", func(b json.RawMessage) error {
		var st struct {
			Status string `json:"status"`
		}
		if err := json.Unmarshal(b, &st); err != nil {
			return err
		}
		m.set(runState(st.Status), "")
		return nil
	})
	if err != nil {
		q.conn.Close()
	}
	<-q.done
	m.mu.Lock()
	m.conn = nil
	m.mu.Unlock()
	return errors.Join(err, q.err)
}

// runState maps QEMU's RunState (qapi/run-state.json) to ours.
func runState(s string) State {
	switch s {
	case "running":
		return Running
	case "shutdown":
		return Shutdown
	case "guest-panicked":
		return Panicked
	case "suspended":
		return Suspended
	}
	return Paused
}

// event maps an event of qapi/run-state.json to a state.
func (m *Machine) event(e event) {
	switch e.Name {
	case "SHUTDOWN":
		var d struct {
			Guest  bool   `json:"guest"`
			Reason string `json:"reason"`
		}
		if err := json.Unmarshal(e.Data, &d); err != nil {
			return
		}
		// After a panic QEMU reports a shutdown too: the panic is the news.
		if m.Status().State == Panicked {
			return
		}
		if d.Reason == "guest-shutdown" {
			m.set(Shutdown, "the work domain switched itself off")
		} else {
			m.set(Absent, "QEMU ends")
		}
	case "RESET":
		m.mu.Lock()
		m.status.Resets++
		m.mu.Unlock()
		m.set(Running, "")
	case "GUEST_PANICKED":
		m.set(Panicked, "the work domain's kernel panicked")
	case "STOP":
		m.set(Paused, "")
	case "SUSPEND":
		m.set(Suspended, "the work domain sleeps")
	case "RESUME", "WAKEUP":
		m.set(Running, "")
	}
}

var errNoConnection = errors.New("qmp: no connection to QEMU")

// PowerDown presses the work domain's power button (ACPI). The work domain
// decides what to do about it; one that sleeps is woken first, to hear it.
func (m *Machine) PowerDown(ctx context.Context) error {
	if m.Status().State == Suspended {
		if err := m.Wake(ctx); err != nil {
			return err
		}
	}
	return m.press(ctx, "system_powerdown")
}

// Wake ends the work domain's sleep. It is an error if it does not sleep.
func (m *Machine) Wake(ctx context.Context) error { return m.press(ctx, "system_wakeup") }

// press executes a command without arguments or answer.
func (m *Machine) press(ctx context.Context, command string) error {
	m.mu.Lock()
	q := m.conn
	m.mu.Unlock()
	if q == nil {
		return errNoConnection
	}
	return q.execute(ctx, command, nil)
}

// Prepare makes dir, which belongs to uid alone, with a fresh copy of the
// firmware variables, and returns c with its paths in dir.
func Prepare(c Config, dir, vars string, uid int) (Config, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return c, fmt.Errorf("work domain: %w", err)
	}
	c.Vars, c.QMP = filepath.Join(dir, "vars.fd"), filepath.Join(dir, "qmp.sock")
	owned := []string{dir}
	if !c.BIOS {
		if err := copyFile(c.Vars, vars); err != nil {
			return c, fmt.Errorf("work domain: firmware variables: %w", err)
		}
		owned = append(owned, c.Vars)
	}
	for _, p := range owned {
		if err := os.Chown(p, uid, uid); err != nil {
			return c, fmt.Errorf("work domain: %w", err)
		}
	}
	return c, nil
}

func copyFile(to, from string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	return errors.Join(err, dst.Close())
}
