package images

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/klauspost/compress/zstd"

	"sekisho/attest"
	"sekisho/images/disk"
	"sekisho/images/initramfs"
	"sekisho/images/uki"
)

func compressed(t *testing.T, data string) []byte {
	t.Helper()
	z, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	return z.EncodeAll([]byte(data), nil)
}

func TestReleaseHoldsNoHookAndNoShell(t *testing.T) {
	clean := initramfs.Manifest{Files: []initramfs.File{{Path: "/init"}, {Path: "/bbin/netd", Link: "bb"}, {Path: "/usr/bin/qemu-system-x86_64"}}}
	filler := strings.Repeat("nothing to see ", 100_000)
	if err := checkRelease(&clean, compressed(t, filler), forbiddenHost()); err != nil {
		t.Errorf("a clean release is refused: %v", err)
	}
	for _, f := range []initramfs.File{
		{Path: "/bbin/labhook", Link: "bb"}, {Path: "/sbin/odd", Link: "../bbin/labguest"},
		{Path: "/bin/sh"}, {Path: "/bbin/gosh"}, {Path: "/sbin/agetty"}, {Path: "/usr/sbin/sshd"},
	} {
		m := initramfs.Manifest{Files: append(clean.Files[:3:3], f)}
		if err := checkRelease(&m, compressed(t, filler), forbiddenHost()); err == nil || !strings.Contains(err.Error(), f.Path) {
			t.Errorf("%s in a release: error %v, want one that names it", f.Path, err)
		}
	}
	// Without a link of its own, the hook is still in the busybox binary.
	if err := checkRelease(&clean, compressed(t, filler+hookMark+filler), forbiddenHost()); err == nil {
		t.Error("the code of labhook in a release was not found")
	}
	if err := checkRelease(&clean, []byte("no zstd"), forbiddenHost()); err == nil {
		t.Error("an initramfs that cannot be read was accepted")
	}
}

// TestReleaseOfTheWorkDomain: a shell is for the person at the desk, the lab's
// hook is for nobody.
func TestReleaseOfTheWorkDomain(t *testing.T) {
	m := initramfs.Manifest{Files: []initramfs.File{{Path: "/init"}, {Path: "/bbin/sh", Link: "gosh"}, {Path: "/bbin/gosh", Link: "bb"}}}
	if err := checkRelease(&m, compressed(t, "clean"), forbiddenWork()); err != nil {
		t.Errorf("a clean work domain is refused: %v", err)
	}
	if err := checkRelease(&m, compressed(t, "clean"+hookMark), forbiddenWork()); err == nil {
		t.Error("the code of labguest was not found")
	}
	for _, path := range []string{"/bbin/labguest", "/bbin/cardcheck", "/usr/sbin/sshd"} {
		bad := initramfs.Manifest{Files: append(m.Files[:3:3], initramfs.File{Path: path, Link: "bb"})}
		if err := checkRelease(&bad, compressed(t, "clean"), forbiddenWork()); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s in a release: %v", path, err)
		}
	}
}

// TestHooksBearTheMark builds both hooks and looks for what the check of a
// release looks for.
func TestHooksBearTheMark(t *testing.T) {
	for _, name := range []string{"labhook", "labguest"} {
		out := filepath.Join(t.TempDir(), name)
		cmd := exec.CommandContext(t.Context(), "go", "build", "-tags", "lab", "-o", out, "sekisho/images/lab/cmd/"+name)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if b, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, b)
		}
		f, err := os.Open(out)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if has, err := contains(f, hookMark); err != nil || !has {
			t.Errorf("%s: mark %v, %v", name, has, err)
		}
	}
}

func TestContainsAcrossReads(t *testing.T) {
	for _, before := range []int{0, 1<<20 - 7, 1<<20 - 1, 1 << 20, 3 << 20} {
		data := append(bytes.Repeat([]byte("x"), before), hookMark...)
		found, err := contains(iotest.HalfReader(bytes.NewReader(data)), hookMark)
		if err != nil || !found {
			t.Errorf("mark after %d bytes: found %v, error %v", before, found, err)
		}
	}
}

func TestCommandLines(t *testing.T) {
	for _, lab := range []bool{false, true} {
		line := hostCommandLine(lab)
		if serial := strings.Contains(line, "ttyS"); serial != lab {
			t.Errorf("lab %v: command line %q", lab, line)
		}
		for _, must := range []string{"rdinit=/init", "lockdown=integrity", "module.sig_enforce=1"} {
			if !strings.Contains(line, must) {
				t.Errorf("lab %v: command line %q lacks %s", lab, line, must)
			}
		}
	}
}

func TestOSReleaseIsOneFieldALine(t *testing.T) {
	for _, v := range []string{"1.2.3", "0-dev"} {
		if !ValidVersion(v) {
			t.Errorf("version %q refused", v)
		}
	}
	for _, v := range []string{"", "1\nID=debian", "1 2", "\"", "A", strings.Repeat("1", 65)} {
		if ValidVersion(v) {
			t.Errorf("version %q accepted", v)
		}
	}
	if got := osRelease("host domain", "1.2", false); strings.Count(got, "\n") != 5 || !strings.Contains(got, "VARIANT_ID=release\n") {
		t.Errorf("os-release:\n%s", got)
	}
}

// stub is systemd's EFI stub of the machine or the build's cache.
func stub(t *testing.T) []byte {
	t.Helper()
	found, _ := filepath.Glob("../out/cache/unpacked/*/usr/lib/systemd/boot/efi/linuxx64.efi.stub")
	for _, name := range append(found, "/usr/lib/systemd/boot/efi/linuxx64.efi.stub") {
		if b, err := os.ReadFile(name); err == nil {
			return b
		}
	}
	t.Skip("no systemd EFI stub: neither a build's cache nor the package systemd-boot-efi")
	return nil
}

// hostImage makes a Builder whose output directory holds a host image with the
// stub itself as its kernel: a true PE file.
func hostImage(t *testing.T) *Builder {
	t.Helper()
	dir := t.TempDir()
	b := &Builder{Out: filepath.Join(dir, "out"), Keys: filepath.Join(dir, "out", "keys"), Now: time.Now}
	s := stub(t)
	_, err := b.finishHost(uki.Parts{
		Stub: s, Kernel: s, Initrd: compressed(t, "initramfs"), Cmdline: hostCommandLine(true),
		OSRelease: osRelease("host domain", "1", true), Uname: "6.12.0",
	}, "host-lab", "1", []byte("{}\n"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func reference(t *testing.T, b *Builder) *attest.ReferenceValues {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(b.Out, HostReference))
	if err != nil {
		t.Fatal(err)
	}
	r, err := attest.ParseReferenceValues(data)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestTamperedImagesDifferInTheirComponentAlone(t *testing.T) {
	b := hostImage(t)
	want := reference(t, b)
	for _, c := range Components() {
		bad := *b
		bad.Out = filepath.Join(b.Out, "tamper-"+string(c))
		if _, err := bad.Tamper(filepath.Join(b.Out, HostImage), c); err != nil {
			t.Fatal(err)
		}
		got := reference(t, &bad)
		if got.PCRs[7] != want.PCRs[7] {
			t.Errorf("%s: another key: PCR 7 differs", c)
		}
		for i, x := range got.Components {
			if x.PCR == 11 && (x.Digest != want.Components[i].Digest) != (x.Name == string(c)) {
				t.Errorf("%s tampered: component %s: changed %v", c, x.Name, x.Digest != want.Components[i].Digest)
			}
		}
	}
	if _, err := b.Tamper(filepath.Join(b.Out, HostImage), "firmware"); err == nil {
		t.Error("an unknown component was tampered with")
	}
	again, err := b.Predict(filepath.Join(b.Out, HostImage))
	if err != nil {
		t.Fatal(err)
	}
	x, _ := json.Marshal(again.PCRs)
	if y, _ := json.Marshal(want.PCRs); !bytes.Equal(x, y) {
		t.Errorf("predict says %s, the build said %s", x, y)
	}
}

func TestDisk(t *testing.T) {
	b := hostImage(t)
	if _, err := b.Disk(filepath.Join(b.Out, WorkImage)); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("disk without a work image: %v", err)
	}
	if _, err := os.Stat(BlankVars); err != nil {
		t.Skipf("package ovmf is not installed: %v", err)
	}
	work := bytes.Repeat([]byte("work"), 1<<20)
	if err := os.WriteFile(filepath.Join(b.Out, WorkImage), work, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Disk(filepath.Join(b.Out, WorkImage)); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{disk.ESP, disk.State, disk.Work} {
		if _, _, err := disk.Find(filepath.Join(b.Out, LaptopDisk), name); err != nil {
			t.Error(err)
		}
	}
}

// A real release build has no lab hook and no shell; the lab's has, and the
// check says so.
func TestRealRelease(t *testing.T) {
	if os.Getuid() != 0 || os.Getenv("SEKISHO_TEST") != "all" {
		t.Skip("builds two images of each domain from Debian packages: runs as root with SEKISHO_TEST=all")
	}
	b := &Builder{Source: "..", Cache: "../out/cache"}
	for _, lab := range []bool{false, true} {
		options := b.initramfs(HostOptions{Version: "test", Lab: lab})
		options.Organization = []byte("{}")
		host, err := initramfs.Host(t.Context(), options)
		if err != nil {
			t.Fatal(err)
		}
		work, err := initramfs.Work(t.Context(), options)
		if err != nil {
			t.Fatal(err)
		}
		for _, img := range []struct {
			name      string
			image     *initramfs.Image
			forbidden []string
		}{{"host", host, forbiddenHost()}, {"work", work, forbiddenWork()}} {
			if err := checkRelease(&img.image.Manifest, img.image.Initrd, img.forbidden); (err != nil) != lab {
				t.Errorf("%s, lab %v: %v", img.name, lab, err)
			}
			// The name alone, and the code alone, give the hook away.
			if lab && checkRelease(&initramfs.Manifest{}, img.image.Initrd, nil) == nil {
				t.Errorf("%s: the code of the hook was not found in a lab image", img.name)
			}
		}
	}
}
