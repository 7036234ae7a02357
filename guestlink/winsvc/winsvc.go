// Package winsvc is guestagent as a Windows service: the subcommands that
// install and control it, and its log. What decides is the same on every
// platform; the service manager and the event log are behind interfaces.
package winsvc

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"time"
)

// Names under which Windows knows the service.
const (
	Name        = "SekishoGuestAgent"
	DisplayName = "Sekisho guest agent"
	// Argument is the subcommand by which the service manager starts the program.
	Argument    = "service"
	Description = "Carries this computer's network traffic to the host domain. Without it there is no network."
)

// Status is what the service manager says of the service.
type Status struct {
	State string   `json:"state"` // "absent", "stopped", "starting", "running" or "stopping"
	PID   uint32   `json:"pid,omitempty"`
	Start string   `json:"start,omitempty"` // "automatic", or what else an administrator has set
	Args  []string `json:"args,omitempty"`
}

// Manager is the service control manager.
type Manager interface {
	Install(args []string) error // starts with Windows, before logon
	Control(action string) error // "start", "stop" or "uninstall"
	Query() (Status, error)
}

// Commands are the subcommands, in the order of the help text.
func Commands() []string { return []string{"install", "start", "stop", "status", "uninstall"} }

// patience is how long start and stop wait for the service to follow.
const patience = 30 * time.Second

// Run carries out one of Commands. Args are given to the service at each start
// (install only). With asJSON, status writes JSON.
func Run(ctx context.Context, m Manager, command string, args []string, asJSON bool, out io.Writer) error {
	switch command {
	case "install":
		if err := m.Install(args); err != nil {
			return fmt.Errorf("install service %s: %w; is this an elevated prompt?", Name, err)
		}
		return nil
	case "start":
		return follow(ctx, m, command, "running")
	case "stop":
		return follow(ctx, m, command, "stopped")
	case "uninstall":
		if s, err := m.Query(); err == nil && s.State == "running" {
			if err := follow(ctx, m, "stop", "stopped"); err != nil {
				return err
			}
		}
		if err := m.Control(command); err != nil {
			return fmt.Errorf("uninstall service %s: %w", Name, err)
		}
		return nil
	case "status":
		s, err := m.Query()
		if err != nil {
			return fmt.Errorf("ask for service %s: %w", Name, err)
		}
		if asJSON {
			return json.NewEncoder(out).Encode(s)
		}
		line := s.State
		if s.PID != 0 {
			line += fmt.Sprintf(", process %d", s.PID)
		}
		if s.Start != "" {
			line += ", start " + s.Start
		}
		_, err = fmt.Fprintln(out, line)
		return err
	}
	return fmt.Errorf("command %q: want one of %s", command, strings.Join(Commands(), ", "))
}

// follow gives a command and waits until the service is in state.
func follow(ctx context.Context, m Manager, command, state string) error {
	if err := m.Control(command); err != nil {
		return fmt.Errorf("%s service %s: %w", command, Name, err)
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		s, err := m.Query()
		if err != nil {
			return fmt.Errorf("ask for service %s: %w", Name, err)
		}
		if s.State == state {
			return nil
		}
		if command == "start" && s.State == "stopped" {
			return fmt.Errorf("service %s stopped again: see the event log, source %s", Name, Name)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s service %s: it is %s after %s", command, Name, s.State, patience)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// EventLog is a Windows event log.
type EventLog interface {
	Info(id uint32, msg string) error
	Warning(id uint32, msg string) error
	Error(id uint32, msg string) error
}

// eventID is the number of all our events: their text says the rest.
const eventID = 1

// NewHandler returns a slog.Handler that writes to l, from slog.LevelInfo up.
func NewHandler(l EventLog) slog.Handler { return &handler{log: l} }

type handler struct {
	log    EventLog
	prefix string
	attrs  []string
}

func (h *handler) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelInfo }

func (h *handler) Handle(_ context.Context, r slog.Record) error {
	words := append([]string{r.Message}, h.attrs...)
	r.Attrs(func(a slog.Attr) bool { words = append(words, h.word(a)); return true })
	msg := strings.Join(words, " ")
	switch {
	case r.Level >= slog.LevelError:
		return h.log.Error(eventID, msg)
	case r.Level >= slog.LevelWarn:
		return h.log.Warning(eventID, msg)
	}
	return h.log.Info(eventID, msg)
}

func (h *handler) word(a slog.Attr) string {
	return fmt.Sprintf("%s%s=%q", h.prefix, a.Key, a.Value.Resolve().String())
}

func (h *handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	c := *h
	c.attrs = slices.Clone(h.attrs)
	for _, a := range attrs {
		c.attrs = append(c.attrs, h.word(a))
	}
	return &c
}

func (h *handler) WithGroup(name string) slog.Handler {
	c := *h
	if name != "" {
		c.prefix += name + "."
	}
	return &c
}
