// Package boot is PID 1 of the host domain: it mounts, loads modules, sees to
// the closed ruleset before any network device exists, and supervises the
// services of docs/host-domain.md with the systemd service protocol.
package boot

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"sekisho/attest"
	"sekisho/guestlink"
	"sekisho/hostos/disk"
	"sekisho/hostos/update"
	"sekisho/hostos/vmm"
)

const (
	// closeTimeout bounds `netd close`.
	closeTimeout = 30 * time.Second
	// workTimeout is how long the work domain may take to switch itself off
	// after its power button was pressed.
	workTimeout = 60 * time.Second
	// workDir belongs to vmm: firmware variables and control socket.
	workDir = RunDir + "/vmm"
)

// host is the running host domain.
type host struct {
	console  *console
	children *children
	sup      *supervisor
	loader   *loader
	machine  *vmm.Machine
	disk     *disk.Disk
	starting sync.Mutex    // held while the work domain is being started
	prompt   sync.Once     // asks for the recovery key at the console
	broken   []string      // what modules that could not be loaded serve
	off      chan struct{} // closed when the machine is to go off
	offOnce  sync.Once
	late     sync.WaitGroup // starts the work domain, waits for devices that were missing at boot

	mu      sync.Mutex
	state   Status      // without the parts that status adds
	work    *supervised // QEMU, nil while there is none
	missing []node
	ask     chan struct{} // for a release, now
	slots   *update.Slots // nil where there are no two
	// slotsFault is why no update is possible.
	slotsFault string
	again      bool // restart, do not switch off
}

// Run is the life of PID 1. It returns only when the machine could not be
// switched off.
func Run() error {
	unix.Umask(0o022)
	// Ctrl-Alt-Del is a signal to init, not a reset (reboot(2)).
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_CAD_OFF)
	h := &host{console: newConsole(openConsole()), children: newChildren(), off: make(chan struct{}), ask: make(chan struct{}, 1)}
	h.set("booting", "", "the host domain starts")
	warnings, err := mountAll()
	if kerr := noSysRq(sysRq); kerr != nil {
		warnings = append(warnings, kerr)
	}
	h.console = newConsole(openConsole()) // now that /dev is there
	h.console.line("init", "started")
	for _, w := range warnings {
		h.console.line("init", "warning: %v", w)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() { h.children.run(ctx) })
	if err == nil {
		err = h.boot(ctx, &wg)
	}
	if err != nil {
		h.set("closed", "boot-failed", err.Error())
		h.console.line("init", "closed: %v; the network stays off / 起動を中止しました。ネットワークは閉じたままです", err)
	}
	h.awaitOff(ctx)
	h.shutdown()
	unix.Sync()
	h.mu.Lock()
	how := unix.LINUX_REBOOT_CMD_POWER_OFF
	if h.again {
		how = unix.LINUX_REBOOT_CMD_RESTART
	}
	h.mu.Unlock()
	if err := unix.Reboot(how); err != nil {
		return fmt.Errorf("power off: %w", err)
	}
	return nil
}

// boot goes through the stages. An error means that the stage after which
// everything would have been closed was not reached: nothing that could carry
// a packet has been started.
func (h *host) boot(ctx context.Context, wg *sync.WaitGroup) error {
	for _, dir := range []string{RunDir, LogDir} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	// Not os.Executable: it looked before /proc was mounted.
	self, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	h.sup = &supervisor{children: h.children, self: self, notify: NotifySocket, console: h.console, now: time.Now}
	group, _ := lookup(notifyGroup)
	notify, err := listenNotify(NotifySocket, int(group))
	if err != nil {
		return err
	}
	wg.Go(func() {
		if err := receiveNotify(notify, h.sup.deliver); err != nil {
			h.console.line("init", "warning: %v", err)
		}
	})
	h.loader = newLoader(h.console)
	h.machine = vmm.NewMachine(workDir+"/qmp.sock", time.Now, h.workChanged)
	h.disk = h.newDisk()
	if err := h.serveAPI(ctx, wg); err != nil {
		return err
	}

	h.broken = h.loader.load(BaseModules())
	if slices.Contains(h.broken, ServesRuleset) {
		return errors.New("no nf_tables: the ruleset cannot be closed")
	}
	if m := mountEFIVars(); exists(m.path) {
		if err := m.mount(); err != nil {
			h.console.line("init", "warning: %v", err)
		}
	}
	if err := makeNamespaces(); err != nil {
		return err
	}
	if err := h.closeRuleset(ctx); err != nil {
		return err
	}
	h.console.line("init", "closed ruleset in force")
	h.loader.load(NICModules())
	d := newDevices()
	soon, cancel := context.WithTimeout(ctx, deviceTimeout)
	d.await(soon, deviceWait, func([]node) {})
	cancel()
	h.lack(d.missing)
	for _, n := range d.missing {
		h.console.line("init", "missing: %s", n.needed)
	}
	if h.beginSlots() {
		h.restart()
		return nil
	}
	if err := shareBootLog(); err != nil {
		h.console.line("init", "warning: event log: %v", err)
	}
	if err := makeEvents(EventsFile); err != nil {
		h.console.line("init", "warning: %v", err)
	}
	if err := labDevices(); err != nil {
		h.console.line("init", "warning: %v", err)
	}
	reason, detail := "", allDone
	if len(d.missing) > 0 {
		reason, detail = deviceMissing, d.missing[0].needed
	}
	link, logon := "", false
	if org, err := readOrganization(); err == nil {
		link, logon = org.WorkDomain.Link, org.Logon != nil
	} else { // netd and attestd say the same and do not start
		h.console.line("init", "warning: %v", err)
	}
	services := Services(link)
	if err := makeVMMDir(LinkDir, "linkd"); err != nil {
		h.console.line("init", "warning: %v", err)
	}
	if logon {
		services = append(services, LogonService())
		if err := makeVMMDir(LoginDir, "logind"); err != nil {
			h.console.line("init", "warning: %v", err)
		}
	}
	clock := h.newClock()
	clock.recall() // before netd starts
	for _, svc := range services {
		if _, err := h.sup.add(ctx, svc); err != nil {
			h.console.line("init", "warning: %v", err)
			reason, detail = "service-missing", err.Error()
		}
	}
	h.set("running", reason, detail)
	h.late.Go(func() {
		until, cancel := h.untilOff(ctx)
		defer cancel()
		h.tryWork(until, ctx, wg)
	})
	h.late.Go(func() {
		until, cancel := h.untilOff(ctx)
		defer cancel()
		h.watchGood(until)
	})
	h.late.Go(func() {
		until, cancel := h.untilOff(ctx)
		defer cancel()
		clock.watch(until)
	})
	if len(d.missing) > 0 {
		h.late.Go(func() { h.awaitLate(ctx, wg, d) })
	}
	return nil
}

// untilOff returns a context that ends when the machine is to go off.
func (h *host) untilOff(ctx context.Context) (context.Context, context.CancelFunc) {
	until, cancel := context.WithCancel(ctx)
	go func() { // ends with until
		select {
		case <-h.off:
			cancel()
		case <-until.Done():
		}
	}()
	return until, cancel
}

// Words of the status that a device which appears late changes.
const (
	allDone       = "all stages are done"
	deviceMissing = "device-missing"
	noWork        = "no-work-domain"
	diskLocked    = "disk-locked"
)

// tryWork starts the work domain, or says why it cannot. It waits for the disk
// while until lasts; what it starts lasts as long as ctx.
func (h *host) tryWork(until, ctx context.Context, wg *sync.WaitGroup) {
	h.starting.Lock()
	defer h.starting.Unlock()
	h.mu.Lock()
	idle := h.work == nil
	h.mu.Unlock()
	if !idle || until.Err() != nil {
		return
	}
	err := h.startWork(until, ctx, wg)
	if until.Err() != nil && err != nil {
		return // going off
	}
	h.mu.Lock()
	reason := h.state.Reason
	h.mu.Unlock()
	if err == nil {
		if reason == noWork || reason == diskLocked { // of an earlier try
			h.set("running", "", allDone)
		}
		h.console.line("init", "running")
		return
	}
	why := noWork
	var locked *disk.Fault
	if errors.As(err, &locked) {
		why = diskLocked
		h.console.line("init", "%s", locked.Words())
		if h.disk.Status().State != disk.Wiped { // no recovery key opens that
			h.late.Go(func() { h.prompt.Do(func() { h.promptRecovery(ctx, wg) }) })
		}
	}
	if reason == "" || reason == noWork { // otherwise the missing device or service is the news
		h.set("running", why, err.Error())
	}
	h.console.line("init", "no work domain: %v / 業務領域を起動できません", err)
}

// lack notes the devices that are missing.
func (h *host) lack(missing []node) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.missing = slices.Clone(missing)
}

// awaitLate sets up devices that were missing at boot when they appear, until
// the machine goes off, and starts the work domain if it waited for them.
func (h *host) awaitLate(ctx context.Context, wg *sync.WaitGroup, d *devices) {
	until, cancel := h.untilOff(ctx)
	defer cancel()
	d.await(until, lateWait, func(came []node) {
		h.appeared(came, d.missing)
		if slices.ContainsFunc(came, node.forWork) {
			h.tryWork(until, ctx, wg)
		}
	})
}

// appeared takes note of devices that have come late.
func (h *host) appeared(came, missing []node) {
	for _, n := range came {
		h.console.line("init", "appeared: %s", n.path)
		if n.path != TPMDevice {
			continue
		}
		if err := shareBootLog(); err != nil {
			h.console.line("init", "warning: event log: %v", err)
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.missing = slices.Clone(missing)
	if h.state.Reason != deviceMissing {
		return
	}
	h.state.Reason, h.state.Detail, h.state.Since = "", allDone, time.Now()
	if len(missing) > 0 {
		h.state.Reason, h.state.Detail = deviceMissing, missing[0].needed
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// closeRuleset runs `netd close` and insists that it succeeds.
func (h *host) closeRuleset(ctx context.Context) error {
	log, err := os.OpenFile(LogDir+"/netd-close.log", os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	svc := closeCommand()
	pid, exited, err := h.children.start(svc.Args[0], svc.Args, &syscall.ProcAttr{
		Dir: "/", Env: []string{"PATH=/bbin:/usr/bin:/bin", "HOME=/"},
		Files: []uintptr{log.Fd(), log.Fd(), log.Fd()}, Sys: &syscall.SysProcAttr{Setsid: true},
	}, "")
	if err != nil {
		return err
	}
	select {
	case ws := <-exited:
		if ws.ExitStatus() == 0 {
			return nil
		}
		said, _ := os.ReadFile(LogDir + "/netd-close.log")
		return fmt.Errorf("%s: %s: %.160s", svc.Name, exitText(ws), said)
	case <-time.After(closeTimeout):
		h.children.signal(pid, syscall.SIGKILL)
		return fmt.Errorf("%s: no answer in %v", svc.Name, closeTimeout)
	}
}

// startWork opens the disk and starts the work domain if everything it needs
// is there.
func (h *host) startWork(until, ctx context.Context, wg *sync.WaitGroup) error {
	if slices.Contains(h.broken, ServesWorkDomain) {
		return errors.New("a module for KVM, vsock or dm-crypt could not be loaded")
	}
	h.mu.Lock()
	missing := h.missing
	h.mu.Unlock()
	if i := slices.IndexFunc(missing, node.forWork); i >= 0 {
		return fmt.Errorf("%s is missing", missing[i].path)
	}
	org, err := readOrganization()
	if err != nil {
		return err
	}
	device, err := h.openDisk(until)
	if err != nil {
		return err
	}
	uid, _ := lookup("vmm")
	link := ""
	if org.WorkDomain.Link == attest.LinkSerial {
		link = SerialSocket
	}
	card := ""
	if org.Logon != nil {
		card = CardSocket
	}
	c, err := vmm.Prepare(vmm.Config{
		MemoryMiB: org.WorkDomain.MemoryMiB, VCPUs: org.WorkDomain.VCPUs,
		Disk: device, Code: vmm.FirmwareCode, GuestCID: guestlink.WorkCID,
		BIOS: org.WorkDomain.Firmware == attest.FirmwareBIOS, Link: link, Card: card,
	}, workDir, vmm.FirmwareVars, int(uid))
	if err != nil {
		return err
	}
	if err := c.Validate(); err != nil {
		return err
	}
	args := append([]string{vmm.Binary}, vmm.Args(c)...)
	starts := make(chan struct{}, maxStarts)
	wg.Go(func() { h.measureWork(ctx, args, starts) })
	work, err := h.sup.add(ctx, Service{
		Name: "vmm", Args: args,
		User: "vmm", NewNetns: true, Log: WorkConsole,
		Started: func() {
			select {
			case starts <- struct{}{}:
			default: // as many wait already
			}
		},
	})
	if err != nil {
		return err
	}
	h.mu.Lock()
	h.work = work
	h.mu.Unlock()
	wg.Go(func() { h.machine.Run(ctx) })
	return nil
}

// makeVMMDir makes a folder in which a daemon listens for QEMU.
func makeVMMDir(path, owner string) error {
	uid, _ := lookup(owner)
	vmm, _ := lookup("vmm")
	err := os.MkdirAll(path, 0o710)
	if err == nil {
		err = errors.Join(os.Chown(path, int(uid), int(vmm)), os.Chmod(path, 0o710))
	}
	if err != nil {
		return fmt.Errorf("folder for QEMU: %w", err)
	}
	return nil
}

// workChanged follows the work domain: when its user has switched it off, the
// laptop goes off.
func (h *host) workChanged(s vmm.Status) {
	h.console.line("vmm", "%s", strings.TrimSpace(s.State.String()+" "+s.Detail))
	if s.State == vmm.Shutdown {
		h.mu.Lock()
		work := h.work
		h.mu.Unlock()
		if work != nil {
			work.last()
		}
		h.powerOff()
	}
}

func (h *host) powerOff() { h.offOnce.Do(func() { close(h.off) }) }

// restart is powerOff that ends in another boot.
func (h *host) restart() {
	h.mu.Lock()
	h.again = true
	h.mu.Unlock()
	h.powerOff()
}

// awaitOff waits for a request to switch off: the API, the work domain, or a
// signal as other inits understand it.
func (h *host) awaitOff(ctx context.Context) {
	sig := make(chan os.Signal, 1)
	signal.Notify(sig, syscall.SIGTERM, syscall.SIGINT)
	defer signal.Stop(sig)
	select {
	case <-h.off:
	case <-sig:
		h.powerOff()
	}
}

// shutdown stops the work domain, then the services.
func (h *host) shutdown() {
	h.late.Wait() // before anything is stopped, so that it starts nothing
	h.set("stopping", "", "the laptop goes off")
	h.console.line("init", "stopping")
	h.mu.Lock()
	work := h.work
	h.mu.Unlock()
	if work != nil {
		work.last()
		ctx, cancel := context.WithTimeout(context.Background(), workTimeout)
		if err := h.machine.PowerDown(ctx); err == nil {
			select {
			case <-work.done:
			case <-ctx.Done():
				h.console.line("init", "warning: the work domain did not switch off in %v", workTimeout)
			}
		}
		cancel()
	}
	if h.sup != nil {
		h.sup.stopAll()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.again {
		h.console.line("init", "restart")
		return
	}
	h.console.line("init", "power off")
}

func (h *host) set(state, reason, detail string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.state.State, h.state.Reason, h.state.Detail, h.state.Since = state, reason, detail, time.Now()
}

// status gathers what GET /v1/status answers.
func (h *host) status() Status {
	h.mu.Lock()
	s := h.state
	for _, n := range h.missing {
		s.Missing = append(s.Missing, n.path)
	}
	slots, fault := h.slots, h.slotsFault
	h.mu.Unlock()
	if slots != nil {
		s.Slots = slots.Status()
	}
	s.Slots.Detail = fault
	s.Disk = h.disk.Status()
	s.Services, s.Work, s.Modules = h.sup.status(), h.machine.Status(), h.loader.results()
	s.Memory = readMemory("/proc/meminfo")
	return s
}

func (h *host) serveAPI(ctx context.Context, wg *sync.WaitGroup) error {
	f, err := listenAPI(InitSocket, "")
	if err != nil {
		return err
	}
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return err
	}
	srv := newServer(handler(actions{
		status: h.status, powerOff: h.powerOff, wake: h.machine.Wake,
		recover: func(r context.Context, typed string) error { return h.recoverDisk(r, ctx, wg, typed) },
		wipe:    h.wipeDisk,
		restart: h.restart, update: h.stageUpdate, ask: h.askUpdate,
	}))
	wg.Go(func() {
		if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			h.console.line("init", "warning: api: %v", err)
		}
	})
	return nil
}
