// Package lab is the virtual laptop and its surroundings: three network
// namespaces with a home, a site and an LGWAN, the real verifier and gateway,
// and a QEMU machine with Secure Boot and a TPM that boots the laptop's disk.
//
//	home                        site                          lgwan
//	  laptop (QEMU)               verifier 203.0.113.10:443     page 10.254.0.80:80
//	    │ tap "uplink"            gateway  203.0.113.20:443       │
//	  192.168.50.1, DHCP ──veth── 203.0.113.0/24 ─────veth── 10.254.0.0/24
//	                                                         fd00:254::/64
//
// Addresses are those of RFC 5737 and private use; nothing leaves the machine.
// One lab runs at a time: its namespaces and sockets have fixed names.
package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"sekisho/images/lab/capture"
	"sekisho/images/lab/hook"
)

// runDir holds the lab's sockets: a checkout's path may be too long for one.
const runDir = "/run/sekisho-lab"

// Addresses of the lab.
var (
	verifierAddress = netip.MustParseAddrPort("203.0.113.10:443")
	gatewayAddress  = netip.MustParseAddrPort("203.0.113.20:443")
	pageAddress     = netip.MustParseAddrPort("10.254.0.80:80")
	pageAddress6    = netip.MustParseAddrPort("[fd00:254::80]:80")
	probeAddress    = netip.MustParseAddrPort("10.254.0.80:7007")
	homePrefix      = netip.MustParsePrefix("192.168.50.0/24")
	airPrefix       = netip.MustParsePrefix("192.168.60.0/24")
	ltePrefix       = netip.MustParsePrefix("192.168.70.0/24")
	innerPool       = netip.MustParsePrefix("10.80.0.0/16")
	innerPool6      = netip.MustParsePrefix("fd00:80::/112")
)

const (
	verifierName = "verifier.sekisho.example"
	gatewayName  = "gateway.sekisho.example"
	// PageURL is the page that only the gateway can reach.
	PageURL = "http://10.254.0.80/"
	// PageURL6 is the same over IPv6.
	PageURL6 = "http://[fd00:254::80]/"
	// laptopMAC is the hardware address of the laptop's uplink.
	laptopMAC = "52:54:00:5e:c1:50"
	// airMAC is that of the card behind the laptop's simulated access point
	// (hostos/boot, lab images only).
	airMAC = "52:54:00:5e:c1:51"
)

// Lab is one checkout's lab.
type Lab struct {
	Root  string    // absolute path of the checkout
	Accel string    // "auto", "kvm" or "tcg"
	Link  string    // work_domain.link of the organisation; empty: vsock
	Logon bool      // the laptop is a smart card, its work domain has clients of one
	Log   io.Writer // progress in words

	mu sync.Mutex // state.json
}

// New returns the lab of the checkout that directory dir is in.
func New(dir string, log io.Writer) (*Lab, error) {
	root, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	for ; ; root = filepath.Dir(root) {
		if _, err := os.Stat(filepath.Join(root, "go.mod")); err == nil {
			return &Lab{Root: root, Accel: "auto", Log: log}, nil
		}
		if root == filepath.Dir(root) {
			return nil, fmt.Errorf("lab: no go.mod in %s or above it: run it in the checkout", dir)
		}
	}
}

// out is a path below out/, lab one below out/lab/, run one below out/run/.
func (l *Lab) out(elem ...string) string {
	return filepath.Join(append([]string{l.Root, "out"}, elem...)...)
}
func (l *Lab) lab(elem ...string) string { return l.out(append([]string{"lab"}, elem...)...) }
func (l *Lab) run(elem ...string) string { return l.out(append([]string{"run"}, elem...)...) }
func (l *Lab) bin(name string) string    { return filepath.Join(l.Root, "bin", name) }

// UplinkCapture is the file with every frame of the home uplink since before
// the laptop had power.
func (l *Lab) UplinkCapture() string { return l.run("uplink.pcap") }

func (l *Lab) say(format string, a ...any) { fmt.Fprintf(l.Log, format+"\n", a...) }

// state is what one invocation of the lab leaves for the next.
type state struct {
	Started   time.Time `json:"started"`
	PowerOn   time.Time `json:"power_on"` // zero until QEMU was started
	Accel     string    `json:"accel"`
	Variant   string    `json:"variant"`
	Processes []process `json:"processes"`
}

func (l *Lab) load() (state, error) {
	var s state
	b, err := os.ReadFile(l.lab("state.json"))
	if errors.Is(err, os.ErrNotExist) {
		return s, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &s)
	}
	if err != nil {
		return s, fmt.Errorf("lab: state: %w", err)
	}
	return s, nil
}

// update changes the state on disk.
func (l *Lab) update(change func(*state)) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	s, err := l.load()
	if err != nil {
		return err
	}
	change(&s)
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(l.lab("state.json"), append(b, '\n'), 0o644)
}

// writeFile replaces the file as a whole.
func writeFile(path string, b []byte, mode os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	next := path + ".new"
	if err := os.WriteFile(next, b, mode); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	if err := os.Chmod(next, mode); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	if err := os.Rename(next, path); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	return nil
}

// Call sends a request to the laptop's hook. Clients take turns: the serial
// port has room for one.
func (l *Lab) Call(ctx context.Context, r hook.Request) (hook.Response, error) {
	if r.Timeout == 0 {
		r.Timeout = 20 * time.Second
	}
	r.ID = fmt.Sprintf("%d-%d", os.Getpid(), time.Now().UnixNano())
	ctx, cancel := context.WithTimeout(ctx, r.Timeout+5*time.Second)
	defer cancel()
	unlock, err := lockFile(ctx, filepath.Join(runDir, "hook.lock"))
	if err != nil {
		return hook.Response{}, err
	}
	defer unlock()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", filepath.Join(runDir, "hook.sock"))
	if err != nil {
		return hook.Response{}, fmt.Errorf("lab: the laptop is not running: %w", err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	return hook.Call(conn, r)
}

// Exec runs a command in the host domain or the work domain.
func (l *Lab) Exec(ctx context.Context, target hook.Target, argv ...string) (hook.Response, error) {
	return l.Call(ctx, hook.Request{Target: target, Argv: argv})
}

// Lock keeps two invocations from changing the lab at the same time. It fails
// at once when another holds it.
func (l *Lab) Lock() (unlock func(), err error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	unlock, err = lockFile(ctx, filepath.Join(runDir, "lock"))
	if err != nil {
		return nil, fmt.Errorf("lab: another lab command is at work: %w", err)
	}
	return unlock, nil
}

// lockFile waits for an exclusive lock until ctx ends.
func lockFile(ctx context.Context, path string) (unlock func(), err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	err = waitFor(ctx, "the lock "+path, func() (bool, error) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if errors.Is(err, unix.EWOULDBLOCK) {
			return false, nil
		}
		return err == nil, err
	})
	if err != nil {
		f.Close()
		return nil, err
	}
	return func() { f.Close() }, nil
}

// waitFor looks at a condition until it holds, fails or ctx ends.
func waitFor(ctx context.Context, what string, holds func() (bool, error)) error {
	t := time.NewTicker(50 * time.Millisecond)
	defer t.Stop()
	for {
		ok, err := holds()
		if err != nil {
			return fmt.Errorf("lab: waiting for %s: %w", what, err)
		}
		if ok {
			return nil
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return fmt.Errorf("lab: waiting for %s: %w", what, context.Cause(ctx))
		}
	}
}

// allowed is what may be seen on the home uplink. Nothing but the laptop and
// what answers it speaks there, so every frame is judged, both ways.
func allowed() capture.AllowList {
	card, _ := net.ParseMAC(laptopMAC) // a constant
	return capture.AllowList{
		Firmware: card,
		Servers:  []netip.AddrPort{verifierAddress, gatewayAddress, beaconAddress},
		Offices:  []netip.Prefix{officePrefix},
		QUIC:     []netip.AddrPort{gatewayAddress},
		Links:    []netip.Prefix{homePrefix, officePrefix, airPrefix, ltePrefix},

		PortAccess: true,
	}
}

// CheckUplink judges every frame that the uplink has carried in this run.
func (l *Lab) CheckUplink() (capture.Report, error) { return checkFile(l.UplinkCapture(), allowed()) }

// CheckFile judges a capture of the home uplink that may have begun at any time.
func CheckFile(path string) (capture.Report, error) {
	allow := allowed()
	allow.Midway = true
	return checkFile(path, allow)
}

func checkFile(path string, allow capture.AllowList) (capture.Report, error) {
	f, err := os.Open(path)
	if err != nil {
		return capture.Report{}, fmt.Errorf("lab: %w", err)
	}
	defer f.Close()
	return capture.Check(f, allow)
}

// InPlace returns the command to run CMD in home, site or lgwan; ok is false
// for any other place.
func InPlace(ctx context.Context, place string, cmd []string) (c *exec.Cmd, ok bool) {
	if !slices.Contains(places, place) {
		return nil, false
	}
	return exec.CommandContext(ctx, "ip", append([]string{"netns", "exec", namespacePrefix + place}, cmd...)...), true
}

// captureName is what a capture may be called: it becomes a file name.
var captureName = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,39}$`)

// StartCapture begins to record the home uplink into out/NAME.pcap.
func (l *Lab) StartCapture(ctx context.Context, name string) error {
	if !captureName.MatchString(name) {
		return fmt.Errorf("lab: capture %q: want small letters, digits and hyphens, at most 40", name)
	}
	file := l.out(name + ".pcap")
	if err := os.Remove(file); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("lab: %w", err)
	}
	if _, err := l.start(spec{name: "capture-" + name, namespace: "sekisho-home",
		argv: []string{l.bin("lab"), "helper", "capture", "uplink", file}}); err != nil {
		return err
	}
	return waitFor(ctx, "the capture", func() (bool, error) {
		_, err := os.Stat(file)
		return err == nil, nil
	})
}

// StopCapture ends a capture.
func (l *Lab) StopCapture(ctx context.Context, name string) error {
	p, err := l.find("capture-" + name)
	if err != nil {
		return err
	}
	return p.stop(ctx, 5*time.Second)
}
