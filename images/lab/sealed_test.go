package lab

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"sekisho/attest/gate"
	"sekisho/attest/seal"
	workdisk "sekisho/hostos/disk"
	"sekisho/hostos/store"
	"sekisho/hostos/update"
	"sekisho/images"
	"sekisho/images/disk"
	"sekisho/images/lab/hook"
)

// recoveryLine finds the recovery key on the console.
var recoveryLine = regexp.MustCompile(`recovery key of the work disk[^:]*: ([0-9-]{55})`)

// TestSealedBoot is one laptop over several boots: its disk is made and opens
// again, after an update too, which proves good or is given up; it opens for
// nothing else, and then by its recovery key. The power goes at each step.
func TestSealedBoot(t *testing.T) {
	b := realLab(t)
	const epoch = seal.FirstEpoch + 3
	next, reference, err := b.Next("1-lab", epoch)
	must(t, err)
	_, err = b.tamper("cmdline", b.out("next"))
	must(t, err)
	vars := filepath.Join(t.TempDir(), "vars.fd")

	var recovery string
	b.bootStep(t, "first boot makes the disk", func(t *testing.T) {
		r, err := b.Up(t.Context(), Boot{Accept: []string{reference}})
		must(t, err)
		t.Logf("page read after %.1f s", r.Stages[len(r.Stages)-1].Seconds)
		b.disk(t, workdisk.Open, "")
		found := recoveryLine.FindAllStringSubmatch(b.console(t), -1)
		if len(found) != 1 {
			t.Fatalf("%d recovery keys on the console", len(found))
		}
		recovery = found[0][1]
		device := regexp.MustCompile(`"device_id": "([0-9a-f]{64})"`)
		list, err := b.attestctl(t.Context(), nil, "device", "list", "-json")
		must(t, err)
		id := device.FindSubmatch(list)
		if id == nil {
			t.Fatalf("no device in %s", list)
		}
		if e, err := b.attestctl(t.Context(), nil, "recovery", "escrow", string(id[1])); err != nil || !bytes.Contains(e, []byte("ciphertext")) {
			t.Errorf("escrow: %s, %v", e, err)
		}
		b.untilConsole(t, "rollback counter at 16")
		if k := b.askKey(t); len(k.Codes) == 0 || !strings.Contains(strings.Join(k.Codes, " "), gate.CodeUsed) {
			t.Errorf("a second key in one boot: %+v", k)
		}
		b.layer(t)
		b.slots(t, "a", "a", "")
		// Power cut while an update is written: slot b has no file system then.
		must(t, b.PublishRelease(t.Context(), b.out("next")))
		b.init(t, "update")
		b.until(t, "the update to be under way", func(context.Context) bool { return b.slotRecord(t).Trial != nil })
		must(t, b.Cut(t.Context()))
		if r := b.slotRecord(t); r.Trial == nil || r.Trial.Stage != update.Writing {
			t.Fatalf("the power went too late: %+v", r.Trial)
		}
	})
	b.bootStep(t, "power cut in an update, no site: opens all the same", func(t *testing.T) {
		for _, name := range []string{"verifier", "gateway"} {
			must(t, b.Kill(t.Context(), name))
		}
		_, err := b.Again(t.Context(), Boot{Stay: true})
		must(t, err)
		b.untilWork(t)
		b.disk(t, workdisk.Open, "")
		b.noPage(t)
		b.slots(t, "a", "a", "")
		must(t, b.StartVerifier(t.Context()))
		must(t, b.StartGateway(t.Context()))
		b.untilConsole(t, "release 1-lab is being fetched")
		b.slots(t, "a", "a", update.Armed)
		b.untilConsole(t, "release 1-lab is in slot b and is tried at the next start") // BootNext is written after the record
		must(t, b.Cut(t.Context()))                                                    // told the firmware, not restarted
	})
	b.bootStep(t, "trial of the update is good, power cut in the raise", func(t *testing.T) {
		_, err := b.Again(t.Context(), Boot{Stay: true})
		must(t, err)
		b.untilConsole(t, "trial of release 1-lab in slot b")
		b.untilConsole(t, "release 1-lab is good; raising the rollback counter to 19")
		b.disk(t, workdisk.Open, "")
		b.slots(t, "b", "b", "")
		must(t, b.Cut(t.Context()))
	})
	b.bootStep(t, "the raise is finished; an update that is bad", func(t *testing.T) {
		r, err := b.Again(t.Context(), Boot{})
		must(t, err)
		t.Logf("page read after %.1f s", r.Stages[len(r.Stages)-1].Seconds)
		b.untilConsole(t, "rollback counter at 19")
		b.disk(t, workdisk.Open, "")
		b.slots(t, "b", "b", "")
		if k := b.askOlder(t); !slices.Equal(k.Codes, []string{gate.CodeRolledBack}) {
			t.Errorf("the older release: %+v", k)
		}
		b.put(t, b.out("tamper-cmdline", images.HostImage))
		b.init(t, "update", staged)
		b.slots(t, "b", "b", update.Armed)
		b.init(t, "restart")
		b.restarted(t, "init: restart")
	})
	b.bootStep(t, "the bad update is tried and given up", func(t *testing.T) {
		// Another command line: neither key nor papers.
		b.restarted(t, "trial of release 1-lab in slot a", "work disk stays locked ("+gate.CodeImage, "業務ディスクは開きません", "no work domain",
			"attestd: refused", "netd: Attesting", "this image did not prove good (refused)", "前のイメージに戻ります", "init: restart")
		b.untilConsole(t, "the last update 1-lab did not prove good (refused)")
		b.untilPage(t)
		b.disk(t, workdisk.Open, "")
		b.slots(t, "b", "b", "")
		_, err := b.attestctl(t.Context(), nil, "release", "percent", "1-lab", "-percent", "0") // or the older image would take it
		must(t, err)
	})
	b.bootStep(t, "the older image, and the recovery key", func(t *testing.T) {
		old := b.Laptop()
		_, err := b.Again(t.Context(), Boot{Image: Image{Name: "older", Disk: old.Disk}, Stay: true})
		must(t, err)
		b.locked(t, gate.CodeRolledBack)
		wrong := "000011" + recovery[6:]
		if a := b.recover(t, wrong); a.Exit == 0 || !strings.Contains(string(a.Stderr), "recovery") {
			t.Errorf("wrong recovery key: %d %s", a.Exit, a.Stderr)
		}
		if a := b.recover(t, recovery); a.Exit != 0 {
			t.Fatalf("recovery key: %d %s", a.Exit, a.Stderr)
		}
		b.untilWork(t)
		b.disk(t, workdisk.Open, "")
	})
	b.bootStep(t, "Secure Boot off", func(t *testing.T) {
		// Without its variables the firmware starts slot a, and init has it start
		// the good one.
		must(t, b.Cut(t.Context()))
		must(t, copySparse(vars, b.lab("vars.fd")))
		_, err := b.Again(t.Context(), Boot{Image: Image{Name: next.Name, Disk: next.Disk, Vars: images.BlankVars}, Stay: true})
		must(t, err)
		b.restarted(t, "the firmware did not start slot b at once; restarting")
		b.locked(t, gate.CodeSecureBoot)
		b.untilState(t, "attestd", "refused", "")
	})
	b.bootStep(t, "the disk's header exchanged", func(t *testing.T) {
		must(t, b.Cut(t.Context()))
		at, _, err := disk.Find(b.lab("laptop.img"), disk.Work)
		must(t, err)
		f, err := os.OpenFile(b.lab("laptop.img"), os.O_RDWR, 0)
		must(t, err)
		_, err = f.WriteAt([]byte("exchanged"), at+512<<10) // after the key slot, where nothing is
		must(t, err)
		must(t, f.Close())
		_, err = b.Again(t.Context(), Boot{Image: Image{Name: next.Name, Vars: vars}, Stay: true})
		must(t, err)
		b.locked(t, gate.CodeHeader)
	})
	b.cleanUplink(t, true)
}

// bootStep is one boot of a laptop that goes on in the next: a failure ends
// the test.
func (b *bench) bootStep(t *testing.T, name string, do func(*testing.T)) {
	begin := time.Now()
	ok := t.Run(name, func(t *testing.T) {
		t.Cleanup(func() {
			if t.Failed() {
				b.evidence(context.WithoutCancel(t.Context()), t)
			}
		})
		do(t)
	})
	t.Logf("%s: %.0f s", name, time.Since(begin).Seconds())
	if !ok {
		t.FailNow()
	}
}

// staged is where put leaves an image on the laptop.
const staged = "/tmp/update.efi"

// put brings an image onto the laptop.
func (b *bench) put(t *testing.T, image string) {
	t.Helper()
	data, err := os.ReadFile(image)
	must(t, err)
	command := "cat > "
	for part := range slices.Chunk(data, 2<<20) {
		a, err := b.Call(t.Context(), hook.Request{Target: hook.Host, Argv: []string{"gosh", "-c", command + staged}, Stdin: part, Timeout: time.Minute})
		must(t, err)
		if a.Exit != 0 {
			t.Fatalf("put %s: %s", image, a.Stderr)
		}
		command = "cat >> "
	}
}

// init runs one of init's commands on the laptop.
func (b *bench) init(t *testing.T, args ...string) {
	t.Helper()
	a, err := b.Call(t.Context(), hook.Request{Target: hook.Host, Argv: append([]string{"init"}, args...), Timeout: stepTime})
	must(t, err)
	if a.Exit != 0 {
		t.Fatalf("init %s: exit %d: %s", args, a.Exit, a.Stderr)
	}
}

// restarted waits until the laptop restarts itself, which ends QEMU, having
// said these words, and gives it power again.
func (b *bench) restarted(t *testing.T, words ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), stepTime)
	defer cancel()
	must(t, waitFor(ctx, "the laptop to restart", func() (bool, error) {
		_, err := b.find("qemu")
		return err != nil, nil
	}))
	for _, w := range words {
		if !strings.Contains(b.console(t), w) {
			t.Errorf("the console does not say %s", w)
		}
	}
	_, err := b.Again(t.Context(), Boot{Stay: true})
	must(t, err)
}

// askOlder asks attestd whether the first release may follow the next one.
func (b *bench) askOlder(t *testing.T) (k gate.KeyRefused) {
	t.Helper()
	running, err := os.ReadFile(b.out("next", "release.json"))
	must(t, err)
	older, err := os.ReadFile(b.out("release.json"))
	must(t, err)
	body, err := json.Marshal(gate.UpdateRequest{Running: running, Next: older})
	must(t, err)
	a, err := b.Call(t.Context(), hook.Request{Target: hook.Host, Socket: "/run/sekisho/attestd.sock", Method: http.MethodPost, Path: "/v1/release", Stdin: body, Timeout: time.Minute})
	must(t, err)
	must(t, json.Unmarshal(a.Stdout, &k))
	return k
}

// slotRecord is what the laptop's disk says of its slots; init may be writing it.
func (b *bench) slotRecord(t *testing.T) (r update.Record) {
	t.Helper()
	image := b.lab("laptop.img")
	at, _, err := disk.Find(image, disk.Host)
	must(t, err)
	if data, err := (store.Record{Path: image, Place: at + store.SlotsPlace}).Load(); err == nil {
		must(t, json.Unmarshal(data, &r))
	}
	return r
}

// slots fails the test unless the slots stand like this.
func (b *bench) slots(t *testing.T, running, good update.Slot, stage update.Stage) {
	t.Helper()
	b.until(t, fmt.Sprintf("slot %s to run, %s to be good, trial %q", running, good, stage), func(ctx context.Context) bool {
		s, err := b.Slots(ctx)
		if err != nil || s.Detail != "" {
			return false
		}
		now := update.Stage("")
		if s.Trial != nil {
			now = s.Trial.Stage
		}
		return s.Running == running && s.Good == good && now == stage
	})
}

func (b *bench) console(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(b.run("console.log"))
	must(t, err)
	return string(text)
}

// untilConsole waits for words on the console of this boot.
func (b *bench) untilConsole(t *testing.T, words string) {
	t.Helper()
	b.until(t, "the console to say "+words, func(context.Context) bool { return strings.Contains(b.console(t), words) })
}

// disk fails the test unless the disk is in this state.
func (b *bench) disk(t *testing.T, state, code string) {
	t.Helper()
	b.until(t, "the disk to be "+state, func(ctx context.Context) bool {
		d, err := b.Disk(ctx)
		return err == nil && d.State == state && strings.Contains(strings.Join(d.Codes, " "), code)
	})
}

// layer puts over the disk what an ephemeral work domain gets, by init's own
// commands, and finds that a write to it does not reach the disk.
func (b *bench) layer(t *testing.T) {
	t.Helper()
	_, size, err := disk.Find(b.lab("laptop.img"), disk.Work)
	must(t, err)
	open, create := workdisk.LayerCommands("/dev/disk/by-partlabel/sekisho-scratch", "/dev/mapper", size-workdisk.HeaderSize)
	const first = "head -c 16 /dev/mapper/"
	for _, c := range []struct {
		command string
		stdin   []byte
		want    string
	}{
		{command: strings.Join(open, " "), stdin: bytes.Repeat([]byte("k"), workdisk.LayerKeySize)},
		{command: strings.Join(create[:4], " ") + " '" + create[4] + "'"},
		{command: "echo gone at power-off > /dev/mapper/sekisho-layer"},
		{command: first + "sekisho-layer", want: "gone at power-of"},
		{command: first + "sekisho-work", want: ""},
	} {
		a, err := b.Call(t.Context(), hook.Request{Target: hook.Host, Argv: []string{"gosh", "-c", "export DM_DISABLE_UDEV=1; " + c.command}, Stdin: c.stdin, Timeout: time.Minute})
		must(t, err)
		if a.Exit != 0 || c.want != "" && string(a.Stdout) != c.want || strings.HasSuffix(c.command, "sekisho-work") && bytes.Contains(a.Stdout, []byte("gone")) {
			t.Errorf("%s: exit %d: %q %s", c.command, a.Exit, a.Stdout, a.Stderr)
		}
	}
}

// locked waits until the disk stays locked for this reason, says so in both
// languages, and the work domain is off.
func (b *bench) locked(t *testing.T, code string) {
	t.Helper()
	b.untilConsole(t, "no work domain")
	console := b.console(t)
	if !strings.Contains(console, "work disk stays locked ("+code) || !strings.Contains(console, "業務ディスクは開きません") {
		t.Errorf("the console does not say %s in both languages", code)
	}
	b.disk(t, workdisk.Locked, code)
	if a, err := b.Exec(t.Context(), hook.Work, "uname"); err == nil && a.Exit == 0 {
		t.Error("the work domain runs")
	}
}

func (b *bench) recover(t *testing.T, typed string) hook.Response {
	t.Helper()
	a, err := b.Call(t.Context(), hook.Request{Target: hook.Host, Argv: []string{"init", "recover"}, Stdin: []byte(typed), Timeout: time.Minute})
	must(t, err)
	return a
}

// askKey asks attestd for the disk's key as init does.
func (b *bench) askKey(t *testing.T) (k gate.KeyRefused) {
	t.Helper()
	image := b.lab("laptop.img")
	at, _, err := disk.Find(image, disk.Host)
	must(t, err)
	data, err := store.Record{Path: image, Place: at + store.VolumePlace}.Load()
	must(t, err)
	var record struct{ Volume []byte }
	must(t, json.Unmarshal(data, &record))
	at, _, err = disk.Find(image, disk.Work)
	must(t, err)
	f, err := os.Open(image)
	must(t, err)
	defer f.Close()
	head := make([]byte, workdisk.HeaderSize)
	_, err = f.ReadAt(head, at)
	must(t, err)
	release, err := os.ReadFile(b.out("release.json"))
	must(t, err)
	body, err := json.Marshal(gate.UnlockRequest{Volume: record.Volume, Header: sha256.Sum256(head), Release: release})
	must(t, err)
	a, err := b.Call(t.Context(), hook.Request{Target: hook.Host, Socket: "/run/sekisho/attestd.sock", Method: http.MethodPost, Path: "/v1/unlock", Stdin: body})
	must(t, err)
	if a.Exit != http.StatusForbidden {
		t.Errorf("http status %d", a.Exit)
	}
	must(t, json.Unmarshal(a.Stdout, &k))
	return k
}
