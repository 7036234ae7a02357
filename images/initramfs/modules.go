package initramfs

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/ulikunitz/xz"
)

// maxModule bounds a kernel module after decompression, in bytes. The largest
// of Debian's (amdgpu) has about 30 MiB.
const maxModule = 128 << 20

// kernelModules are the modules of one kernel package.
type kernelModules struct {
	fsys    fs.FS
	dir     string            // "usr/lib/modules/VERSION"
	files   map[string]string // module name -> path below dir, compressed or not
	builtin map[string]bool   // module names
	aliases map[string]string // see findAlias; nil until asked
}

// module is one resolved module.
type module struct {
	name string
	path string // below the module directory, uncompressed: "kernel/…/x.ko"
	deps []string
	data []byte
}

// moduleName folds the two spellings of a module's name.
func moduleName(s string) string { return strings.ReplaceAll(s, "-", "_") }

// fileModule gives the module name of a path such as "kernel/fs/x-y.ko.xz".
func fileModule(p string) (string, bool) {
	base, rest, ok := strings.Cut(path.Base(p), ".ko")
	return moduleName(base), ok && (rest == "" || rest == ".xz")
}

// readKernelModules indexes the modules of a kernel package.
func readKernelModules(fsys fs.FS, version string) (*kernelModules, error) {
	k := &kernelModules{fsys: fsys, dir: "usr/lib/modules/" + version, files: map[string]string{}, builtin: map[string]bool{}}
	err := fs.WalkDir(fsys, k.dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if name, ok := fileModule(p); ok && d.Type().IsRegular() {
			k.files[name] = strings.TrimPrefix(p, k.dir+"/")
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("kernel modules: %w", err)
	}
	list, err := fs.ReadFile(fsys, k.dir+"/modules.builtin")
	if err != nil {
		return nil, fmt.Errorf("kernel modules: %w", err)
	}
	for line := range strings.Lines(string(list)) {
		if name, ok := fileModule(strings.TrimSpace(line)); ok {
			k.builtin[name] = true
		}
	}
	return k, nil
}

// resolve returns the wanted modules and all that they depend on, ordered by
// path. What the kernel has built in is left out. A wanted module that the
// kernel has in neither form is an error: an image without it would fail later
// and elsewhere.
func (k *kernelModules) resolve(want []string) ([]*module, error) {
	found := map[string]*module{}
	var add func(name string, trail []string) error
	add = func(name string, trail []string) error {
		if found[name] != nil || k.builtin[name] {
			return nil
		}
		if slices.Contains(trail, name) {
			return fmt.Errorf("kernel modules: %s depends on itself by way of %s", name, strings.Join(trail, ", "))
		}
		m, err := k.load(name)
		if err != nil {
			return err
		}
		for _, d := range m.deps {
			if err := add(d, append(trail, name)); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
		found[name] = m
		return nil
	}
	for _, name := range want {
		if err := add(moduleName(name), nil); err != nil {
			return nil, err
		}
	}
	return slices.SortedFunc(maps.Values(found), func(a, b *module) int { return strings.Compare(a.path, b.path) }), nil
}

// load reads one module and what it says of its dependencies.
func (k *kernelModules) load(name string) (*module, error) {
	file, ok := k.files[name]
	if !ok {
		return nil, fmt.Errorf("kernel modules: %s: neither a module nor built in: %w", name, fs.ErrNotExist)
	}
	data, err := k.read(file)
	if err != nil {
		return nil, err
	}
	info, err := readModinfo(data)
	if err != nil {
		return nil, fmt.Errorf("kernel modules: %s: %w", file, err)
	}
	m := &module{name: name, path: strings.TrimSuffix(file, ".xz"), data: data}
	for _, d := range info.depends {
		m.deps = append(m.deps, moduleName(d))
	}
	for _, d := range info.softPre {
		if d, ok = k.soft(d); ok && !slices.Contains(m.deps, d) {
			m.deps = append(m.deps, d)
		}
	}
	return m, nil
}

// soft resolves a "pre" soft dependency, which may be an alias. A loader in
// user space obeys them (modprobe.d(5)); here there is none when the kernel
// asks for one, so they are made real dependencies.
func (k *kernelModules) soft(name string) (string, bool) {
	name = moduleName(name)
	if k.builtin[name] || k.files[name] != "" {
		return name, true
	}
	name, ok := k.findAlias(name)
	return name, ok
}

// findAlias looks an alias up among the generic crypto algorithms, which is
// all that soft dependencies name by alias.
func (k *kernelModules) findAlias(alias string) (string, bool) {
	if k.aliases == nil {
		k.aliases = map[string]string{}
		for _, name := range slices.Sorted(maps.Keys(k.files)) {
			if path.Dir(k.files[name]) != "kernel/crypto" {
				continue
			}
			data, err := k.read(k.files[name])
			if err != nil {
				continue // a soft dependency is never worth an error
			}
			info, err := readModinfo(data)
			if err != nil {
				continue
			}
			for _, a := range info.aliases {
				if k.aliases[moduleName(a)] == "" {
					k.aliases[moduleName(a)] = name
				}
			}
		}
	}
	name, ok := k.aliases[alias]
	return name, ok
}

// read returns a module's content, decompressed.
func (k *kernelModules) read(file string) ([]byte, error) {
	f, err := k.fsys.Open(k.dir + "/" + file)
	if err != nil {
		return nil, fmt.Errorf("kernel modules: %w", err)
	}
	defer f.Close()
	var r io.Reader = f
	if strings.HasSuffix(file, ".xz") {
		if r, err = xz.NewReader(f); err != nil {
			return nil, fmt.Errorf("kernel modules: %s: %w", file, err)
		}
	}
	data, err := io.ReadAll(io.LimitReader(r, maxModule+1))
	if err != nil {
		return nil, fmt.Errorf("kernel modules: %s: %w", file, err)
	}
	if len(data) > maxModule {
		return nil, fmt.Errorf("kernel modules: %s: more than %d bytes", file, maxModule)
	}
	return data, nil
}

// modinfo is what a module says of itself (include/linux/moduleparam.h,
// __MODULE_INFO: "key=value" strings ended by NUL in section .modinfo).
type modinfo struct {
	depends []string
	softPre []string
	aliases []string
}

// readModinfo parses an uncompressed module.
func readModinfo(data []byte) (modinfo, error) {
	var info modinfo
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return info, err
	}
	s := f.Section(".modinfo")
	if s == nil {
		return info, errors.New("no section .modinfo")
	}
	if s.Type == elf.SHT_NOBITS || s.Offset > uint64(len(data)) || s.FileSize > uint64(len(data))-s.Offset {
		return info, errors.New("section .modinfo is outside of the file")
	}
	for entry := range bytes.SplitSeq(data[s.Offset:s.Offset+s.FileSize], []byte{0}) {
		key, value, _ := strings.Cut(string(entry), "=")
		switch key {
		case "depends":
			info.depends = append(info.depends, strings.FieldsFunc(value, func(r rune) bool { return r == ',' })...)
		case "softdep":
			info.softPre = append(info.softPre, softPre(value)...)
		case "alias":
			info.aliases = append(info.aliases, value)
		}
	}
	return info, nil
}

// softPre gives the names after "pre:" of "pre: a b post: c".
func softPre(value string) []string {
	var names []string
	pre := false
	for _, f := range strings.Fields(value) {
		switch f {
		case "pre:":
			pre = true
		case "post:":
			pre = false
		default:
			if pre {
				names = append(names, f)
			}
		}
	}
	return names
}

// modulesDep writes modules.dep as depmod(8) does and u-root's kmodule reads
// it: "path: path path", all paths below the module directory.
func modulesDep(modules []*module) []byte {
	paths := map[string]string{}
	for _, m := range modules {
		paths[m.name] = m.path
	}
	var b bytes.Buffer
	for _, m := range modules {
		b.WriteString(m.path + ":")
		for _, d := range m.deps {
			if p := paths[d]; p != "" { // else built in
				b.WriteString(" " + p)
			}
		}
		b.WriteByte('\n')
	}
	return b.Bytes()
}
