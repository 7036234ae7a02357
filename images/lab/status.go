package lab

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"sekisho/hostos/disk"
	"sekisho/hostos/update"
	"sekisho/images/lab/hook"
)

// daemons of the host domain that answer GET /v1/status.
var daemons = []string{"netd", "attestd", "linkd", "init"}

// DaemonStatus is what docs/host-domain.md asks of every daemon; Body is all
// that it answered.
type DaemonStatus struct {
	State  string          `json:"state"`
	Since  time.Time       `json:"since"`
	Reason string          `json:"reason,omitempty"`
	Detail string          `json:"detail,omitempty"`
	Body   json.RawMessage `json:"body,omitempty"`
}

// Status is the state of the laptop and its surroundings.
type Status struct {
	Up       bool                    `json:"up"` // QEMU runs
	Image    string                  `json:"image,omitempty"`
	Accel    string                  `json:"accel,omitempty"`
	PowerOn  time.Time               `json:"power_on,omitzero"`
	Daemons  map[string]DaemonStatus `json:"daemons"`
	Work     DaemonStatus            `json:"work"`     // the work domain
	Services map[string]bool         `json:"services"` // of home, site and lgwan: do they run
	Uplink   string                  `json:"uplink,omitempty"`
	Leaked   int                     `json:"leaked"`
}

// unknown is the state of what does not answer.
const unknown = "unknown"

// Daemon asks one daemon of the host domain for its status.
func (l *Lab) Daemon(ctx context.Context, name string) (DaemonStatus, error) {
	s := DaemonStatus{State: unknown}
	a, err := l.Call(ctx, hook.Request{Target: hook.Host, Timeout: 5 * time.Second,
		Socket: "/run/sekisho/" + name + ".sock", Method: http.MethodGet, Path: "/v1/status"})
	if err != nil {
		s.Detail = err.Error()
		return s, err
	}
	if a.Exit != http.StatusOK {
		s.Detail = fmt.Sprintf("http status %d: %.200s", a.Exit, a.Stdout)
		return s, fmt.Errorf("lab: %s: %s", name, s.Detail)
	}
	if err := json.Unmarshal(a.Stdout, &s); err != nil {
		s.Detail = err.Error()
		return s, fmt.Errorf("lab: %s: %w", name, err)
	}
	s.Body = a.Stdout
	return s, nil
}

// Disk asks init how the work domain's disk stands.
func (l *Lab) Disk(ctx context.Context) (disk.Status, error) {
	d, err := l.Daemon(ctx, "init")
	if err != nil {
		return disk.Status{}, err
	}
	var s struct{ Disk disk.Status }
	if err := json.Unmarshal(d.Body, &s); err != nil {
		return disk.Status{}, fmt.Errorf("lab: init: %w", err)
	}
	return s.Disk, nil
}

// Slots asks init how the slots stand.
func (l *Lab) Slots(ctx context.Context) (update.Status, error) {
	d, err := l.Daemon(ctx, "init")
	if err != nil {
		return update.Status{}, err
	}
	var s struct{ Slots update.Status }
	if err := json.Unmarshal(d.Body, &s); err != nil {
		return update.Status{}, fmt.Errorf("lab: init: %w", err)
	}
	return s.Slots, nil
}

// Status looks at everything; what does not answer is unknown.
func (l *Lab) Status(ctx context.Context) (Status, error) {
	st, err := l.load()
	if err != nil {
		return Status{}, err
	}
	s := Status{Image: st.Variant, Accel: st.Accel, PowerOn: st.PowerOn, Daemons: map[string]DaemonStatus{}, Services: map[string]bool{},
		Work: DaemonStatus{State: unknown}}
	for _, p := range st.Processes {
		s.Services[p.Name] = p.alive()
	}
	s.Up = s.Services["qemu"]
	if !s.Up {
		return s, nil
	}
	for _, name := range daemons {
		d, err := l.Daemon(ctx, name)
		s.Daemons[name] = d
		if err != nil && name == daemons[0] && strings.Contains(d.Detail, "no answer") {
			break // the host domain itself is silent: do not ask it four times
		}
	}
	a, err := l.Call(ctx, hook.Request{Target: hook.Work, Timeout: 5 * time.Second, Argv: []string{"cat", "/proc/uptime"}})
	if err != nil {
		s.Work.Detail = err.Error()
	} else {
		uptime, _, _ := strings.Cut(string(a.Stdout), " ")
		s.Work = DaemonStatus{State: "running", Detail: "up " + uptime + " s"}
	}
	r, err := l.CheckUplink()
	if err != nil {
		return s, err
	}
	s.Uplink, s.Leaked = r.String(), r.Leaked
	return s, nil
}

func (s Status) String() string {
	var b strings.Builder
	if !s.Up {
		return "laptop      off\n"
	}
	fmt.Fprintf(&b, "laptop      on, image %s, acceleration %s, since %s\n", s.Image, s.Accel, s.PowerOn.Local().Format(time.TimeOnly))
	line := func(name string, d DaemonStatus) {
		fmt.Fprintf(&b, "%-11s %s", name, d.State)
		for _, more := range []string{d.Reason, d.Detail} {
			if more != "" {
				fmt.Fprintf(&b, ", %s", more)
			}
		}
		b.WriteByte('\n')
	}
	for _, name := range daemons {
		if d, ok := s.Daemons[name]; ok {
			line(name, d)
		}
	}
	line("work domain", s.Work)
	var names []string
	for name, alive := range s.Services {
		if !alive {
			name += " (stopped)"
		}
		names = append(names, name)
	}
	slices.Sort(names)
	fmt.Fprintf(&b, "services    %s\nuplink      %s\n", strings.Join(names, ", "), s.Uplink)
	return b.String()
}
