package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"sekisho/images"
	"sekisho/images/lab/hook"
)

// Boot says what to boot and how long to wait for the page.
type Boot struct {
	Image   Image         // zero: the laptop as mkimage built it
	NoTPM   bool          // a machine without TPM
	Life    time.Duration // of a device's certificate; 0: the verifier's own choice
	Timeout time.Duration // 0: ten minutes
	Stay    bool          // return once the machine has power: the caller watches it
	Clock   string        // what the machine's clock says at power-on, "1970-01-02T00:00:00"; empty: the time
	NoSite  bool          // the verifier and the gateway are down when the machine gets power
	Accept  []string      // files of reference values that the policy accepts beside the laptop's
}

// Image is a bootable disk with the firmware variables that go with it.
type Image struct {
	Name string // "laptop" or what was done to it
	Disk string
	Vars string
}

// Result is how a boot went.
type Result struct {
	OK     bool    `json:"ok"`
	Accel  string  `json:"accel"`
	Image  string  `json:"image"`
	Stages []Stage `json:"stages"`
	Page   string  `json:"page,omitempty"`
	Reason string  `json:"reason,omitempty"`
}

// Up clears what an earlier run left, makes the surroundings, gives the laptop
// power and waits until the work domain has read the page. The result tells
// how far the boot got when there is an error too; the lab then stays up to be
// looked at.
func (l *Lab) Up(ctx context.Context, b Boot) (Result, error) {
	if os.Geteuid() != 0 {
		return Result{}, errors.New("lab: run as root: it makes network namespaces")
	}
	if b.Timeout == 0 {
		b.Timeout = 10 * time.Minute
	}
	if b.Image == (Image{}) {
		b.Image = l.Laptop()
	}
	ctx, cancel := context.WithTimeoutCause(ctx, b.Timeout, fmt.Errorf("%w: %s", ErrLate, b.Timeout))
	defer cancel()
	r := Result{Image: b.Image.Name}
	fail := func(err error) (Result, error) { r.Reason = err.Error(); return r, err }

	if err := l.clear(ctx); err != nil {
		return fail(err)
	}
	if err := l.update(func(s *state) { *s = state{Started: time.Now(), Variant: b.Image.Name} }); err != nil {
		return fail(err)
	}
	if err := l.surroundings(ctx, b); err != nil {
		return fail(err)
	}
	accel, argv, err := l.prepareMachine(ctx, b)
	r.Accel = accel
	if err == nil && b.NoSite {
		err = errors.Join(l.Kill(ctx, "verifier"), l.Kill(ctx, "gateway"))
	}
	if err == nil {
		err = l.startQEMU(argv, accel)
	}
	if err != nil || b.Stay {
		if err != nil {
			return fail(err)
		}
		return r, nil
	}
	r.Stages, r.Page, err = l.watch(ctx)
	if err != nil {
		return fail(err)
	}
	r.OK = true
	return r, nil
}

// Laptop is the image as mkimage builds it.
func (l *Lab) Laptop() Image {
	return Image{Name: "laptop", Disk: l.out(images.LaptopDisk), Vars: l.out(images.LaptopVars)}
}

// clear removes what is left of an earlier run.
func (l *Lab) clear(ctx context.Context) error {
	if err := l.stopAll(ctx); err != nil {
		return err
	}
	if err := clearNamespaces(ctx); err != nil {
		return err
	}
	socks, err := filepath.Glob(filepath.Join(runDir, "*.sock"))
	if err != nil {
		return err
	}
	logs, err := filepath.Glob(l.lab("*.log"))
	if err != nil {
		return err
	}
	for _, f := range append(socks, logs...) {
		if err := os.Remove(f); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("lab: %w", err)
		}
	}
	for _, dir := range []string{runDir, l.lab(), l.run()} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("lab: %w", err)
		}
	}
	return nil
}

// surroundings makes everything but the laptop.
func (l *Lab) surroundings(ctx context.Context, b Boot) error {
	if err := l.preparePKI(); err != nil {
		return err
	}
	if err := makeNamespaces(ctx); err != nil {
		return err
	}
	self := l.bin("lab")
	for _, s := range []spec{
		// The capture is first: it has to see the first frame.
		{name: "capture", namespace: "sekisho-home", argv: []string{self, "helper", "capture", "uplink", l.UplinkCapture()}},
		{name: "capture-of-air", namespace: "sekisho-home", argv: []string{self, "helper", "capture", "air", l.run("air.pcap")}},
		{name: "capture-of-lte", namespace: "sekisho-home", argv: []string{self, "helper", "capture", "lte", l.run("lte.pcap")}},
		dhcpServer("192.168.50", l.lab("dnsmasq.leases")),
		{name: "page", namespace: "sekisho-lgwan", argv: []string{self, "helper", "page"}},
	} {
		if _, err := l.start(s); err != nil {
			return err
		}
	}
	if err := waitFor(ctx, "the capture", func() (bool, error) {
		st, err := os.Stat(l.UplinkCapture())
		return err == nil && st.Size() > 0, nil
	}); err != nil {
		return err
	}
	if err := l.listening(ctx, "page", "sekisho-lgwan", pageAddress.String()); err != nil {
		return err
	}
	if err := l.prepareTPM(func(argv ...string) error { return command(ctx, "", argv...) }); err != nil {
		return err
	}
	return l.startSite(ctx, b)
}

// listening waits until a TCP server answers.
func (l *Lab) listening(ctx context.Context, name, namespace, address string) error {
	return waitFor(ctx, name, func() (bool, error) {
		if _, err := l.find(name); err != nil {
			return false, fmt.Errorf("%w; see %s", err, l.lab(name+".log"))
		}
		err := inNamespace(namespace, func() error {
			c, err := net.DialTimeout("tcp", address, time.Second)
			if err == nil {
				c.Close()
			}
			return err
		})
		return err == nil, nil
	})
}

// prepareMachine copies the image's files, hands out the ticket and starts the
// TPM. It returns the command that gives the laptop power.
func (l *Lab) prepareMachine(ctx context.Context, b Boot) (accel string, argv []string, err error) {
	m := machine{disk: l.lab("laptop.img"), vars: l.lab("vars.fd"), noTPM: b.NoTPM, clock: b.Clock}
	if err := errors.Join(copySparse(m.disk, b.Image.Disk), copySparse(m.vars, b.Image.Vars)); err != nil {
		return "", nil, err
	}
	if err := l.placeTicket(ctx, m.disk); err != nil {
		return "", nil, err
	}
	return l.power(ctx, m)
}

// power starts the TPM, unless there is none, and returns the command that
// gives the laptop power.
func (l *Lab) power(ctx context.Context, m machine) (accel string, argv []string, err error) {
	qemu, err := OuterQEMU(ctx, l.out("cache"), l.progress())
	if err != nil {
		return "", nil, err
	}
	accel, why, err := acceleration(ctx, qemu, l.Accel, l.lab())
	if err != nil {
		return "", nil, err
	}
	l.say("lab: acceleration %s (%s)", accel, why)
	m.accel = accel
	argv = append(qemu, m.arguments()...)
	if m.noTPM {
		return accel, argv, nil
	}
	sock := filepath.Join(runDir, "tpm.sock")
	if _, err := l.start(spec{name: "swtpm", argv: []string{"swtpm", "socket", "--tpm2", "--tpmstate", "dir=" + l.lab("tpm"),
		"--ctrl", "type=unixio,path=" + sock}}); err != nil {
		return accel, nil, err
	}
	return accel, argv, waitFor(ctx, "swtpm", func() (bool, error) { return exist(sock), nil })
}

// startQEMU starts the machine with its console on a pipe to the helper that
// stamps the lines.
func (l *Lab) startQEMU(argv []string, accel string) error {
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	defer r.Close()
	defer w.Close()
	log, err := os.Create(l.run("console.log"))
	if err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	defer log.Close()
	if _, err := l.start(spec{name: "console", argv: []string{l.bin("lab"), "helper", "console"}, stdin: r, stdout: log}); err != nil {
		return err
	}
	if err := l.update(func(s *state) { s.PowerOn, s.Accel = time.Now(), accel }); err != nil {
		return err
	}
	_, err = l.start(spec{name: "qemu", namespace: "sekisho-home", argv: argv, stdout: w})
	return err
}

// watch follows the console until the work domain has read the page.
func (l *Lab) watch(ctx context.Context) (stages []Stage, page string, err error) {
	s, err := l.load()
	if err != nil {
		return nil, "", err
	}
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	var mu sync.Mutex
	ended := func(name string, at time.Time) {
		mu.Lock()
		defer mu.Unlock()
		if slices.ContainsFunc(stages, func(s Stage) bool { return s.Name == name }) {
			return
		}
		st := Stage{name, at.Sub(s.PowerOn).Seconds()}
		l.say("lab: %7.2f s  %s", st.Seconds, st.Name)
		stages = append(stages, st)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		err := follow(ctx, l.run("console.log"), func(line stamped) (bool, error) {
			for _, name := range ends(line.text) {
				at := line.at
				if s, ok := parseStatusLine(line.text); ok && name == StageFirmware {
					at = at.Add(-s.since)
				}
				ended(name, at)
			}
			return false, verdict(line.text)
		})
		if Refused(err) || FirmwareRefused(err) {
			stop(err)
		}
	})
	wg.Go(func() {
		err := waitFor(ctx, "the end of QEMU", func() (bool, error) {
			if _, err := l.find("qemu"); err != nil {
				return false, fmt.Errorf("%w: it ended before the page was read; see %s and %s", err, l.run("console.log"), l.lab("qemu.log"))
			}
			return false, nil
		})
		stop(err)
	})
	page, err = l.readPage(ctx)
	if err == nil {
		ended(StagePage, time.Now())
	} else if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	stop(nil)
	wg.Wait()
	return stages, page, err
}

// readPage has the work domain fetch the page until it gets it.
func (l *Lab) readPage(ctx context.Context) (page string, err error) {
	err = waitFor(ctx, "the page", func() (bool, error) {
		a, err := l.Call(ctx, hook.Request{Target: hook.Work, Timeout: 15 * time.Second, Argv: []string{"fetch", "-timeout", "3s", PageURL}})
		if err != nil || a.Exit != 0 {
			return false, nil // not up yet
		}
		if string(a.Stdout) != pageText {
			return false, fmt.Errorf("another page: %.200q", a.Stdout)
		}
		page = string(a.Stdout)
		return true, nil
	})
	return page, err
}

// copySparse copies a file, for its owner alone, and leaves its holes out: a
// laptop's disk may hold an enrolment ticket that is still good.
func copySparse(to, from string) error {
	src, err := os.Open(from)
	if err != nil {
		return fmt.Errorf("lab: %w (make build the image first: lab run)", err)
	}
	defer src.Close()
	st, err := src.Stat()
	if err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	dst, err := os.OpenFile(to, os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	defer dst.Close()
	if err := dst.Chmod(0o600); err != nil { // one that was there already
		return fmt.Errorf("lab: %w", err)
	}
	if err := dst.Truncate(st.Size()); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	buf := make([]byte, 1<<20)
	for at := int64(0); at < st.Size(); {
		begin, err := unix.Seek(int(src.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break // a hole up to the end
		}
		if err != nil {
			return fmt.Errorf("lab: copy %s: %w", from, err)
		}
		end, err := unix.Seek(int(src.Fd()), begin, unix.SEEK_HOLE)
		if err != nil {
			return fmt.Errorf("lab: copy %s: %w", from, err)
		}
		for at = begin; at < end; {
			n, err := src.ReadAt(buf[:min(int64(len(buf)), end-at)], at)
			if n == 0 {
				return fmt.Errorf("lab: copy %s: %w", from, err)
			}
			if _, err := dst.WriteAt(buf[:n], at); err != nil {
				return fmt.Errorf("lab: copy %s: %w", from, err)
			}
			at += int64(n)
		}
	}
	return dst.Close()
}

// writeJSON writes v where programs look for it.
func writeJSON(path string, v any) error {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false) // the page is in it
	e.SetIndent("", "  ")
	if err := e.Encode(v); err != nil {
		return err
	}
	return writeFile(path, b.Bytes(), 0o644)
}

// progress shows fetches and builds, one line per step.
func (l *Lab) progress() func(what string, done, total int64) {
	last := ""
	return func(what string, done, total int64) {
		if what = strings.TrimSpace(what); what != last {
			last = what
			l.say("lab: %s", what)
		}
	}
}
