package winsvc

import (
	"bytes"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
)

// fake is a service manager whose service takes some queries to follow.
type fake struct {
	Status
	calls []string
	slow  int // queries until a command shows
	next  string
	fails error
}

func (f *fake) Install(args []string) error {
	f.calls, f.Args = append(f.calls, "install"), args
	f.State = "stopped"
	return f.fails
}

func (f *fake) Control(action string) error {
	f.calls = append(f.calls, action)
	f.next = map[string]string{"start": "running", "stop": "stopped", "uninstall": "absent"}[action]
	if action == "start" {
		f.State = "starting"
	}
	return f.fails
}

func (f *fake) Query() (Status, error) {
	if f.slow--; f.slow <= 0 && f.next != "" {
		f.State = f.next
	}
	return f.Status, nil
}

func TestCommands(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fake{Status: Status{State: "absent"}, slow: 3}
		var out bytes.Buffer
		args := []string{"-device", "wintun"}
		for _, c := range []string{"install", "start", "status", "uninstall"} {
			if err := Run(t.Context(), f, c, args, false, &out); err != nil {
				t.Fatal(err)
			}
		}
		if got := strings.Join(f.calls, " "); got != "install start stop uninstall" {
			t.Errorf("calls: %s", got)
		}
		if !slices.Equal(f.Args, args) || out.String() != "running\n" {
			t.Errorf("args %q, status %q", f.Args, &out)
		}
		out.Reset()
		if err := Run(t.Context(), f, "status", nil, true, &out); err != nil || !strings.HasPrefix(out.String(), `{"state":"absent"`) {
			t.Errorf("%v, %s", err, &out)
		}
	})
}

func TestCommandsThatFail(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, c := range []string{"install", "start", "stop", "uninstall"} {
			f := &fake{Status: Status{State: "stopped"}, fails: errors.New("access is denied")}
			if err := Run(t.Context(), f, c, nil, false, nil); err == nil || !strings.Contains(err.Error(), Name) {
				t.Errorf("%s: %v", c, err)
			}
		}
		if err := Run(t.Context(), &fake{}, "restart", nil, false, nil); err == nil {
			t.Error("an unknown command went through")
		}
		f := &fake{Status: Status{State: "stopped"}, slow: 1 << 20}
		f.State = "stopping"
		if err := Run(t.Context(), f, "stop", nil, false, nil); err == nil || !strings.Contains(err.Error(), "stopping") {
			t.Errorf("a service that hangs: %v", err)
		}
	})
}

type sink struct{ lines []string }

func (s *sink) Info(_ uint32, m string) error    { s.lines = append(s.lines, "I "+m); return nil }
func (s *sink) Warning(_ uint32, m string) error { s.lines = append(s.lines, "W "+m); return nil }
func (s *sink) Error(_ uint32, m string) error   { s.lines = append(s.lines, "E "+m); return nil }

func TestHandler(t *testing.T) {
	s := &sink{}
	l := slog.New(NewHandler(s)).With("adapter", "Sekisho")
	l.Debug("nothing")
	l.Info("state", "state", "linked")
	l.WithGroup("link").Warn("no link", "cause", errors.New("refused"))
	l.Error("ends")
	want := []string{`I state adapter="Sekisho" state="linked"`, `W no link adapter="Sekisho" link.cause="refused"`, `E ends adapter="Sekisho"`}
	if !slices.Equal(s.lines, want) {
		t.Errorf("%q", s.lines)
	}
}
