package boot

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/u-root/u-root/pkg/kmodule"
	"golang.org/x/sys/unix"
)

// ModuleStatus is how loading one module went.
type ModuleStatus struct {
	Name  string `json:"name"`
	State string `json:"state"` // "loaded", "absent" (not in the image), "failed"
	Error string `json:"error,omitempty"`
}

// prober loads a module and what it depends on.
type prober interface {
	Probe(name, params string) error
}

// loader loads modules and remembers how it went.
type loader struct {
	prober  prober
	present func(name string) bool // in the kernel already
	cpu     string                 // vendor_id
	console *console

	mu     sync.Mutex
	status []ModuleStatus
}

// results returns how loading went so far.
func (l *loader) results() []ModuleStatus {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.status)
}

func newLoader(c *console) *loader {
	l := &loader{console: c, cpu: cpuVendor("/proc/cpuinfo"), present: func(name string) bool {
		_, err := os.Stat("/sys/module/" + name)
		return err == nil
	}}
	p, err := kmodule.NewProber(kmodule.ProbeOpts{})
	if err != nil {
		c.line("init", "warning: no modules: %v", err)
		l.prober = noModules{err}
		return l
	}
	l.prober = p
	return l
}

// noModules is the prober of an image without /lib/modules.
type noModules struct{ err error }

func (n noModules) Probe(string, string) error { return n.err }

// load loads every module of list that fits this CPU, and returns what cannot
// work because a module it needs is missing.
func (l *loader) load(list []Module) (broken []string) {
	for _, m := range list {
		if m.CPU != "" && m.CPU != l.cpu {
			continue
		}
		st := ModuleStatus{Name: m.Name, State: "loaded"}
		if !l.present(m.Name) {
			if err := l.prober.Probe(m.Name, ""); err != nil && !l.present(m.Name) {
				st.State, st.Error = "absent", err.Error()
				// The kernel's own refusal is a bare number; a file that is
				// not there has a path.
				_, refused := errors.AsType[unix.Errno](err)
				if _, file := errors.AsType[*fs.PathError](err); refused && !file {
					st.State = "failed"
				}
			}
		}
		l.mu.Lock()
		l.status = append(l.status, st)
		l.mu.Unlock()
		if st.State == "loaded" {
			continue
		}
		l.console.line("init", "warning: module %s %s: %s", m.Name, st.State, st.Error)
		if m.Serves != "" {
			broken = append(broken, m.Serves)
		}
	}
	return broken
}

// cpuVendor returns the vendor_id of the first CPU, empty when unknown.
func cpuVendor(cpuinfo string) string {
	f, err := os.Open(cpuinfo)
	if err != nil {
		return ""
	}
	defer f.Close()
	s := bufio.NewScanner(io.LimitReader(f, 16<<10))
	for s.Scan() {
		if key, value, ok := strings.Cut(s.Text(), ":"); ok && strings.TrimSpace(key) == "vendor_id" {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// memory is the host domain's memory from /proc/meminfo.
type memory struct {
	TotalKiB     uint64 `json:"total_kib"`
	AvailableKiB uint64 `json:"available_kib"`
}

func readMemory(meminfo string) (m memory) {
	f, err := os.Open(meminfo)
	if err != nil {
		return m
	}
	defer f.Close()
	s := bufio.NewScanner(io.LimitReader(f, 16<<10))
	for s.Scan() {
		var n uint64
		if c, _ := fmt.Sscanf(s.Text(), "MemTotal: %d kB", &n); c == 1 {
			m.TotalKiB = n
		}
		if c, _ := fmt.Sscanf(s.Text(), "MemAvailable: %d kB", &n); c == 1 {
			m.AvailableKiB = n
		}
	}
	return m
}
