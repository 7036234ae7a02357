package lab

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"time"

	"sekisho/images"
	"sekisho/images/lab/capture"
	"sekisho/images/lab/hook"
)

// Report is out/run/report.json.
type Report struct {
	Result
	Uplink capture.Report `json:"uplink"`
	Sizes  Sizes          `json:"sizes"`
	// HostMemory is what the host domain uses of its memory, in bytes, without
	// the work domain's; 0 when it could not be asked.
	HostMemory int64 `json:"host_memory_bytes"`
}

// Sizes are in bytes.
type Sizes struct {
	UKI  int64 `json:"uki"`
	Disk int64 `json:"disk"`
}

// report collects what is known after a boot and writes it.
func (l *Lab) report(ctx context.Context, r Result) (Report, error) {
	out := Report{Result: r}
	if n, err := l.hostMemory(ctx); err == nil {
		out.HostMemory = n
	}
	out.Sizes.UKI, out.Sizes.Disk = size(l.out(images.HostImage)), size(l.Laptop().Disk)
	var err error
	if out.Uplink, err = l.CheckUplink(); err != nil {
		return out, err
	}
	return out, writeJSON(l.run("report.json"), out)
}

func size(path string) int64 {
	st, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return st.Size()
}

// hostMemory is what the host domain uses, without the work domain's QEMU.
func (l *Lab) hostMemory(ctx context.Context) (int64, error) {
	d, err := l.Daemon(ctx, "init")
	if err != nil {
		return 0, err
	}
	var body struct {
		Memory struct {
			Total     int64 `json:"total_kib"`
			Available int64 `json:"available_kib"`
		} `json:"memory"`
	}
	if err := json.Unmarshal(d.Body, &body); err != nil {
		return 0, fmt.Errorf("lab: init: %w", err)
	}
	pid, err := l.ServicePID(ctx, "vmm")
	if err != nil {
		return 0, err
	}
	a, err := l.Exec(ctx, hook.Host, "cat", fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	_, rss, _ := strings.Cut(string(a.Stdout), "VmRSS:")
	var qemu int64
	if _, err := fmt.Sscan(rss, &qemu); err != nil {
		return 0, fmt.Errorf("lab: memory of the work domain: %w", err)
	}
	return (body.Memory.Total - body.Memory.Available - qemu) << 10, nil
}

// ServicePID is the process id of a service in the host domain.
func (l *Lab) ServicePID(ctx context.Context, name string) (int, error) {
	d, err := l.Daemon(ctx, "init")
	if err != nil {
		return 0, err
	}
	var body struct {
		Services []struct {
			Name string `json:"name"`
			PID  int    `json:"pid"`
		} `json:"services"`
	}
	if err := json.Unmarshal(d.Body, &body); err != nil {
		return 0, fmt.Errorf("lab: init: %w", err)
	}
	for _, s := range body.Services {
		if s.Name == name && s.PID > 1 {
			return s.PID, nil
		}
	}
	return 0, fmt.Errorf("lab: service %q does not run", name)
}

// Run boots the laptop, shows the way to the page and the page, and then either
// ends in order (once) or shows the state until ctx ends, and then ends.
func (l *Lab) Run(ctx context.Context, b Boot, once bool) (err error) {
	defer func() {
		l.say("lab: shutting down")
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 3*time.Minute)
		defer cancel()
		if derr := l.Down(end); err == nil {
			err = derr
		}
	}()
	result, err := l.Up(ctx, b)
	report, rerr := l.report(ctx, result)
	if err != nil {
		return err
	}
	if rerr != nil {
		return rerr
	}
	l.say("\n%s", result.Page)
	l.say("lab: uplink: %s", &report.Uplink)
	l.say("lab: image %d MB, host domain memory %d MB, report in %s", report.Sizes.UKI>>20, report.HostMemory>>20, l.run("report.json"))
	if report.Uplink.Leaked > 0 {
		return fmt.Errorf("lab: %d frames leaked, the first: %s", report.Uplink.Leaked, report.Uplink.Leaks[0])
	}
	if once {
		return nil
	}
	l.say("lab: the laptop stays up; Ctrl-C ends it")
	return l.live(ctx)
}

// live shows the state whenever it changes, until ctx ends.
func (l *Lab) live(ctx context.Context) error {
	last := ""
	t := time.NewTicker(2 * time.Second)
	defer t.Stop()
	for {
		s, err := l.Status(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		if !s.Up {
			return fmt.Errorf("lab: the laptop is off; see %s", l.run("console.log"))
		}
		shown := s
		shown.Uplink, shown.Work.Detail = "", "" // these change all the time
		if text := shown.String(); text != last {
			last = text
			l.say("\n%s", s)
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return nil
		}
	}
}
