package initramfs

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/u-root/mkuimage/cpio"

	"sekisho/images/debian"
)

func testTree(t *testing.T) tree {
	t.Helper()
	host := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(host, []byte("from the host"), 0o600); err != nil {
		t.Fatal(err)
	}
	tr := tree{}
	for p, n := range map[string]node{
		"/init":          {mode: fs.ModeSymlink | 0o777, link: "bbin/init"},
		"/dev/console":   {mode: fs.ModeDevice | fs.ModeCharDevice | 0o600, major: 5, minor: 1},
		"/usr/lib/a.so":  {mode: 0o755, host: host, origin: origin{"libfoo", "1.2"}},
		"/etc/passwd":    {mode: 0o644, data: []byte("root\n"), origin: origin{ours, "v1"}},
		"/etc/empty.txt": {mode: 0o644},
	} {
		if err := tr.add(p, n); err != nil {
			t.Fatal(err)
		}
	}
	return tr
}

func TestPack(t *testing.T) {
	var packed [2]bytes.Buffer
	var files []File
	for i := range packed {
		var err error
		var unpacked int64
		if files, unpacked, err = testTree(t).pack(&packed[i], func(int64, int64) {}); err != nil {
			t.Fatal(err)
		}
		if unpacked < 1000 {
			t.Errorf("%d bytes unpacked", unpacked)
		}
	}
	if !bytes.Equal(packed[0].Bytes(), packed[1].Bytes()) {
		t.Error("two packings of one tree differ")
	}

	z, err := zstd.NewReader(&packed[0])
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	data, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	err = cpio.ForEachRecord(cpio.Newc.Reader(bytes.NewReader(data)), func(r cpio.Record) error {
		if r.MTime != 0 || r.UID != 0 || r.GID != 0 || r.Ino != uint64(len(got)+1) {
			t.Errorf("%s: not reproducible: %+v", r.Name, r.Info)
		}
		got = append(got, r.Name)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	const want = "dev dev/console etc etc/empty.txt etc/passwd init usr usr/lib usr/lib/a.so"
	if s := strings.Join(got, " "); s != want {
		t.Errorf("archive holds %s, want %s", s, want)
	}
	for i, f := range files {
		if f.Path != "/"+got[i] {
			t.Errorf("manifest has %s for %s", f.Path, got[i])
		}
	}
	sum := sha256.Sum256([]byte("from the host"))
	if f := files[len(files)-1]; f != (File{Path: "/usr/lib/a.so", Mode: "-rwxr-xr-x", Size: 13, SHA256: hex.EncodeToString(sum[:]), Package: "libfoo", Version: "1.2"}) {
		t.Errorf("manifest has %+v", f)
	}
}

func TestAddRefuses(t *testing.T) {
	tr := testTree(t)
	for _, p := range []string{"relative", "/", "/not/../clean", "/etc/passwd", "/etc/passwd/below", "/init/below", ""} {
		if err := tr.add(p, node{mode: 0o644}); err == nil {
			t.Errorf("%q was taken", p)
		}
	}
}

// machine finds files on this machine, as a Set does in its packages.
type machine struct{}

func (machine) Lookup(p string) (debian.File, error) {
	for _, host := range []string{p, strings.TrimPrefix(p, "/usr")} {
		if info, err := os.Stat(host); err == nil && info.Mode().IsRegular() {
			return debian.File{Path: p, Host: host}, nil
		}
	}
	return debian.File{}, fs.ErrNotExist
}

func TestClosure(t *testing.T) {
	files, err := closure(machine{}, []string{"/usr/bin/apt-get"})
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for p := range files {
		names[path.Base(p)] = true
		if !strings.HasPrefix(p, "/usr/") {
			t.Errorf("%s lies outside of /usr", p)
		}
	}
	// libc is needed by way of libapt-pkg as well, the loader by PT_INTERP.
	for _, want := range []string{"apt-get", "libc.so.6", "libstdc++.so.6", "ld-linux-x86-64.so.2"} {
		if !names[want] {
			t.Errorf("%s is missing from %v", want, names)
		}
	}
}

// without hides one library.
type without struct {
	finder
	name string
}

func (w without) Lookup(p string) (debian.File, error) {
	if path.Base(p) == w.name {
		return debian.File{}, fs.ErrNotExist
	}
	return w.finder.Lookup(p)
}

func TestClosureIncomplete(t *testing.T) {
	_, err := closure(without{machine{}, "libc.so.6"}, []string{"/usr/bin/apt-get"})
	if !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "libc.so.6") {
		t.Errorf("got %v", err)
	}
}

func TestSearchPath(t *testing.T) {
	n := needs{paths: []string{"$ORIGIN/../lib:relative:/lib/x", "${ORIGIN}"}}
	if got := strings.Join(n.searchPath("/usr/bin/prog"), " "); got != "/usr/lib /usr/lib/x /usr/bin" {
		t.Errorf("got %s", got)
	}
}
