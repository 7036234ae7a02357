package initramfs

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/u-root/u-root/pkg/kmodule"
	"github.com/ulikunitz/xz"
)

// koFile is a relocatable ELF file with nothing but a .modinfo of the given
// entries.
func koFile(t testing.TB, entries ...string) []byte {
	t.Helper()
	const names = "\x00.modinfo\x00.shstrtab\x00"
	info := strings.Join(entries, "\x00") + "\x00"
	const ehsize, shsize = 64, 64
	h := elf.Header64{Type: uint16(elf.ET_REL), Machine: uint16(elf.EM_X86_64), Version: 1,
		Shoff: uint64(ehsize + len(info) + len(names)), Ehsize: ehsize, Shentsize: shsize, Shnum: 3, Shstrndx: 2}
	copy(h.Ident[:], elf.ELFMAG)
	h.Ident[elf.EI_CLASS], h.Ident[elf.EI_DATA], h.Ident[elf.EI_VERSION] = byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), 1
	var b bytes.Buffer
	put := func(v any) {
		if err := binary.Write(&b, binary.LittleEndian, v); err != nil {
			t.Fatal(err)
		}
	}
	put(h)
	b.WriteString(info + names)
	put(elf.Section64{})
	put(elf.Section64{Name: 1, Type: uint32(elf.SHT_PROGBITS), Off: ehsize, Size: uint64(len(info))})
	put(elf.Section64{Name: 10, Type: uint32(elf.SHT_STRTAB), Off: uint64(ehsize + len(info)), Size: uint64(len(names))})
	return b.Bytes()
}

func xzData(t *testing.T, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := xz.NewWriter(&b)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

const testKernel = "6.12.1-test"

// testModules is a kernel with an alias, a soft dependency, a built-in module
// and a loop.
func testModules(t *testing.T) *kernelModules {
	dir := "usr/lib/modules/" + testKernel + "/"
	fsys := fstest.MapFS{
		dir + "modules.builtin": {Data: []byte("kernel/drivers/virtio/virtio_pci.ko\nkernel/a/built-in.ko\n")},
	}
	for name, info := range map[string][]string{
		"kernel/net/nf_tables.ko.xz":        {"license=GPL", "depends=nfnetlink,libcrc32c"},
		"kernel/net/nfnetlink.ko.xz":        {"depends="},
		"kernel/lib/libcrc32c.ko.xz":        {"softdep=pre: crc32c post: nothing", "depends="},
		"kernel/crypto/crc32c_generic.ko":   {"alias=crypto-crc32c", "alias=crc32c", "depends="},
		"kernel/drivers/net/virtio_net.ko":  {"depends=net_failover,built_in", "softdep=pre: unknown-thing"},
		"kernel/net/core/net-failover.ko":   {"depends=failover"},
		"kernel/net/core/failover.ko":       {"depends="},
		"kernel/loop/one.ko":                {"depends=two"},
		"kernel/loop/two.ko":                {"depends=one"},
		"kernel/broken/needs-missing.ko.xz": {"depends=missing"},
	} {
		data := koFile(t, info...)
		if strings.HasSuffix(name, ".xz") {
			data = xzData(t, data)
		}
		fsys[dir+name] = &fstest.MapFile{Data: data}
	}
	k, err := readKernelModules(fsys, testKernel)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestResolve(t *testing.T) {
	modules, err := testModules(t).resolve([]string{"nf-tables", "virtio_net", "virtio_pci", "nfnetlink"})
	if err != nil {
		t.Fatal(err)
	}
	const want = `kernel/crypto/crc32c_generic.ko:
kernel/drivers/net/virtio_net.ko: kernel/net/core/net-failover.ko
kernel/lib/libcrc32c.ko: kernel/crypto/crc32c_generic.ko
kernel/net/core/failover.ko:
kernel/net/core/net-failover.ko: kernel/net/core/failover.ko
kernel/net/nf_tables.ko: kernel/net/nfnetlink.ko kernel/lib/libcrc32c.ko
kernel/net/nfnetlink.ko:
`
	if got := string(modulesDep(modules)); got != want {
		t.Errorf("modules.dep is\n%s, want\n%s", got, want)
	}
}

func TestResolveRefuses(t *testing.T) {
	k := testModules(t)
	for name, want := range map[string]string{"missing": "neither", "one": "depends on itself", "needs_missing": "missing"} {
		if _, err := k.resolve([]string{name}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want an error with %q", name, err, want)
		}
	}
	if _, err := k.resolve([]string{"missing"}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v, want one that is fs.ErrNotExist", err)
	}
}

// TestModulesDepForURoot reads our modules.dep with the loader that the init
// programs use.
func TestModulesDepForURoot(t *testing.T) {
	modules, err := testModules(t).resolve([]string{"nf_tables"})
	if err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	dir := filepath.Join(root, "lib/modules", testKernel)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "modules.dep"), modulesDep(modules), 0o644); err != nil {
		t.Fatal(err)
	}
	var loaded []string
	opts := kmodule.ProbeOpts{RootDir: root, KVer: testKernel, IgnoreProcMods: true,
		DryRunCB: func(p string) { loaded = append(loaded, strings.TrimSuffix(filepath.Base(p), ".ko")) }}
	// A list without branches: kmodule loads siblings at the same time.
	if err := kmodule.ProbeOptions("libcrc32c", "", opts); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(loaded, " "); got != "crc32c_generic libcrc32c" {
		t.Errorf("loaded %s", got)
	}
}

func TestReadModinfoRefuses(t *testing.T) {
	good := koFile(t, "depends=a")
	for name, data := range map[string][]byte{
		"nothing":    nil,
		"text":       []byte("not an ELF file"),
		"cut short":  good[:len(good)-70],
		"no section": bytes.Replace(good, []byte(".modinfo"), []byte(".nodinfo"), 1),
	} {
		if info, err := readModinfo(data); err == nil {
			t.Errorf("%s: accepted as %+v", name, info)
		}
	}
}

func FuzzReadModinfo(f *testing.F) {
	f.Add(koFile(f, "depends=a,b", "softdep=pre: c post: d", "alias=e"))
	f.Fuzz(func(t *testing.T, data []byte) {
		info, err := readModinfo(data)
		if err == nil && len(info.depends)+len(info.softPre)+len(info.aliases) > len(data) {
			t.Error("more names than bytes")
		}
	})
}
