// Package fprint is the laptop's fingerprint reader: it runs Debian's fprintd
// on a private D-Bus and is its one client. Nobody else can reach that bus, and
// the authority that fprintd asks (polkit's interface) is this package too: it
// allows its own connection and nothing else.
//
// The D-Bus interfaces are net.reactivated.Fprint.Manager and .Device of
// fprintd 1.94, and org.freedesktop.PolicyKit1.Authority.
package fprint

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"
)

// Names of fprintd's interfaces.
const (
	service = "net.reactivated.Fprint"
	manager = service + ".Manager"
	device  = service + ".Device"
	root    = dbus.ObjectPath("/net/reactivated/Fprint/Manager")
)

// Paths of Debian's programs.
const (
	busProgram    = "/usr/bin/dbus-daemon"
	readerProgram = "/usr/libexec/fprintd"
)

// startTimeout bounds how long bus and fprintd may take to be there.
const startTimeout = 60 * time.Second

// ErrNoReader: there is no fingerprint reader that libfprint knows.
var ErrNoReader = errors.New("no fingerprint reader")

// Config says how to run fprintd.
type Config struct {
	Dir string   // of the bus' socket and configuration, ours alone (0700)
	Env []string // further environment of fprintd
}

// prints is where fprintd keeps templates: in memory, for what is in Dir goes
// with the power. Templates come from the sealed state and go back to it.
func (c Config) prints() string { return filepath.Join(c.Dir, "prints") }

// busConfig is a bus of one user: ours. What connects to it is fprintd and
// this package.
const busConfig = `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path=%[1]s</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <deny user="*"/>
    <allow user="%[2]d"/>
    <allow own="*"/>
    <allow send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_type="method_return"/>
    <allow send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="signal"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
  </policy>
</busconfig>
`

// Reader is a running fprintd with its first reader. Its methods take turns:
// one finger at a time.
type Reader struct {
	config Config
	conn   *dbus.Conn
	bus    *process
	daemon *process
	turn   chan struct{} // holds one token while nobody uses the reader
}

// Start runs bus and fprintd in config.Dir, which it makes. Close ends both.
// prints are the templates that Prints returned before.
func Start(ctx context.Context, config Config, prints map[string][]byte) (_ *Reader, err error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := os.MkdirAll(config.prints(), 0o700); err != nil {
		return nil, fmt.Errorf("fingerprint reader: %w", err)
	}
	if err := writePrints(config.prints(), prints); err != nil {
		return nil, err
	}
	socket, file := filepath.Join(config.Dir, "bus"), filepath.Join(config.Dir, "bus.conf")
	if err := os.WriteFile(file, fmt.Appendf(nil, busConfig, socket, os.Getuid()), 0o600); err != nil {
		return nil, fmt.Errorf("fingerprint reader: %w", err)
	}
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("fingerprint reader: %w", err)
	}
	r := &Reader{config: config, turn: make(chan struct{}, 1)}
	r.turn <- struct{}{}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.Close())
		}
	}()
	if r.bus, err = start(exec.Command(busProgram, "--config-file="+file, "--nofork", "--nopidfile")); err != nil {
		return nil, err
	}
	address := "unix:path=" + socket
	if err := poll(ctx, func() (err error) {
		r.conn, err = dbus.Connect(address)
		return err
	}); err != nil {
		return nil, fmt.Errorf("fingerprint reader: bus: %w", err)
	}
	if err := r.conn.Export(authority{r.conn.Names()[0]}, "/org/freedesktop/PolicyKit1/Authority", "org.freedesktop.PolicyKit1.Authority"); err != nil {
		return nil, fmt.Errorf("fingerprint reader: authority: %w", err)
	}
	if _, err := r.conn.RequestName("org.freedesktop.PolicyKit1", dbus.NameFlagDoNotQueue); err != nil {
		return nil, fmt.Errorf("fingerprint reader: authority: %w", err)
	}
	daemon := exec.Command(readerProgram, "--no-timeout")
	daemon.Env = append([]string{"DBUS_SYSTEM_BUS_ADDRESS=" + address, "STATE_DIRECTORY=" + config.prints(), "HOME=/", "PATH=/usr/bin:/bin"}, config.Env...)
	if r.daemon, err = start(daemon); err != nil {
		return nil, err
	}
	if err := poll(ctx, func() error {
		return r.conn.BusObject().CallWithContext(ctx, "org.freedesktop.DBus.GetNameOwner", 0, service).Err
	}); err != nil {
		return nil, fmt.Errorf("fingerprint reader: fprintd: %w", err)
	}
	return r, nil
}

// Done is closed when fprintd or the bus has ended.
func (r *Reader) Done() <-chan struct{} { return r.conn.Context().Done() }

// Close ends fprintd and the bus and waits for them.
func (r *Reader) Close() error {
	var errs []error
	if r.conn != nil {
		errs = append(errs, r.conn.Close())
	}
	for _, p := range []*process{r.daemon, r.bus} {
		if p != nil {
			p.end()
		}
	}
	return errors.Join(errs...)
}

// authority answers fprintd's question whether a client may do something: only
// we may.
type authority struct{ self string }

// subject is polkit's: ("system-bus-name", {"name": ":1.5"}).
type subject struct {
	Kind    string
	Details map[string]dbus.Variant
}

// result is polkit's: authorised, could be after a challenge, details.
type result struct {
	Authorized, Challenge bool
	Details               map[string]string
}

// CheckAuthorization is org.freedesktop.PolicyKit1.Authority's.
func (a authority) CheckAuthorization(s subject, _ string, _ map[string]string, _ uint32, _ string) (result, *dbus.Error) {
	name, ok := s.Details["name"].Value().(string)
	return result{Authorized: ok && s.Kind == "system-bus-name" && name == a.self, Details: map[string]string{}}, nil
}

// process is a child that somebody waits for.
type process struct {
	cmd  *exec.Cmd
	done chan struct{}
}

func start(cmd *exec.Cmd) (*process, error) {
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("fingerprint reader: %w", err)
	}
	p := &process{cmd, make(chan struct{})}
	go func() {
		_ = cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

func (p *process) end() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

// poll repeats try until it succeeds or ctx ends.
func poll(ctx context.Context, try func() error) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := try()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		case <-tick.C:
		}
	}
}

// maxPrints bounds templates in bytes, all fingers of all users together.
const maxPrints = 64 << 10

// Prints returns fprintd's templates by their path, for the sealed state.
func (r *Reader) Prints() (map[string][]byte, error) {
	out, total := map[string][]byte{}, 0
	dir, err := os.OpenRoot(r.config.prints())
	if err != nil {
		return nil, fmt.Errorf("fingerprint templates: %w", err)
	}
	defer dir.Close()
	err = walk(dir, ".", func(path string, data []byte) error {
		if total += len(data); total > maxPrints {
			return fmt.Errorf("over %d bytes; delete a finger", maxPrints)
		}
		out[path] = data
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("fingerprint templates: %w", err)
	}
	return out, nil
}

func walk(dir *os.Root, path string, do func(string, []byte) error) error {
	f, err := dir.Open(path)
	if err != nil {
		return err
	}
	entries, err := f.ReadDir(-1)
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	for _, e := range entries {
		name := filepath.Join(path, e.Name())
		if e.IsDir() {
			if err := walk(dir, name, do); err != nil {
				return err
			}
			continue
		}
		data, err := dir.ReadFile(name)
		if err != nil {
			return err
		}
		if err := do(name, data); err != nil {
			return err
		}
	}
	return nil
}

// writePrints makes path hold prints and nothing else.
func writePrints(path string, prints map[string][]byte) error {
	if err := errors.Join(os.RemoveAll(path), os.MkdirAll(path, 0o700)); err != nil {
		return fmt.Errorf("fingerprint templates: %w", err)
	}
	dir, err := os.OpenRoot(path)
	if err != nil {
		return fmt.Errorf("fingerprint templates: %w", err)
	}
	defer dir.Close()
	for name, data := range prints {
		if strings.Contains(name, "..") {
			return fmt.Errorf("fingerprint templates: path %q", name)
		}
		if err := errors.Join(dir.MkdirAll(filepath.Dir(name), 0o700), dir.WriteFile(name, data, 0o600)); err != nil {
			return fmt.Errorf("fingerprint templates: %w", err)
		}
	}
	return nil
}
