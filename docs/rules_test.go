package docs

import (
	"bytes"
	"go/format"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "sekisho/"

// allowed says which packages of other areas an area may import (architecture.md,
// section 2). An area always may import itself. images puts everything together
// and may import any area.
var allowed = map[string][]string{
	"attest":    {},
	"guestlink": {},
	"netd":      {"attest", "attest/gate", "attest/cryptrec", "attest/proxy", "guestlink"},
	"hostos":    {"attest", "attest/approval", "attest/gate", "attest/cryptrec", "guestlink"},
	"docs":      {},
	"images":    {"attest", "guestlink", "netd", "hostos", "..."},
}

// pure packages decide and act on nothing: no network, no processes, no files.
var pure = []string{"attest", "guestlink", "netd", "netd/plan", "attest/verifier", "attest/eventlog"}

var impure = []string{"net", "os", "os/exec", "syscall", "golang.org/x/sys/unix", "net/http"}

// owners lists, for each privileged resource, the one folder that may touch it.
// netlink has four: the laptop's network is netd/kernel's, linkd sets up the one
// device that it makes, guestagent is in the work domain, labhook in the lab.
var owners = map[string][]string{
	"github.com/mdlayher/vsock":  {"guestlink/vsock"},
	"github.com/google/nftables": {"netd/kernel"},
	// hostos/boot: lab.go alone, which no release has.
	"github.com/vishvananda/netlink":        {"netd/kernel", "guestlink/packet", "guestlink/guest", "images/lab/cmd/labhook", "hostos/boot"},
	"github.com/vishvananda/netns":          {"netd/kernel", "images/lab/cmd/labhook"},
	"github.com/google/go-tpm/tpm2":         {"attest/tpm", "attest/tpm/faketpm"},
	"github.com/songgao/water":              {"guestlink/packet"},
	"github.com/songgao/water/waterutil":    {},
	"github.com/google/go-eventlog":         {},
	"github.com/u-root/u-root/pkg/dhclient": {},
}

// callers lists the folders whose code may say these words: on a laptop one,
// beside which are the stand-in work domain and the lab. netd/kernel mounts
// nothing but the name of a network namespace.
var callers = map[string][]string{
	"unix.Mount(":        {"hostos/boot", "netd/kernel", "images/work"},
	"unix.Reboot(":       {"hostos/boot", "images/work", "images/lab/cmd/poweroff"},
	"unix.Setns(":        {"hostos/boot", "netd/kernel", "netd/internal/nstest", "images/lab"},
	"syscall.Mount(":     {},
	"syscall.Reboot(":    {},
	"\"qmp_capabilities": {"hostos/vmm", "images/lab"},
}

type file struct {
	path, pkg string // relative to the root; its folder
	src       []byte
	imports   []string
	comment   bool
	name      string
	line      int
}

func files(t *testing.T) []file {
	t.Helper()
	root := os.DirFS("..")
	var out []file
	err := fs.WalkDir(root, ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if slices.Contains([]string{".git", "out", "bin", "testdata"}, d.Name()) {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(p, ".go") {
			return nil
		}
		src, err := fs.ReadFile(root, p)
		if err != nil {
			return err
		}
		f, err := parser.ParseFile(token.NewFileSet(), p, src, parser.ImportsOnly|parser.ParseComments)
		if err != nil {
			return err
		}
		x := file{path: p, pkg: filepath.Dir(p), src: src, comment: f.Doc != nil, name: f.Name.Name}
		for _, i := range f.Imports {
			s, err := strconv.Unquote(i.Path.Value)
			if err != nil {
				return err
			}
			x.imports = append(x.imports, s)
		}
		out = append(out, x)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(out) < 10 {
		t.Fatalf("found %d Go files: the walk is broken", len(out))
	}
	return out
}

func area(pkg string) string { a, _, _ := strings.Cut(pkg, "/"); return a }

func TestImportDirections(t *testing.T) {
	for _, f := range files(t) {
		a := area(f.pkg)
		may, ok := allowed[a]
		if !ok {
			t.Errorf("%s: %q is not an area of the fixed top level", f.path, a)
			continue
		}
		for _, i := range f.imports {
			ours, ok := strings.CutPrefix(i, module)
			if !ok || area(ours) == a || slices.Contains(may, "...") {
				continue
			}
			// A command may wire in other areas' roots; they are listed already.
			if !slices.Contains(may, ours) {
				t.Errorf("%s imports %s: %s may import %v of other areas", f.path, ours, a, may)
			}
		}
	}
}

func TestPurePackagesDoNoIO(t *testing.T) {
	for _, f := range files(t) {
		if !slices.Contains(pure, f.pkg) || strings.HasSuffix(f.path, "_test.go") {
			continue
		}
		for _, i := range f.imports {
			if slices.Contains(impure, i) {
				t.Errorf("%s imports %s, but %s decides and does no I/O", f.path, i, f.pkg)
			}
		}
	}
}

func TestPrivilegedResourcesHaveOneOwner(t *testing.T) {
	for _, f := range files(t) {
		if strings.HasSuffix(f.path, "_test.go") {
			continue
		}
		for _, i := range f.imports {
			who, ok := owners[i]
			if ok && !slices.Contains(who, f.pkg) {
				t.Errorf("%s imports %s: only %v may", f.path, i, who)
			}
		}
	}
}

func TestPrivilegedCallsHaveOneOwner(t *testing.T) {
	used := map[string]bool{}
	for _, f := range files(t) {
		if strings.HasSuffix(f.path, "_test.go") {
			continue
		}
		for words, who := range callers {
			for line := range bytes.Lines(f.src) {
				code, _, _ := bytes.Cut(line, []byte("//"))
				if !bytes.Contains(code, []byte(words)) {
					continue
				}
				used[words+f.pkg] = true
				if !slices.Contains(who, f.pkg) {
					t.Errorf("%s says %s: only %v may", f.path, words, who)
				}
			}
		}
	}
	for words, who := range callers {
		for _, pkg := range who {
			if !used[words+pkg] {
				t.Errorf("%s does not say %s any more; take it from the list", pkg, words)
			}
		}
	}
}

func TestEveryPackageIsDocumented(t *testing.T) {
	arch, err := os.ReadFile("architecture.md")
	if err != nil {
		t.Fatal(err)
	}
	has := map[string]bool{}
	for _, f := range files(t) {
		if strings.HasSuffix(f.path, "_test.go") {
			continue
		}
		has[f.pkg] = has[f.pkg] || f.comment
	}
	for pkg, ok := range has {
		if !ok {
			t.Errorf("%s: no package comment", pkg)
		}
		if !bytes.Contains(arch, []byte("`"+pkg+"`")) {
			t.Errorf("%s: not named in docs/architecture.md", pkg)
		}
	}
}

func TestFormattedAndOfReadableLength(t *testing.T) {
	for _, f := range files(t) {
		out, err := format.Source(f.src)
		if err != nil {
			t.Errorf("%s: %v", f.path, err)
			continue
		}
		if !bytes.Equal(out, f.src) {
			t.Errorf("%s: not gofmt'ed", f.path)
		}
		if n := bytes.Count(f.src, []byte("\n")); n > 800 {
			t.Errorf("%s: %d lines: two rooms would be clearer", f.path, n)
		} else if f.name == "main" && filepath.Base(f.path) == "main.go" && n > 150 {
			t.Errorf("%s: a main of %d lines, want under 150", f.path, n)
		}
	}
}
