package lab

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestStages(t *testing.T) {
	for line, want := range map[string][]string{
		"sekisho [    3.100] init: started":                                 {StageFirmware, StageKernel},
		"sekisho [    3.300] init: closed ruleset in force":                 nil,
		"sekisho [   14.020] netd: Dark no-carrier":                         {StageInit},
		"sekisho [   14.020] netd: Linked eth0 192.168.50.23/24":            {StageInit, StageUplink},
		"sekisho [   15.710] attestd: affirming until 2026-11-21T10:10:00Z": {StageInit, StageAttested},
		"noise sekisho [   16.332] netd: Tunnel inner 10.80.0.2":            {StageInit, StageUplink, StageTunnel},
		"sekisho [   21.004] linkd: linked cid 3":                           {StageInit, StageWork},
		"sekisho [   21.004] linkd: ":                                       nil,
		"sekisho [  x] netd: Tunnel up":                                     nil,
		"sekisho [ netd: Tunnel":                                            nil,
		"BdsDxe: loading Boot0001":                                          nil,
	} {
		if got := ends(line); !slices.Equal(got, want) {
			t.Errorf("%q: got %v, want %v", line, got, want)
		}
	}
}

func TestVerdict(t *testing.T) {
	err := verdict("sekisho [   15.710] attestd: refused image-mismatch: kernel is not the released one")
	if !Refused(err) || !strings.Contains(err.Error(), "kernel") {
		t.Errorf("refusal: %v", err)
	}
	err = verdict(`BdsDxe: failed to load Boot0001 "UEFI Misc Device" from PciRoot(0x0)/Pci(0x2,0x0): Access Denied`)
	if !FirmwareRefused(err) {
		t.Errorf("firmware: %v", err)
	}
	if err := verdict("sekisho [   15.710] attestd: affirming until tomorrow"); err != nil {
		t.Error(err)
	}
}

func FuzzConsoleLine(f *testing.F) {
	f.Add("sekisho [   21.004] linkd: linked cid 3")
	f.Fuzz(func(t *testing.T, line string) {
		ends(line)
		verdict(line)
		parseStamped(line)
	})
}

func TestStampConsole(t *testing.T) {
	now := time.Date(2026, 11, 21, 10, 0, 0, 0, time.UTC)
	clock := func() time.Time { now = now.Add(time.Second); return now }
	var out bytes.Buffer
	in := "\x1b[2JEFI stub: go\r\n\r\nlast without end" + strings.Repeat("x", maxConsoleLine)
	if err := StampConsole(strings.NewReader(in), &out, clock); err != nil {
		t.Fatal(err)
	}
	var got []stamped
	for line := range strings.Lines(out.String()) {
		s, err := parseStamped(line)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, s)
	}
	if len(got) != 4 || got[0].text != "[2JEFI stub: go" || got[1].text != "" || !got[0].at.Equal(now.Add(-3*time.Second)) {
		t.Errorf("got %+v", got)
	}
}

func TestFollowSeesWhatComesLater(t *testing.T) {
	path := filepath.Join(t.TempDir(), "console.log")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	at := time.Date(2026, 11, 21, 10, 0, 0, 0, time.UTC)
	write := func(s string) { io.WriteString(f, s) }
	write(at.Format(stampLayout) + " first\n" + at.Format(stampLayout) + " sec")
	var seen []string
	err = follow(t.Context(), path, func(s stamped) (bool, error) {
		seen = append(seen, s.text)
		if s.text == "first" {
			write("ond\n")
		}
		return s.text == "second", nil
	})
	if err != nil || !slices.Equal(seen, []string{"first", "second"}) {
		t.Errorf("saw %q, %v", seen, err)
	}
}

func TestProcessesAreKnownByStartTime(t *testing.T) {
	c := exec.Command("sleep", "1000")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	start, ok := startTime(c.Process.Pid)
	if !ok {
		t.Fatal("a running process has no start time")
	}
	p := process{Name: "sleep", PID: c.Process.Pid, Start: start}
	other := process{Name: "another", PID: p.PID, Start: start + 1}
	if !p.alive() || other.alive() {
		t.Errorf("alive %v, another with its pid %v", p.alive(), other.alive())
	}
	if other.kill(15) == nil || !p.alive() {
		t.Error("a process of another start time was signalled")
	}
	if err := p.stop(t.Context(), time.Minute); err != nil || p.alive() {
		t.Errorf("stop: %v", err)
	}
}

func TestMachine(t *testing.T) {
	args := strings.Join(machine{accel: "tcg", disk: "/d", vars: "/v"}.arguments(), " ")
	for _, want := range []string{"-accel tcg,thread=multi -cpu EPYC,+svm", "file=/d", "file=/v", "tpm-crb", "org.sekisho.lab", "ifname=uplink"} {
		if !strings.Contains(args, want) {
			t.Errorf("no %q in %s", want, args)
		}
	}
	if args := strings.Join(machine{noTPM: true}.arguments(), " "); strings.Contains(args, "tpm") {
		t.Errorf("a machine without TPM has one: %s", args)
	}
}

func TestStateIsKept(t *testing.T) {
	l := &Lab{Root: t.TempDir(), Log: io.Discard}
	if s, err := l.load(); err != nil || s.Processes != nil {
		t.Errorf("state of a new checkout: %+v, %v", s, err)
	}
	for _, name := range []string{"a", "b"} {
		if err := l.update(func(s *state) { s.Processes = append(s.Processes, process{Name: name}) }); err != nil {
			t.Fatal(err)
		}
	}
	if s, err := l.load(); err != nil || len(s.Processes) != 2 {
		t.Errorf("state: %+v, %v", s, err)
	}
	if err := os.WriteFile(l.lab("state.json"), []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := l.load(); err == nil {
		t.Error("broken state was read")
	}
}

func TestKeysArePrivate(t *testing.T) {
	l := &Lab{Root: t.TempDir(), Log: io.Discard}
	if err := l.preparePKI(); err != nil {
		t.Fatal(err)
	}
	keys, err := filepath.Glob(l.lab("pki", "*.key"))
	if err != nil || !slices.Contains(keys, l.lab("pki", "ca.key")) {
		t.Fatalf("keys %v, %v: that of the CA is not among them", keys, err)
	}
	for _, k := range keys {
		if st, err := os.Stat(k); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", k, st.Mode(), err)
		}
	}
	before, err := os.ReadFile(l.OrganizationFile())
	if err != nil {
		t.Fatal(err)
	}
	if err := l.preparePKI(); err != nil {
		t.Fatal(err)
	}
	if after, err := os.ReadFile(l.OrganizationFile()); err != nil || !bytes.Equal(before, after) {
		t.Errorf("the second time made another organisation: %v", err)
	}
}

func TestCopySparse(t *testing.T) {
	dir := t.TempDir()
	from, to := filepath.Join(dir, "from"), filepath.Join(dir, "to")
	f, err := os.Create(from)
	if err != nil {
		t.Fatal(err)
	}
	f.WriteAt([]byte("begin"), 0)
	f.WriteAt([]byte("end"), 5<<20)
	f.Truncate(8 << 20)
	f.Close()
	if err := os.WriteFile(to, nil, 0o644); err != nil { // of an earlier run
		t.Fatal(err)
	}
	if err := copySparse(to, from); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(to); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("a copy that may hold a ticket: %v, %v", fi.Mode(), err)
	}
	a, _ := os.ReadFile(from)
	b, _ := os.ReadFile(to)
	if !bytes.Equal(a, b) {
		t.Error("the copy differs")
	}
	if err := copySparse(to, filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no source: %v", err)
	}
}
