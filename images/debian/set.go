package debian

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// Set is a closure of unpacked packages, seen as one root filesystem.
type Set struct {
	Packages []*Package // ordered by name
	entries  map[string]entry
}

type entry struct {
	pkg  *Package
	name string // in the package, without leading slash
	link string // target of a symbolic link
	dir  bool
}

// File is one regular file of a Set.
type File struct {
	Path    string // absolute, symbolic links resolved
	Host    string // where it lies on this machine
	Package *Package
}

func newSet(packages []*Package) (*Set, error) {
	s := &Set{Packages: packages, entries: map[string]entry{}}
	for _, p := range packages {
		err := filepath.WalkDir(p.root, func(name string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			rel, err := filepath.Rel(p.root, name)
			if err != nil {
				return err
			}
			e := entry{pkg: p, name: rel, dir: d.IsDir()}
			if d.Type() == fs.ModeSymlink {
				if e.link, err = os.Readlink(name); err != nil {
					return err
				}
			}
			s.entries[merged("/"+rel)] = e
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("debian: %w", err)
		}
	}
	return s, nil
}

// merged gives the path that p has on Debian's merged /usr, where /bin, /sbin,
// /lib and /lib64 are links into /usr (Debian Policy 10.1).
func merged(p string) string {
	p = path.Clean(p)
	for _, d := range []string{"/bin", "/sbin", "/lib", "/lib64"} {
		if p == d || strings.HasPrefix(p, d+"/") {
			return "/usr" + p
		}
	}
	return p
}

// Lookup finds the regular file at an absolute path, through symbolic links of
// any package. The error wraps fs.ErrNotExist when no package has it. Links
// that maintainer scripts would make do not exist.
func (s *Set) Lookup(name string) (File, error) {
	p := merged(name)
	for range 40 { // as many links as the kernel follows, path_resolution(7)
		e, ok, next := s.step(p)
		if next != "" {
			p = next
			continue
		}
		if !ok || e.dir {
			break
		}
		return File{Path: p, Host: filepath.Join(e.pkg.root, e.name), Package: e.pkg}, nil
	}
	return File{}, fmt.Errorf("debian: %s: %w", name, fs.ErrNotExist)
}

// step finds the entry of p, or where the first symbolic link on the way leads.
func (s *Set) step(p string) (e entry, ok bool, next string) {
	for i := 1; i <= len(p); i++ {
		if i < len(p) && p[i] != '/' {
			continue
		}
		if e, ok = s.entries[p[:i]]; ok && e.link != "" {
			target := e.link
			if !path.IsAbs(target) {
				target = path.Join(path.Dir(p[:i]), target)
			}
			return entry{}, false, merged(target + p[i:])
		}
	}
	return e, ok, ""
}

// Glob lists the regular files, links resolved, in directory dir whose name
// matches pattern (path.Match), ordered.
func (s *Set) Glob(dir, pattern string) ([]File, error) {
	dir = merged(dir)
	var files []File
	for p, e := range s.entries {
		if path.Dir(p) != dir || e.dir {
			continue
		}
		ok, err := path.Match(pattern, path.Base(p))
		if err != nil {
			return nil, fmt.Errorf("debian: pattern %q: %w", pattern, err)
		}
		if !ok {
			continue
		}
		f, err := s.Lookup(p)
		if errors.Is(err, fs.ErrNotExist) {
			continue // a link out of the set, or to a directory
		} else if err != nil {
			return nil, err
		}
		files = append(files, f)
	}
	slices.SortFunc(files, func(a, b File) int { return strings.Compare(a.Path, b.Path) })
	return files, nil
}
