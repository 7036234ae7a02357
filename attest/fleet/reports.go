package fleet

import (
	"crypto/ecdsa"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"sekisho/attest"
	"sekisho/attest/report"
)

// reportsKept is how many reports of one device are kept, beside its last
// affirming one.
const reportsKept = 8

// Reports keeps the last reports of each enrolled device, in files
// DEVICE/TIME-VERDICT-ID.cose of one directory. It is safe for concurrent use.
type Reports struct {
	dir *os.Root
	key *ecdsa.PrivateKey

	mu sync.Mutex // of directories of devices
}

// OpenReports opens or creates the archive in dir. key signs results and
// reports.
func OpenReports(dir string, key *ecdsa.PrivateKey) (*Reports, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("reports: %w", err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("reports: %w", err)
	}
	return &Reports{dir: root, key: key}, nil
}

// Close releases the archive.
func (r *Reports) Close() error { return r.dir.Close() }

const (
	markAffirming = "a"
	markOther     = "o"
)

// Save stores a report and forgets the oldest ones of its device.
func (r *Reports) Save(device attest.Digest, now time.Time, affirming bool, id string, data []byte) error {
	mark := markOther
	if affirming {
		mark = markAffirming
	}
	name := fmt.Sprintf("%s/%013d-%s-%s.cose", device, now.UnixMilli(), mark, id)
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.dir.Mkdir(device.String(), 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("report: %w", err)
	}
	f, err := r.dir.OpenFile(name+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("report: %w", err)
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("report: %w", err)
	}
	if err := r.dir.Rename(name+".new", name); err != nil {
		return fmt.Errorf("report: %w", err)
	}
	return r.prune(device)
}

// prune removes all but the newest reports and the newest affirming one.
func (r *Reports) prune(device attest.Digest) error {
	names, err := r.names(device)
	if err != nil {
		return err
	}
	good := last(names, markAffirming)
	for i, name := range names {
		if i < len(names)-reportsKept && name != good {
			if err := r.dir.Remove(device.String() + "/" + name); err != nil {
				return fmt.Errorf("report: %w", err)
			}
		}
	}
	return nil
}

// names lists the reports of a device, oldest first.
func (r *Reports) names(device attest.Digest) ([]string, error) {
	d, err := r.dir.Open(device.String())
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("report: %w", err)
	}
	defer d.Close()
	list, err := d.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("report: %w", err)
	}
	list = slices.DeleteFunc(list, func(s string) bool { return !strings.HasSuffix(s, ".cose") })
	slices.Sort(list)
	return list, nil
}

func last(names []string, mark string) string {
	for _, name := range slices.Backward(names) {
		if mark == "" || strings.Contains(name, "-"+mark+"-") {
			return name
		}
	}
	return ""
}

// errNoReport says that the archive has no such report.
var errNoReport = errors.New("no such report; only the last ones of each enrolled device are kept")

func (r *Reports) read(device attest.Digest, name string) ([]byte, error) {
	if name == "" {
		return nil, errNoReport
	}
	f, err := r.dir.Open(device.String() + "/" + name)
	if err != nil {
		return nil, fmt.Errorf("report: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, report.MaxReport+1))
	if err != nil {
		return nil, fmt.Errorf("report: %w", err)
	}
	return data, nil
}

// Latest returns the last report of a device; if affirming is set, the last
// affirming one.
func (r *Reports) Latest(device attest.Digest, affirming bool) ([]byte, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	names, err := r.names(device)
	if err != nil {
		return nil, err
	}
	mark := ""
	if affirming {
		mark = markAffirming
	}
	return r.read(device, last(names, mark))
}

// LastGood returns the event log of the last affirmed boot of a device, nil if
// none is kept.
func (r *Reports) LastGood(device attest.Digest) ([]byte, error) {
	data, err := r.Latest(device, true)
	if errors.Is(err, errNoReport) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	p, _, err := report.Parse(data, &r.key.PublicKey)
	if err != nil {
		return nil, err
	}
	e, err := attest.ParseEvidence(p.Evidence.Value)
	if err != nil {
		return nil, err
	}
	return e.EventLog, nil
}

// ReportInfo names one report.
type ReportInfo struct {
	ID        string        `json:"id"`
	Device    attest.Digest `json:"device_id"`
	Time      time.Time     `json:"time"`
	Affirming bool          `json:"affirming"`
	name      string
}

// List lists the reports of a device, oldest first.
func (r *Reports) List(device attest.Digest) ([]ReportInfo, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	names, err := r.names(device)
	if err != nil {
		return nil, err
	}
	list := []ReportInfo{}
	for _, name := range names {
		var ms int64
		parts := strings.Split(strings.TrimSuffix(name, ".cose"), "-")
		if _, err := fmt.Sscanf(parts[0], "%d", &ms); err != nil || len(parts) != 3 {
			continue
		}
		list = append(list, ReportInfo{parts[2], device, time.UnixMilli(ms).UTC(), parts[1] == markAffirming, name})
	}
	return list, nil
}

// Get returns the report of that id, of any device.
func (r *Reports) Get(id string, devices []attest.Digest) ([]byte, error) {
	for _, d := range devices {
		list, err := r.List(d)
		if err != nil {
			return nil, err
		}
		for _, i := range list {
			if i.ID == id {
				return r.read(d, i.name)
			}
		}
	}
	return nil, errNoReport
}
