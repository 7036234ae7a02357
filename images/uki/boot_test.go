package uki

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-attestation/attest"
	"github.com/klauspost/compress/zstd"

	"sekisho/images/debian"
	"sekisho/images/disk"
)

// ovmf is where Debian's package ovmf keeps the firmware.
const ovmf = "/usr/share/OVMF/"

// bootLimit is five times what a boot took under TCG on two cores that other
// work shared (20 s; 12 s alone).
const bootLimit = 100 * time.Second

// initScript prints what the TPM and the kernel's copy of the event log hold.
const initScript = `#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t securityfs sec /sys/kernel/security
echo "UPTIME $(cut -d' ' -f1 /proc/uptime)"
for i in 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do echo "PCR $i $(cat /sys/class/tpm/tpm0/pcr-sha256/$i)"; done
for b in $(base64 -w 76 /sys/kernel/security/tpm0/binary_bios_measurements); do echo "LOG $b"; done
[ -e /.extra/tpm2-pcr-signature.json ] && echo "POLICY $(cat /.extra/tpm2-pcr-signature.json)"
[ -e /tampered/file ] && echo "EXTRA $(cat /tampered/file)"
echo "DONE"
poweroff -f
`

// machine is what a boot needs.
type machine struct {
	parts Parts
	keys  *Keys
	vars  []byte
	dir   string
}

// privileged skips unless root runs all tests; then every tool must be there.
func privileged(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 || os.Getenv("SEKISHO_TEST") != "all" {
		t.Skip("boots virtual machines: runs as root with SEKISHO_TEST=all")
	}
}

func newMachine(t *testing.T, ballast int) *machine {
	t.Helper()
	set, err := debian.Fetch(t.Context(), debian.Config{Cache: "../../out/cache"}, "linux-image-amd64", "systemd-boot-efi", "busybox-static")
	if err != nil {
		t.Fatal(err)
	}
	read := func(pattern string) (string, []byte) {
		for _, p := range set.Packages {
			names, _ := fs.Glob(p.FS(), pattern)
			if len(names) == 1 {
				b, err := fs.ReadFile(p.FS(), names[0])
				if err != nil {
					t.Fatal(err)
				}
				return names[0], b
			}
		}
		t.Fatalf("no %s in Debian's packages", pattern)
		return "", nil
	}
	name, kernel := read("boot/vmlinuz-*")
	_, stub := read("usr/lib/systemd/boot/efi/linuxx64.efi.stub")
	_, busybox := read("usr/bin/busybox")

	var archive bytes.Buffer
	cpioEntry(&archive, 1, 0o040755, "bin", nil)
	cpioEntry(&archive, 2, 0o040755, "proc", nil)
	cpioEntry(&archive, 3, 0o040755, "sys", nil)
	cpioEntry(&archive, 4, 0o040755, "dev", nil)
	cpioEntry(&archive, 5, 0o100755, "bin/busybox", busybox)
	cpioEntry(&archive, 6, 0o100755, "init", []byte(initScript))
	cpioEntry(&archive, 0, 0, "TRAILER!!!", nil)
	z, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	initrd := z.EncodeAll(archive.Bytes(), nil)
	// The kernel stops at the trailer and skips zeros: bytes to hash, not to
	// unpack.
	initrd = append(initrd, make([]byte, ballast)...)

	keys, err := LoadKeys(filepath.Join(t.TempDir(), "keys"), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	blank, err := os.ReadFile(ovmf + "OVMF_VARS_4M.fd")
	if err != nil {
		t.Fatal(err)
	}
	vars, err := keys.SecureBoot().Variables(blank)
	if err != nil {
		t.Fatal(err)
	}
	return &machine{
		parts: Parts{
			Stub: stub, Kernel: kernel, Initrd: initrd,
			Cmdline:   "console=ttyS0 panic=-1 quiet",
			OSRelease: "ID=sekisho\nVERSION_ID=test\n",
			Uname:     strings.TrimPrefix(filepath.Base(name), "vmlinuz-"),
		},
		keys: keys, vars: vars, dir: t.TempDir(),
	}
}

// boot runs image in an emulated machine with Secure Boot and a TPM until it
// prints DONE or until stop says so, and returns the lines of its console. The
// firmware's variables persist from boot to boot.
func (m *machine) boot(t *testing.T, image []byte, stop func(line string) bool) []string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), bootLimit)
	defer cancel()
	path := func(name string) string { return filepath.Join(m.dir, name) }
	if err := os.WriteFile(path("vars.fd"), m.vars, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := disk.Create(path("disk.img"), disk.Layout{Boot: image}); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(path("tpm"), 0o700); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(ctx, "swtpm_setup", "--tpm2", "--tpmstate", path("tpm"), "--pcr-banks", "sha256", "--overwrite").CombinedOutput(); err != nil {
		t.Fatalf("swtpm_setup: %v\n%s", err, out)
	}
	tpm := exec.CommandContext(ctx, "swtpm", "socket", "--tpm2", "--tpmstate", "dir="+path("tpm"), "--ctrl", "type=unixio,path="+path("tpm.sock"), "--terminate")
	if err := tpm.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { tpm.Process.Kill(); tpm.Wait() }()
	poll := time.NewTicker(10 * time.Millisecond)
	defer poll.Stop()
	for _, err := os.Stat(path("tpm.sock")); err != nil; _, err = os.Stat(path("tpm.sock")) {
		select {
		case <-ctx.Done():
			t.Fatal("swtpm made no socket")
		case <-poll.C:
		}
	}
	qemu := exec.CommandContext(ctx, "qemu-system-x86_64",
		"-accel", "tcg,thread=multi", "-cpu", "EPYC,+svm", "-m", "1024", "-smp", "2", "-nodefaults", "-display", "none", "-no-reboot",
		"-machine", "q35,smm=on", "-global", "driver=cfi.pflash01,property=secure,value=on",
		"-drive", "if=pflash,format=raw,unit=0,readonly=on,file="+ovmf+"OVMF_CODE_4M.secboot.fd",
		"-drive", "if=pflash,format=raw,unit=1,file="+path("vars.fd"),
		"-chardev", "socket,id=tpm,path="+path("tpm.sock"), "-tpmdev", "emulator,id=tpm0,chardev=tpm", "-device", "tpm-crb,tpmdev=tpm0",
		"-drive", "file="+path("disk.img")+",format=raw,if=none,id=disk", "-device", "virtio-blk-pci,drive=disk,bootindex=0",
		"-serial", "stdio")
	out, err := qemu.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	qemu.Stderr = &stderr
	start := time.Now()
	if err := qemu.Start(); err != nil {
		t.Fatal(err)
	}
	var lines []string
	done := false
	for s := bufio.NewScanner(out); s.Scan() && !done; {
		line := strings.TrimRight(s.Text(), "\r")
		lines = append(lines, line)
		if strings.HasPrefix(line, "UPTIME ") {
			up, _ := strconv.ParseFloat(strings.TrimPrefix(line, "UPTIME "), 64)
			t.Logf("%d bytes: %.1f s to init, of which %.1f s kernel", len(image), time.Since(start).Seconds(), up)
		}
		done = line == "DONE" || stop != nil && stop(line)
	}
	qemu.Process.Kill()
	qemu.Wait()
	if m.vars, err = os.ReadFile(path("vars.fd")); err != nil {
		t.Fatal(err)
	}
	if !done {
		t.Fatalf("the machine did not come so far in %v: %v\n%s\n%s", time.Since(start), ctx.Err(), stderr.Bytes(), strings.Join(lines[max(0, len(lines)-20):], "\n"))
	}
	return lines
}

func (m *machine) image(t *testing.T) (unsigned, signed []byte) {
	t.Helper()
	unsigned, err := Build(m.parts)
	if err != nil {
		t.Fatal(err)
	}
	if signed, err = Sign(unsigned, m.keys.DB); err != nil {
		t.Fatal(err)
	}
	return unsigned, signed
}

// seen reads PCRs and event log from the console.
func seen(t *testing.T, lines []string) (map[int]string, []byte) {
	t.Helper()
	pcrs, log := map[int]string{}, ""
	for _, l := range lines {
		var i int
		var v string
		if n, _ := fmt.Sscanf(l, "PCR %d %s", &i, &v); n == 2 {
			pcrs[i] = strings.ToLower(v)
		}
		if b, ok := strings.CutPrefix(l, "LOG "); ok {
			log += b
		}
	}
	raw, err := base64.StdEncoding.DecodeString(log)
	if err != nil {
		t.Fatal(err)
	}
	return pcrs, raw
}

// The prediction of a signed image is what a TPM holds after its boot, for a
// plain image and for one that was changed the way mkimage -tamper does. The
// second boot has the variables that the first left, boot entries among them.
func TestPredictionEqualsBoot(t *testing.T) {
	privileged(t)
	m := newMachine(t, 0)
	t.Run("plain", m.testPrediction)
	m.parts.Cmdline = " module.sig_enforce=1 lockdown=integrity slab_nomerge vsyscall=none iommu.strict=1\t" + m.parts.Cmdline + " sekisho.tampered "
	m.parts.Kernel = bytes.Clone(m.parts.Kernel)
	copy(m.parts.Kernel[40:], "tampered")
	m.parts.Initrd = append(m.parts.Initrd, make([]byte, -len(m.parts.Initrd)&3)...)
	m.parts.Initrd = append(m.parts.Initrd, Archive("tampered", "file", []byte("more"))...)
	m.parts.Policy = []byte(`{"signed": "policies"}`)
	t.Run("changed", m.testPrediction)
}

func (m *machine) testPrediction(t *testing.T) {
	_, signed := m.image(t)
	want, err := Predict(signed, m.keys.SecureBoot(), "test", "1")
	if err != nil {
		t.Fatal(err)
	}
	lines := m.boot(t, signed, nil)
	if more := slices.Contains(lines, "EXTRA more"); more != strings.Contains(m.parts.Cmdline, "tampered") {
		t.Errorf("the file of the second archive is there: %v", more)
	}
	if there := slices.Contains(lines, "POLICY "+string(m.parts.Policy)); there != (len(m.parts.Policy) > 0) {
		t.Errorf("the signed policies are there: %v", there)
	}
	got, log := seen(t, lines)
	if file := os.Getenv("SEKISHO_EVENTLOG"); file != "" {
		if err := os.WriteFile(file, log, 0o600); err != nil {
			t.Error(err)
		}
	}
	for pcr, v := range want.PCRs {
		if got[pcr] != v.String() {
			t.Errorf("PCR %d: seen %s, predicted %s", pcr, got[pcr], v)
		}
	}
	events, err := attest.ParseEventLog(log)
	if err != nil {
		t.Fatal(err)
	}
	inLog := map[string]bool{}
	for _, e := range events.Events(attest.HashSHA256) {
		inLog[fmt.Sprintf("%d %x", e.Index, e.Digest)] = true
		if t.Failed() {
			t.Logf("PCR %d type %v %x %.80q", e.Index, e.Type, e.Digest, e.Data)
		}
	}
	for _, c := range want.Components {
		if !inLog[fmt.Sprintf("%d %s", c.PCR, c.Digest)] {
			t.Errorf("component %s (%s): digest %s is not in the event log for PCR %d", c.Name, c.Event, c.Digest, c.PCR)
		}
	}
}

// Firmware with the keys enrolled refuses what they have not signed.
func TestUnsignedIsRefused(t *testing.T) {
	privileged(t)
	m := newMachine(t, 0)
	unsigned, signed := m.image(t)
	altered := bytes.Clone(signed)
	altered[len(unsigned)-4096] ^= 1
	stranger, err := LoadKeys(filepath.Join(t.TempDir(), "keys"), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := Sign(unsigned, stranger.DB)
	if err != nil {
		t.Fatal(err)
	}
	for name, image := range map[string][]byte{"unsigned": unsigned, "altered": altered, "foreign": foreign} {
		t.Run(name, func(t *testing.T) {
			m.boot(t, image, func(line string) bool {
				if strings.HasPrefix(line, "UPTIME ") {
					t.Error("the image was started")
				}
				return strings.Contains(line, "Access Denied")
			})
		})
	}
}

// How firmware's time grows with the image.
func TestFirmwareTime(t *testing.T) {
	privileged(t)
	if os.Getenv("SEKISHO_BENCH") == "" {
		t.Skip("a measurement: runs with SEKISHO_BENCH=1")
	}
	for _, mib := range []int{0, 40, 80} {
		m := newMachine(t, mib<<20)
		_, signed := m.image(t)
		m.boot(t, signed, nil)
	}
}

// sbverify is an implementation by others of what firmware checks.
func TestSignatureByOthers(t *testing.T) {
	privileged(t)
	m := newMachine(t, 0)
	unsigned, signed := m.image(t)
	dir := t.TempDir()
	file, cert := filepath.Join(dir, "uki.efi"), filepath.Join(dir, "db.crt")
	if err := writeNew(cert, certificatePEM(m.keys.DB.Cert), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		image []byte
		good  bool
	}{"signed": {signed, true}, "unsigned": {unsigned, false}} {
		if err := os.WriteFile(file, c.image, 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command("sbverify", "--cert", cert, file).CombinedOutput()
		if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) || (err == nil) != c.good {
			t.Errorf("%s: sbverify: %v\n%s", name, err, out)
		}
	}
}
