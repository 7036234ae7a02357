package initramfs

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/u-root/mkuimage/cpio"

	"sekisho/hostos/boot"
)

// Targets of the project for the host domain: a UKI of at most 90 MB, and
// 300 MB of memory, of which the unpacked root filesystem may take a third.
const (
	maxUKI      = 90e6
	maxUnpacked = 130e6
)

// realOptions are those of a real build. All tests of this package share one
// cache with the builds of the checkout.
func realOptions(t *testing.T) Options {
	t.Helper()
	if os.Getenv("SEKISHO_TEST") != "all" || os.Getuid() != 0 {
		t.Skip("needs root, a Debian mirror and QEMU; SEKISHO_TEST=all as root runs it")
	}
	o := Options{Dir: "../..", Cache: "../../out/cache", Version: "test", Organization: []byte("{}\n")}
	for _, m := range slices.Concat(boot.BaseModules(), boot.NICModules()) {
		o.Modules = append(o.Modules, m.Name)
	}
	return o
}

func unpack(t *testing.T, im *Image) (records []cpio.Record) {
	t.Helper()
	z, err := zstd.NewReader(bytes.NewReader(im.Initrd))
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	data, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	if records, err = cpio.ReadAllRecords(cpio.Newc.Reader(bytes.NewReader(data))); err != nil {
		t.Fatal(err)
	}
	return records
}

// checkManifest compares the manifest with the archive, file by file.
func checkManifest(t *testing.T, im *Image) {
	t.Helper()
	records := unpack(t, im)
	if len(records) != len(im.Manifest.Files) {
		t.Fatalf("%d files in the archive, %d in the manifest", len(records), len(im.Manifest.Files))
	}
	known := map[string]string{ours: "test"}
	for _, p := range im.Manifest.Packages {
		known[p.Name] = p.Version
	}
	for i, r := range records {
		f := im.Manifest.Files[i]
		if f.Path != "/"+r.Name {
			t.Fatalf("manifest has %s where the archive has %s", f.Path, r.Name)
		}
		if known[f.Package] == "" || known[f.Package] != f.Version {
			t.Errorf("%s: package %q %q is not listed", f.Path, f.Package, f.Version)
		}
		if r.Mode&cpio.S_IFMT != cpio.S_IFREG {
			continue
		}
		h := sha256.New()
		if _, err := io.Copy(h, io.NewSectionReader(r, 0, int64(r.FileSize))); err != nil {
			t.Fatal(err)
		}
		if sum := hex.EncodeToString(h.Sum(nil)); sum != f.SHA256 {
			t.Errorf("%s: SHA-256 %s, manifest says %s", f.Path, sum, f.SHA256)
		}
		if r.Mode&0o022 != 0 {
			t.Errorf("%s is writable by others", f.Path)
		}
	}
}

// TestHostImage builds the release image of the host domain, checks it against
// its manifest and the project's targets, and runs its QEMU in a root that has
// only the image's files: OVMF must start the work domain's kernel there.
func TestHostImage(t *testing.T) {
	o := realOptions(t)
	host, err := Host(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	checkManifest(t, host)
	t.Logf("kernel %d, initrd %d, unpacked %d bytes", len(host.Kernel), len(host.Initrd), host.Unpacked)
	for _, f := range host.Manifest.Largest(10) {
		t.Logf("%9d %s (%s)", f.Size, f.Path, f.Package)
	}
	if uki := len(host.Kernel) + len(host.Initrd) + len(host.Stub); uki > maxUKI || host.Unpacked > maxUnpacked {
		t.Errorf("UKI of about %d bytes, %d unpacked: over the target", uki, host.Unpacked)
	}
	for _, f := range host.Manifest.Files {
		if strings.Contains(f.Path, "lab") && strings.HasPrefix(f.Path, "/bbin") || f.Path == "/bbin/gosh" {
			t.Errorf("%s in a release image", f.Path)
		}
	}
	work, err := Work(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	root := extract(t, host)
	vars, err := os.ReadFile(filepath.Join(root, "usr/share/OVMF/OVMF_VARS_4M.fd"))
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{"kernel": work.Kernel, "initrd": work.Initrd, "vars": vars} {
		if err := os.WriteFile(filepath.Join(root, "tmp", name), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("/usr/bin/qemu-system-x86_64", "-accel", "tcg,thread=multi", "-machine", "q35", "-cpu", "EPYC",
		"-drive", "if=pflash,format=raw,unit=0,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.fd",
		"-drive", "if=pflash,format=raw,unit=1,file=/tmp/vars",
		"-drive", "if=virtio,format=raw,readonly=on,file=/tmp/initrd",
		"-m", "512", "-smp", "2", "-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot", "-monitor", "unix:/tmp/monitor,server=on,wait=off",
		"-kernel", "/tmp/kernel", "-initrd", "/tmp/initrd", "-append", "console=ttyS0 panic=-1 quiet")
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
	cmd.Dir = "/"
	for _, dev := range []string{"null", "urandom", "zero"} { // devtmpfs at run time
		node := filepath.Join(root, "dev", dev)
		if err := os.WriteFile(node, nil, 0o644); err != nil && !errors.Is(err, fs.ErrExist) {
			t.Fatal(err)
		}
		if err := syscall.Mount("/dev/"+dev, node, "", syscall.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := syscall.Unmount(node, 0); err != nil {
				t.Error(err)
			}
		})
	}
	waitOutput(t, cmd, "work domain up", 100*time.Second) // seen: 15 s, on a busy machine 20 s
}

// extract lays the image's files out in a temporary directory.
func extract(t *testing.T, im *Image) string {
	t.Helper()
	root := t.TempDir()
	for _, r := range unpack(t, im) {
		p := filepath.Join(root, r.Name)
		var err error
		switch r.Mode & cpio.S_IFMT {
		case cpio.S_IFDIR:
			err = os.MkdirAll(p, 0o755)
		case cpio.S_IFREG:
			data := make([]byte, r.FileSize)
			if _, err = io.ReadFull(io.NewSectionReader(r, 0, int64(r.FileSize)), data); err == nil {
				err = os.WriteFile(p, data, fs.FileMode(r.Mode&0o777))
			}
		case cpio.S_IFLNK:
			target := make([]byte, r.FileSize)
			if _, err = io.ReadFull(io.NewSectionReader(r, 0, int64(r.FileSize)), target); err == nil {
				err = os.Symlink(string(target), p)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// waitOutput runs cmd until it prints want, then ends it.
func waitOutput(t *testing.T, cmd *exec.Cmd, want string, limit time.Duration) {
	t.Helper()
	out := startOutput(t, cmd)
	out.wait(want, limit)
}

// output is a started program whose lines are read.
type output struct {
	t     *testing.T
	lines chan string
	seen  []string
}

// startOutput starts cmd, which is killed at the test's end.
func startOutput(t *testing.T, cmd *exec.Cmd) *output {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = w, w
	err = cmd.Start()
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	o := &output{t: t, lines: make(chan string, 1000)}
	go func() {
		defer close(o.lines)
		for s := bufio.NewScanner(r); s.Scan(); {
			o.lines <- s.Text()
		}
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		for range o.lines { // until the reader has ended
		}
		r.Close()
		if err := cmd.Wait(); err != nil {
			var exit *exec.ExitError
			if !errors.As(err, &exit) {
				t.Error(err)
			}
		}
	})
	return o
}

// wait reads until a line holds want; an empty want waits for the end.
func (o *output) wait(want string, limit time.Duration) {
	o.t.Helper()
	ctx, cancel := context.WithTimeout(o.t.Context(), limit)
	defer cancel()
	for {
		select {
		case line, ok := <-o.lines:
			if !ok && want == "" {
				return
			}
			if !ok {
				o.t.Fatalf("ended without %q:\n%s", want, strings.Join(o.seen, "\n"))
			}
			o.seen = append(o.seen, line)
			if want != "" && strings.Contains(line, want) {
				return
			}
		case <-ctx.Done():
			o.t.Fatalf("%q not seen within %v:\n%s", want, limit, strings.Join(o.seen, "\n"))
		}
	}
}
