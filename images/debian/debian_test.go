package debian

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestParseSimulation(t *testing.T) {
	out := "Reading package lists...\n" +
		"Inst libc6 (2.41-12+deb13u4 Debian:13.2/stable [amd64])\n" +
		"Inst libacl1 (2.3.2-2+b1 Debian:13.2/stable [amd64]) []\n" +
		"Conf libc6 (2.41-12+deb13u4 Debian:13.2/stable [amd64])\n"
	want := []string{"libc6=2.41-12+deb13u4", "libacl1=2.3.2-2+b1"}
	if got := parseSimulation([]byte(out)); !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

const record = "Package: qemu-system-x86\nVersion: 1:10.0.13+ds-0+deb13u1\nArchitecture: amd64\nDescription: a\n SHA256: none\nSHA256: "

var goodSum = strings.Repeat("0a", 32)

func TestParseRecords(t *testing.T) {
	got, err := parseRecords([]byte(record + goodSum + "\n\nPackage: a2\nVersion: 1\nArchitecture: all\nSHA256: " + goodSum + "\n\n"))
	if err != nil {
		t.Fatal(err)
	}
	want := []*Package{
		{Name: "a2", Version: "1", Arch: "all", SHA256: goodSum, Deb: "a2_1_all.deb"},
		{Name: "qemu-system-x86", Version: "1:10.0.13+ds-0+deb13u1", Arch: "amd64", SHA256: goodSum, Deb: "qemu-system-x86_1%3a10.0.13+ds-0+deb13u1_amd64.deb"},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestParseRecordsRefuses(t *testing.T) {
	for name, in := range map[string]string{
		"no hash":         "Package: aa\nVersion: 1\nArchitecture: all\n",
		"short hash":      record + "0a\n",
		"name with slash": strings.Replace(record, "qemu-system-x86", "../../etc", 1) + goodSum,
		"version, slash":  strings.Replace(record, "1:10.0.13+ds", "1/../..", 1) + goodSum,
		"empty version":   strings.Replace(record, "1:10.0.13+ds-0+deb13u1", "", 1) + goodSum,
		"too long":        strings.Repeat("x", maxRecords+1),
	} {
		if got, err := parseRecords([]byte(in)); err == nil {
			t.Errorf("%s: accepted as %+v", name, got)
		}
	}
}

func FuzzParseRecords(f *testing.F) {
	f.Add([]byte(record + goodSum + "\n"))
	f.Fuzz(func(t *testing.T, in []byte) {
		packages, err := parseRecords(in)
		if err != nil {
			return
		}
		for _, p := range packages {
			if strings.ContainsAny(p.Deb, "/\x00") || !filepath.IsLocal(p.Deb) {
				t.Errorf("file name %q", p.Deb)
			}
		}
	})
}

func TestParseStatus(t *testing.T) {
	for _, c := range []struct {
		in   string
		want int64
		ok   bool
	}{
		{"dlstatus:3:41.5:Retrieving file 3 of 111 (12s remaining)", 41, true},
		{"dlstatus:3:400:x", 400, false},
		{"pmstatus:3:41.5:x", 0, false},
		{"dlstatus:3", 0, false},
		{"dlstatus:3:x:y", 0, false},
	} {
		got, ok := parseStatus(c.in)
		if ok != c.ok || ok && got != c.want {
			t.Errorf("%q: got %d, %v, want %d, %v", c.in, got, ok, c.want, c.ok)
		}
	}
}

func TestPickMirrors(t *testing.T) {
	targets := "bookworm http://mirror.example/debian/\nbookworm-updates http://mirror.example/debian/\n" +
		"bookworm-security http://mirror.example/debian-security/\nnodistro https://other.example/node\n"
	if m, s := pickMirrors([]byte(targets), "bookworm"); m != "http://mirror.example/debian/" || s != "http://mirror.example/debian-security/" {
		t.Errorf("got %q and %q", m, s)
	}
	if m, s := pickMirrors([]byte("nodistro https://other.example/node\n"), "bookworm"); m != "" || s != "" {
		t.Errorf("a foreign archive was taken: %q and %q", m, s)
	}
	if got := codename([]byte("ID=debian\nVERSION_CODENAME=\"bookworm\"\n")); got != "bookworm" {
		t.Errorf("codename %q", got)
	}
}

// testSet lays out packages with the given files; "-> x" makes a link to x.
func testSet(t *testing.T, packages map[string]map[string]string) *Set {
	t.Helper()
	var list []*Package
	for name, files := range packages {
		p := &Package{Name: name, Version: "1", root: filepath.Join(t.TempDir(), name)}
		for path, content := range files {
			full := filepath.Join(p.root, path)
			if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
				t.Fatal(err)
			}
			var err error
			if target, ok := strings.CutPrefix(content, "-> "); ok {
				err = os.Symlink(target, full)
			} else {
				err = os.WriteFile(full, []byte(content), 0o644)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		list = append(list, p)
	}
	s, err := newSet(list)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestLookup(t *testing.T) {
	s := testSet(t, map[string]map[string]string{
		"libc6": {"usr/lib/x/libc.so.6": "c", "usr/lib64/ld.so": "-> ../lib/x/ld.so", "lib/x/ld.so": "loader"},
		"ovmf":  {"usr/share/OVMF/vars.fd": "v", "usr/share/ovmf": "-> OVMF", "usr/share/abs.fd": "-> /usr/share/ovmf/vars.fd"},
		"loop":  {"a": "-> b", "b": "-> a", "out": "-> ../../../../etc/passwd"},
	})
	for in, want := range map[string]string{
		"/lib/x/libc.so.6":        "libc6:/usr/lib/x/libc.so.6",
		"/lib64/ld.so":            "libc6:/usr/lib/x/ld.so",
		"/usr/share/ovmf/vars.fd": "ovmf:/usr/share/OVMF/vars.fd",
		"/usr/share/abs.fd":       "ovmf:/usr/share/OVMF/vars.fd",
	} {
		f, err := s.Lookup(in)
		if err != nil {
			t.Errorf("%s: %v", in, err)
		} else if got := f.Package.Name + ":" + f.Path; got != want {
			t.Errorf("%s: got %s, want %s", in, got, want)
		} else if _, err := os.Stat(f.Host); err != nil {
			t.Error(err)
		}
	}
	for _, in := range []string{"/a", "/out", "/usr/share", "/nothing", "/usr/lib/x/libc.so.6/below"} {
		if f, err := s.Lookup(in); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: got %+v, %v, want not found", in, f, err)
		}
	}
	files, err := s.Glob("/lib/x", "*.so*")
	if err != nil || len(files) != 2 {
		t.Errorf("glob: got %v, %v", files, err)
	}
}

func TestUnpackRefusesForeignContent(t *testing.T) {
	deb := filepath.Join(t.TempDir(), "x.deb")
	if err := os.WriteFile(deb, []byte("not what the index names"), 0o644); err != nil {
		t.Fatal(err)
	}
	p := &Package{SHA256: goodSum, root: filepath.Join(t.TempDir(), "root")}
	if err := p.unpack(context.Background(), deb); err == nil || !strings.Contains(err.Error(), "signed index") {
		t.Errorf("got %v", err)
	}
	if _, err := os.Stat(p.root); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("something was unpacked: %v", err)
	}
}

// TestFetch goes by the network. hello is a small package with few
// dependencies.
func TestFetch(t *testing.T) {
	if os.Getenv("SEKISHO_TEST") != "all" {
		t.Skip("needs a Debian mirror; SEKISHO_TEST=all runs it")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 75*time.Second) // seen: 15 s
	defer cancel()
	c := Config{Cache: t.TempDir()}
	if _, err := Fetch(ctx, c, "hello"); err != nil {
		t.Fatal(err)
	}
	c.Mirror, c.SecurityMirror = "http://127.0.0.1:9/nowhere", "http://127.0.0.1:9/nowhere"
	s, err := Fetch(ctx, c, "hello")
	if err != nil {
		t.Fatalf("second time, from the cache: %v", err)
	}
	if f, err := s.Lookup("/bin/hello"); err != nil || f.Package.Name != "hello" {
		t.Errorf("got %+v, %v", f, err)
	}
	if _, err := Fetch(ctx, c, "hello", "libc6"); err == nil {
		t.Error("a set was resolved without a mirror")
	}
	c.Cache, c.Mirror, c.SecurityMirror = t.TempDir(), "", ""
	if _, err := Fetch(ctx, c, "no-such-package-in-debian"); err == nil {
		t.Error("an unknown package was found")
	}
}
