package initramfs

import (
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strings"

	"sekisho/images/debian"
)

// libraryDirs are where Debian's loader looks, as seen on merged /usr
// (ld.so(8); Debian's multiarch configuration).
var libraryDirs = []string{"/usr/lib/x86_64-linux-gnu", "/usr/lib"}

// finder finds the regular file at an absolute path; *debian.Set is one.
type finder interface {
	Lookup(name string) (debian.File, error)
}

// closure returns the programs with every shared library they need, and the
// loader, by the path at which the loader will look. Nothing is run: needed
// names are read from the ELF files (DT_NEEDED), so what a program opens later
// with dlopen must be named as a program itself.
func closure(set finder, programs []string) (map[string]debian.File, error) {
	found := map[string]debian.File{}
	queue := programs
	for len(queue) > 0 {
		name := queue[0]
		queue = queue[1:]
		if _, ok := found[name]; ok {
			continue
		}
		f, err := set.Lookup(name)
		if err != nil {
			return nil, fmt.Errorf("closure: %w", err)
		}
		found[name] = f
		needs, err := readNeeds(f.Host)
		if err != nil {
			return nil, fmt.Errorf("closure: %s: %w", name, err)
		}
		if needs.loader != "" {
			queue = append(queue, mergedUsr(needs.loader))
		}
		for _, lib := range needs.libraries {
			p, err := findLibrary(set, lib, needs.searchPath(name))
			if err != nil {
				return nil, fmt.Errorf("closure: %s needs %s: %w", name, lib, err)
			}
			queue = append(queue, p)
		}
	}
	return found, nil
}

// mergedUsr puts a loader's path (/lib64/…) below /usr, to which the image's
// /lib and /lib64 are links.
func mergedUsr(p string) string {
	if strings.HasPrefix(p, "/usr/") {
		return p
	}
	return "/usr" + p
}

func findLibrary(set finder, name string, dirs []string) (string, error) {
	for _, dir := range append(dirs, libraryDirs...) {
		p := path.Join(dir, name)
		if _, err := set.Lookup(p); err == nil {
			return p, nil
		} else if !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
	}
	return "", fs.ErrNotExist
}

// needs is what an ELF file wants of the loader.
type needs struct {
	loader    string   // PT_INTERP; empty for a library or a static program
	libraries []string // DT_NEEDED
	paths     []string // DT_RUNPATH or DT_RPATH
}

// searchPath is the file's own library path, with $ORIGIN put in.
func (n needs) searchPath(name string) []string {
	var dirs []string
	for _, list := range n.paths {
		for dir := range strings.SplitSeq(list, ":") {
			dir = strings.NewReplacer("$ORIGIN", path.Dir(name), "${ORIGIN}", path.Dir(name)).Replace(dir)
			if path.IsAbs(dir) {
				dirs = append(dirs, mergedUsr(path.Clean(dir)))
			}
		}
	}
	return dirs
}

// maxInterp bounds PT_INTERP (PATH_MAX).
const maxInterp = 4096

func readNeeds(host string) (needs, error) {
	var n needs
	f, err := elf.Open(host)
	if err != nil {
		return n, err
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			data, err := io.ReadAll(io.LimitReader(p.Open(), maxInterp))
			if err != nil {
				return n, err
			}
			n.loader = strings.TrimRight(string(data), "\x00")
		}
	}
	if n.libraries, err = f.ImportedLibraries(); err != nil {
		return n, err
	}
	for _, tag := range []elf.DynTag{elf.DT_RUNPATH, elf.DT_RPATH} {
		paths, err := f.DynString(tag)
		if err != nil {
			return n, err
		}
		n.paths = append(n.paths, paths...)
	}
	return n, nil
}
