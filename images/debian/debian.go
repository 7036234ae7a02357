// Package debian fetches Debian packages for the images: resolved, downloaded
// and verified by apt in a private state directory, so the machine's own apt
// state is never touched, then unpacked side by side in a cache.
//
// What vouches for a file of a Set: apt checks the archive's signature with
// the keyring of the debian-archive-keyring package, the signed Release file
// names the index by hash, the index names each package by SHA-256, and that
// hash is checked again here before a package is unpacked.
package debian

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"
)

// Keyring is where the package debian-archive-keyring installs Debian's keys.
const Keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// Suite is the Debian release that the images are made from.
const Suite = "trixie"

// Progress is told of each step: what is being done, and how far in units of
// its own; total 0 means that the end is not known. It is called from one
// goroutine at a time.
type Progress func(what string, done, total int64)

// Config says where packages come from and where they are kept.
type Config struct {
	// Cache is the directory for apt's state, downloads and unpacked
	// packages, made if absent. It may be shared by all builds of a checkout:
	// they wait for each other.
	Cache string
	// Mirror and SecurityMirror are archive URIs. Empty means those of the
	// machine's own apt configuration.
	Mirror, SecurityMirror string
	// Refresh asks the mirror for newer packages. Without it a set that was
	// resolved before is used again as it is, without network.
	Refresh bool
	// Progress may be nil.
	Progress Progress
}

// Package is one unpacked Debian package.
type Package struct {
	Name    string `json:"name"`
	Version string `json:"version"`
	Arch    string `json:"arch"`
	SHA256  string `json:"sha256"` // of the .deb, hexadecimal, from the signed index
	Deb     string `json:"deb"`    // file name of the .deb in the archive

	root string // where it is unpacked
}

// FS is the package's content.
func (p *Package) FS() fs.FS { return os.DirFS(p.root) }

// Fetch returns the named packages and all that they depend on (recommended
// packages are left out), unpacked. A set fetched before comes from the cache
// unless c.Refresh is set. Fetch needs apt-get, dpkg-deb and Debian's keyring
// on the machine, but not root.
func Fetch(ctx context.Context, c Config, names ...string) (set *Set, err error) {
	if c.Progress == nil {
		c.Progress = func(string, int64, int64) {}
	}
	cache, err := filepath.Abs(c.Cache)
	if err != nil {
		return nil, fmt.Errorf("debian: cache directory: %w", err)
	}
	c.Cache = cache
	unlock, err := lockCache(ctx, c.Cache)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	names = slices.Compact(slices.Sorted(slices.Values(names)))
	lock := filepath.Join(c.Cache, "set-"+hash([]byte(Suite + " " + strings.Join(names, " ")))[:16]+".json")

	packages, err := readLock(lock)
	if c.Refresh || errors.Is(err, fs.ErrNotExist) {
		packages, err = resolve(ctx, c, names)
	}
	if err != nil {
		return nil, err
	}
	if err := download(ctx, c, packages); err != nil {
		return nil, err
	}
	if err := writeLock(lock, packages); err != nil {
		return nil, err
	}
	return newSet(packages)
}

// maxLock bounds the record of a set in bytes.
const maxLock = 1 << 20

// readLock reads the record of a set that was resolved before.
func readLock(path string) ([]*Package, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("debian: %w", err)
	}
	defer f.Close()
	var packages []*Package
	if err := json.NewDecoder(io.LimitReader(f, maxLock)).Decode(&packages); err != nil {
		return nil, fmt.Errorf("debian: %s: %w; remove it to resolve again", path, err)
	}
	return packages, nil
}

func writeLock(path string, packages []*Package) error {
	data, err := json.MarshalIndent(packages, "", "\t")
	if err != nil {
		return fmt.Errorf("debian: %w", err)
	}
	if err := os.WriteFile(path, append(data, '\n'), 0o644); err != nil {
		return fmt.Errorf("debian: %w", err)
	}
	return nil
}

// resolve asks apt for the closure of names at the mirror's newest versions.
func resolve(ctx context.Context, c Config, names []string) ([]*Package, error) {
	a, err := newApt(ctx, c)
	if err != nil {
		return nil, err
	}
	if err := a.run(ctx, "package lists of Debian "+Suite, "apt-get", "update"); err != nil {
		return nil, err
	}
	out, err := a.output(ctx, "apt-get", append([]string{"install", "--simulate", "--no-install-recommends", "--"}, names...)...)
	if err != nil {
		return nil, err
	}
	ids := parseSimulation(out)
	if len(ids) == 0 {
		return nil, fmt.Errorf("debian: apt-get found nothing to install for %s", strings.Join(names, " "))
	}
	out, err = a.output(ctx, "apt-cache", append([]string{"show", "--no-all-versions", "--"}, ids...)...)
	if err != nil {
		return nil, err
	}
	packages, err := parseRecords(out)
	if err != nil {
		return nil, err
	}
	if len(packages) != len(ids) {
		return nil, fmt.Errorf("debian: apt-cache describes %d packages, %d wanted", len(packages), len(ids))
	}
	return packages, nil
}

// parseSimulation gives name=version for each line of apt-get's simulation
// such as "Inst libc6 (2.41-12 Debian:13/stable [amd64])".
func parseSimulation(out []byte) []string {
	var ids []string
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		if len(f) >= 3 && f[0] == "Inst" && strings.HasPrefix(f[2], "(") {
			ids = append(ids, f[1]+"="+f[2][1:])
		}
	}
	return ids
}

// What names of the index may look like before they become file names
// (Debian Policy 5.6.7 and 5.6.12).
var (
	reName    = regexp.MustCompile(`^[a-z0-9][a-z0-9+.-]{1,127}$`)
	reVersion = regexp.MustCompile(`^[0-9A-Za-z.+:~-]{1,127}$`)
	reSHA256  = regexp.MustCompile(`^[0-9a-f]{64}$`)
)

// maxRecords bounds what parseRecords takes, in bytes; a record has about 2 KiB.
const maxRecords = 8 << 20

// parseRecords reads the control records that apt-cache show prints. Each must
// carry a SHA-256. The result is ordered by name.
func parseRecords(out []byte) ([]*Package, error) {
	if len(out) > maxRecords {
		return nil, fmt.Errorf("debian: %d bytes of index records, at most %d", len(out), maxRecords)
	}
	var packages []*Package
	for record := range strings.SplitSeq(string(out), "\n\n") {
		if strings.TrimSpace(record) == "" {
			continue
		}
		var p Package
		for line := range strings.Lines(record) {
			key, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ": ")
			switch key {
			case "Package":
				p.Name = value
			case "Version":
				p.Version = value
			case "Architecture":
				p.Arch = value
			case "SHA256":
				p.SHA256 = value
			}
		}
		if !reName.MatchString(p.Name) || !reVersion.MatchString(p.Version) || !reName.MatchString(p.Arch) || !reSHA256.MatchString(p.SHA256) {
			return nil, fmt.Errorf("debian: index record of package %q, version %q, architecture %q, SHA-256 %q: malformed", p.Name, p.Version, p.Arch, p.SHA256)
		}
		// apt writes the colon of an epoch as %3a in file names.
		p.Deb = p.Name + "_" + strings.ReplaceAll(p.Version, ":", "%3a") + "_" + p.Arch + ".deb"
		packages = append(packages, &p)
	}
	slices.SortFunc(packages, func(a, b *Package) int { return cmp.Compare(a.Name, b.Name) })
	return packages, nil
}

// download sees to it that every package is unpacked, and sets its root. What
// the cache has already is not fetched again.
func download(ctx context.Context, c Config, packages []*Package) error {
	var missing []*Package
	var ids []string
	for _, p := range packages {
		// The hash is part of the name: a root holds what the index vouched for.
		p.root = filepath.Join(c.Cache, "unpacked", strings.TrimSuffix(p.Deb, ".deb")+"_"+p.SHA256[:16])
		if _, err := os.Stat(p.root); errors.Is(err, fs.ErrNotExist) {
			missing = append(missing, p)
			ids = append(ids, p.Name+"="+p.Version)
		} else if err != nil {
			return fmt.Errorf("debian: %w", err)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	a, err := newApt(ctx, c)
	if err != nil {
		return err
	}
	if err := a.run(ctx, fmt.Sprintf("download of %d Debian packages", len(missing)), "apt-get", append([]string{"download", "--"}, ids...)...); err != nil {
		return fmt.Errorf("%w; if the mirror has replaced a version, build again with packages refreshed", err)
	}
	const what = "unpacking Debian packages"
	total := int64(len(missing))
	c.Progress(what, 0, total)
	var (
		g    errgroup.Group
		mu   sync.Mutex // guards done and the call of Progress
		done int64
	)
	g.SetLimit(runtime.GOMAXPROCS(0))
	for _, p := range missing {
		g.Go(func() error {
			if err := p.unpack(ctx, filepath.Join(a.dir, "debs", p.Deb)); err != nil {
				return fmt.Errorf("debian: %s %s: %w", p.Name, p.Version, err)
			}
			mu.Lock()
			defer mu.Unlock()
			done++
			c.Progress(what, done, total)
			return nil
		})
	}
	return g.Wait()
}

// unpack checks the .deb against the signed index and extracts it to p.root,
// which appears complete or not at all. The .deb is removed.
func (p *Package) unpack(ctx context.Context, deb string) error {
	f, err := os.Open(deb)
	if err != nil {
		return err
	}
	h := sha256.New()
	_, err = io.Copy(h, f)
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	if sum := hex.EncodeToString(h.Sum(nil)); sum != p.SHA256 {
		return fmt.Errorf("%s has SHA-256 %s, the signed index says %s; remove it and build again", deb, sum, p.SHA256)
	}
	tmp := p.root + ".part"
	if err := errors.Join(os.RemoveAll(tmp), os.MkdirAll(tmp, 0o755)); err != nil {
		return err
	}
	if out, err := exec.CommandContext(ctx, "dpkg-deb", "--extract", deb, tmp).CombinedOutput(); err != nil {
		return fmt.Errorf("dpkg-deb: %w: %s", err, out)
	}
	if err := os.Rename(tmp, p.root); err != nil {
		return err
	}
	return os.Remove(deb)
}

func hash(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}
