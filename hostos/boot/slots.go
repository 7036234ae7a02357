package boot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"sekisho/attest"
	"sekisho/attest/gate"
	"sekisho/hostos/disk"
	"sekisho/hostos/store"
	"sekisho/hostos/update"
)

// maxBootLog bounds what is read of the firmware's event log in bytes.
const maxBootLog = 512 << 10

// attemptAction is the event of each attempt to start something (TCG PC Client
// Platform Firmware Profile 1.06, section 10.4.4).
const attemptAction = "Calling EFI Application from Boot Option"

// attempts counts how often the firmware tried to start something in this boot.
func attempts(log string) int {
	f, err := os.Open(log)
	if err != nil {
		return 0 // no TPM: attestation says so
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxBootLog))
	if err != nil {
		return 0
	}
	return bytes.Count(data, []byte(attemptAction))
}

// findSlot returns where the slot's partition is, and the size of a block of
// its disk in bytes.
func findSlot(sysBlock, dir string, s update.Slot) (update.Place, int64, error) {
	target, err := os.Readlink(filepath.Join(dir, s.Label()))
	if err != nil {
		return update.Place{}, 0, fmt.Errorf("no partition %s", s.Label())
	}
	fail := func(err error) (update.Place, int64, error) {
		return update.Place{}, 0, fmt.Errorf("partition %s: %w", s.Label(), err)
	}
	// A partition's folder is in that of its disk.
	folder, err := filepath.EvalSymlinks(filepath.Join(sysBlock, filepath.Base(target)))
	if err != nil {
		return fail(err)
	}
	number := func(path string) (n uint64) {
		b, rerr := os.ReadFile(path)
		if rerr == nil {
			n, rerr = strconv.ParseUint(strings.TrimSpace(string(b)), 10, 32)
		}
		err = errors.Join(err, rerr)
		return n
	}
	index, block := number(filepath.Join(folder, "partition")), number(filepath.Join(folder, "..", "queue", "logical_block_size"))
	if err != nil {
		return fail(err)
	}
	f, err := os.Open(filepath.Join(filepath.Dir(target), filepath.Base(filepath.Dir(folder))))
	if err != nil {
		return fail(err)
	}
	defer f.Close()
	p, err := update.ReadPlace(f, int64(block), uint32(index))
	if err != nil {
		return fail(err)
	}
	return p, int64(block), nil
}

// openSlots finds the two slots and the one that runs.
func openSlots() (*update.Slots, update.Action, error) {
	efivarfs := mountEFIVars()
	vars := update.EFIVars{Dir: efivarfs.path, Writable: efivarfs.writable}
	c := update.Config{
		Places: map[update.Slot]update.Place{}, Vars: vars, Attempts: attempts(bootLog), Now: time.Now,
		Keep: store.Record{Path: byPartlabel + "/" + HostPart, Place: store.SlotsPlace},
		Open: func(s update.Slot) (update.Device, error) {
			return os.OpenFile(filepath.Join(byPartlabel, s.Label()), os.O_RDWR, 0)
		},
	}
	loaded, err := vars.Loaded()
	if err != nil {
		return nil, update.Nothing, fmt.Errorf("which slot runs is unknown: %w", err)
	}
	for _, s := range update.Both() {
		p, block, err := findSlot("/sys/class/block", byPartlabel, s)
		if err != nil {
			return nil, update.Nothing, err
		}
		c.Places[s], c.Block = p, block
		if p.UUID() == loaded {
			c.Running = s
		}
	}
	if c.Running == update.None {
		return nil, update.Nothing, fmt.Errorf("this boot was started from %.40q, which is neither slot", loaded)
	}
	return update.Begin(c)
}

// beginSlots finds out which slot runs and whether it has to prove good. It
// reports whether the laptop is to be restarted at once.
func (h *host) beginSlots() (restart bool) {
	slots, action, err := openSlots()
	h.mu.Lock()
	h.slots, h.slotsFault = slots, ""
	if err != nil {
		h.slotsFault = err.Error()
	}
	h.mu.Unlock()
	if err != nil {
		h.console.line("init", "warning: slots: %v", err)
	}
	if slots == nil {
		return false
	}
	s := slots.Status()
	if f := s.Failed; f != nil {
		h.console.line("init", "the last update %s did not prove good (%s) / 前回の更新 %[1]s は正常に起動しませんでした", f.Version, f.Reason)
	}
	switch action {
	case update.Watch:
		h.console.line("init", "trial of release %s in slot %s / リリース %[1]s を試行しています", s.Trial.Version, s.Running)
	case update.Restart:
		h.console.line("init", "the firmware did not start slot %s at once; restarting / 再起動します", s.Good)
	default:
		h.console.line("init", "slot %s", s.Running)
	}
	return action == update.Restart
}

// stageUpdate writes an image to the slot that does not run.
func (h *host) stageUpdate(ctx context.Context, image io.Reader, size int64) error {
	h.mu.Lock()
	slots, fault := h.slots, h.slotsFault
	h.mu.Unlock()
	if slots == nil || fault != "" {
		return fmt.Errorf("update: there are no two slots: %s", fault)
	}
	running, err := update.ReadRelease(policyFile)
	if err != nil {
		return err
	}
	f := h.follower(running, slots)
	if err := slots.Stage(ctx, image, size, func(policy []byte, _ attest.Digest) (*update.Release, error) { return f.Check(ctx, policy) }); err != nil {
		return err
	}
	slots.Announce(f.Say)
	return nil
}

// askUpdate has the verifiers asked for a release now, if this boot may take
// one.
func (h *host) askUpdate() error {
	if org, err := readOrganization(); err != nil || org.Updates == nil {
		return errors.Join(errors.New("update: the organisation names nobody whose releases are taken"), err)
	}
	select {
	case h.ask <- struct{}{}:
	default: // somebody has asked already
	}
	return nil
}

func (h *host) follower(running *update.Release, slots *update.Slots) *update.Follower {
	return &update.Follower{Running: running, Source: gate.NewClient(AttestdSocket), Slots: slots, Now: h.ask,
		Say: func(format string, a ...any) { h.console.line("init", format, a...) }}
}

// watchGood makes the running slot the good one once this boot has proved so,
// and raises the rollback counter after that; a trial that does not is ended.
// Then it takes the organisation's releases until ctx ends.
func (h *host) watchGood(ctx context.Context) {
	release, err := update.ReadRelease(policyFile)
	if err != nil {
		release = nil // an image without policies: the disk says so
	}
	limit, updates := attest.DefaultTrialMinutes, false
	if org, err := readOrganization(); err == nil && org.Updates != nil {
		updates = true
		if org.Updates.TrialMinutes > 0 {
			limit = org.Updates.TrialMinutes
		}
	}
	h.mu.Lock()
	slots, fault := h.slots, h.slotsFault
	h.mu.Unlock()
	netd, attestd := unixClient(NetdSocket), unixClient(AttestdSocket)
	g := update.Good{
		Release: release, Slots: slots, Trial: slots != nil && slots.Status().Trial != nil && slots.Status().Trial.Stage == update.Trying,
		Limit: time.Duration(limit) * time.Minute,
		Look: func(ctx context.Context) update.Proof {
			state, err := daemonState(ctx, netd)
			papers, perr := daemonState(ctx, attestd)
			d := h.disk.Status()
			return update.Proof{
				Uplink:  err == nil && state != "Dark" && state != "Portal",
				Good:    err == nil && state == "Tunnel" && d.State == disk.Open,
				Refused: perr == nil && papers == gate.StateRefused || d.State == disk.Locked && len(d.Codes) > 0,
			}
		},
		Restart: h.restart,
		Raise:   gate.NewClient(AttestdSocket).RaiseRollback,
		Say:     func(format string, a ...any) { h.console.line("init", format, a...) },
	}
	g.Watch(ctx)
	if updates && release != nil && slots != nil && fault == "" && slots.Status().Good == slots.Status().Running {
		h.follower(release, slots).Follow(ctx)
	}
}
