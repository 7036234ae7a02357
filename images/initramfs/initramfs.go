// Package initramfs builds the root filesystems of both domains. A domain's
// content is data (spec.go): commands, kernel modules, foreign programs and
// files. Building turns it into a compressed cpio archive and a Manifest that
// names the origin of every file.
package initramfs

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"sekisho/images/debian"
)

// Options is what differs from build to build.
type Options struct {
	// Dir is the root of this module's source tree.
	Dir string
	// Cache is a directory kept between builds; see debian.Config. Generated
	// sources stand in it only while they are compiled.
	Cache string
	// Version is recorded in the manifest as the version of our own files.
	Version string
	// Lab adds the hooks of the virtual lab (build tag lab), tools for
	// debugging. A release image is built with Lab false.
	Lab bool
	// Card adds clients of the smart card to a work domain with Lab.
	Card bool
	// Organization is the content of /etc/sekisho/organization.json.
	Organization []byte
	// Modules names the kernel modules wanted in the host domain, without
	// their dependencies: those of hostos/boot. The work domain has its own.
	Modules []string
	// Mirror and SecurityMirror are Debian archive URIs; empty means those of
	// the machine's own apt configuration.
	Mirror, SecurityMirror string
	// Refresh asks the mirror for newer packages; see debian.Config.
	Refresh bool
	// Progress may be nil.
	Progress debian.Progress
}

// Image is a kernel with its root filesystem.
type Image struct {
	KernelVersion string // as uname -r prints it
	Kernel        []byte // bzImage
	Initrd        []byte // cpio archive, compressed with zstd
	Unpacked      int64  // bytes of the archive before compression
	Stub          []byte // systemd's EFI stub, linuxx64.efi.stub
	StubVersion   string // version of the package systemd-boot-efi
	Manifest      Manifest
}

// Manifest lists every file of an image and where it comes from.
type Manifest struct {
	Name     string            `json:"name"` // "host" or "work"
	Version  string            `json:"version"`
	Lab      bool              `json:"lab"`
	Kernel   string            `json:"kernel"`   // as uname -r prints it
	Parts    []File            `json:"parts"`    // kernel and stub, by Debian's paths
	Files    []File            `json:"files"`    // the root filesystem, ordered by path
	Packages []*debian.Package `json:"packages"` // those that a file comes from, with the SHA-256 of the .deb
}

// File is one entry of a Manifest.
type File struct {
	Path    string `json:"path"` // absolute
	Mode    string `json:"mode"` // as ls -l shows it
	Size    int64  `json:"size"` // bytes
	SHA256  string `json:"sha256,omitempty"`
	Link    string `json:"link,omitempty"` // target of a symbolic link
	Package string `json:"package"`        // Debian package, or "sekisho"
	Version string `json:"version"`
}

// Largest returns the n largest files, largest first.
func (m *Manifest) Largest(n int) []File {
	files := slices.SortedStableFunc(slices.Values(m.Files), func(a, b File) int { return cmp.Compare(b.Size, a.Size) })
	return files[:min(n, len(files))]
}

// JSON is the manifest as it is published beside the image.
func (m *Manifest) JSON() ([]byte, error) {
	data, err := json.MarshalIndent(m, "", "\t")
	if err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	return append(data, '\n'), nil
}

// Host builds the host domain's image.
func Host(ctx context.Context, o Options) (*Image, error) {
	if len(o.Organization) == 0 {
		return nil, errors.New("host image: no organization.json given")
	}
	if len(o.Modules) == 0 {
		return nil, errors.New("host image: no kernel modules given")
	}
	return build(ctx, hostSpec(o), o)
}

// Work builds the image of the Linux work domain that stands in for Windows.
func Work(ctx context.Context, o Options) (*Image, error) {
	return build(ctx, workSpec(o), o)
}

// ours is the manifest's package name of files from this source tree.
const ours = "sekisho"

// debianPackages is what both images are made from, one set so that both have
// the same kernel.
var debianPackages = []string{"cryptsetup-bin", "dbus-daemon", "dmsetup", "fprintd", "hostapd", "krb5-pkinit", "krb5-user", "libccid", "linux-image-amd64", "opensc", "opensc-pkcs11", "ovmf", "pcscd", "qemu-system-x86", "seabios", "systemd-boot-efi", "wireless-regdb", "wpasupplicant"}

// stubPath is where systemd-boot-efi installs the EFI stub.
const stubPath = "/usr/lib/systemd/boot/efi/linuxx64.efi.stub"

// build makes an image of what s says.
func build(ctx context.Context, s spec, o Options) (*Image, error) {
	if o.Progress == nil {
		o.Progress = func(string, int64, int64) {}
	}
	var err error
	if o.Dir, err = filepath.Abs(o.Dir); err != nil {
		return nil, fmt.Errorf("%s image: %w", s.name, err)
	}
	if o.Cache, err = filepath.Abs(o.Cache); err != nil {
		return nil, fmt.Errorf("%s image: %w", s.name, err)
	}
	set, err := debian.Fetch(ctx, debian.Config{
		Cache: o.Cache, Mirror: o.Mirror, SecurityMirror: o.SecurityMirror,
		Refresh: o.Refresh, Progress: o.Progress,
	}, debianPackages...)
	if err != nil {
		return nil, fmt.Errorf("%s image: %w", s.name, err)
	}
	im := &Image{Manifest: Manifest{Name: s.name, Version: o.Version, Lab: o.Lab}}
	m := &im.Manifest

	kernel, err := im.boot(set)
	if err != nil {
		return nil, fmt.Errorf("%s image: %w", s.name, err)
	}
	t, err := s.tree(ctx, o, set, kernel)
	if err != nil {
		return nil, fmt.Errorf("%s image: %w", s.name, err)
	}
	var out bytes.Buffer
	m.Files, im.Unpacked, err = t.pack(&out, func(done, total int64) {
		o.Progress("packing the "+s.name+" image", done, total)
	})
	if err != nil {
		return nil, fmt.Errorf("%s image: %w", s.name, err)
	}
	im.Initrd = out.Bytes()

	used := map[string]bool{}
	for _, f := range slices.Concat(m.Parts, m.Files) {
		used[f.Package] = true
	}
	for _, p := range set.Packages {
		if used[p.Name] {
			m.Packages = append(m.Packages, p)
		}
	}
	return im, nil
}

// boot reads kernel and stub, which lie beside the root filesystem in a UKI,
// and returns the kernel's package.
func (im *Image) boot(set *debian.Set) (*debian.Package, error) {
	const prefix = "linux-image-"
	var kernel *debian.Package
	for _, p := range set.Packages {
		// The package linux-image-amd64 only depends on the one that has the kernel.
		if v, ok := strings.CutPrefix(p.Name, prefix); ok && v != "" && v[0] >= '0' && v[0] <= '9' {
			if kernel != nil {
				return nil, fmt.Errorf("two kernels: %s and %s", kernel.Name, p.Name)
			}
			kernel, im.KernelVersion = p, v
		}
	}
	if kernel == nil {
		return nil, fmt.Errorf("no package %sVERSION: %w", prefix, fs.ErrNotExist)
	}
	im.Manifest.Kernel = im.KernelVersion
	for _, part := range []struct {
		path string
		data *[]byte
	}{{"/boot/vmlinuz-" + im.KernelVersion, &im.Kernel}, {stubPath, &im.Stub}} {
		f, err := set.Lookup(part.path)
		if err != nil {
			return nil, err
		}
		if *part.data, err = os.ReadFile(f.Host); err != nil {
			return nil, err
		}
		im.Manifest.Parts = append(im.Manifest.Parts, File{
			Path: f.Path, Mode: fs.FileMode(0o644).String(), Size: int64(len(*part.data)), SHA256: sum(*part.data),
			Package: f.Package.Name, Version: f.Package.Version,
		})
		if part.path == stubPath {
			im.StubVersion = f.Package.Version
		}
	}
	return kernel, nil
}

// tree assembles the root filesystem.
func (s spec) tree(ctx context.Context, o Options, set *debian.Set, kernel *debian.Package) (tree, error) {
	t := tree{}
	us := origin{ours, o.Version}
	for _, p := range slices.Sorted(maps.Keys(s.files)) {
		n := s.files[p]
		n.origin = us
		if err := t.add(p, n); err != nil {
			return nil, err
		}
	}
	o.Progress("compiling the commands of the "+s.name+" image", 0, 0)
	if err := s.addBusybox(ctx, t, o, us); err != nil {
		return nil, err
	}
	o.Progress("collecting modules, programs and firmware of the "+s.name+" image", 0, 0)
	if err := s.addModules(t, kernel); err != nil {
		return nil, err
	}
	files, err := closure(set, s.programs)
	if err != nil {
		return nil, err
	}
	for _, p := range s.firmware {
		if files[p], err = set.Lookup(p); err != nil {
			return nil, err
		}
	}
	for _, p := range slices.Sorted(maps.Keys(files)) {
		f := files[p]
		info, err := os.Stat(f.Host)
		if err != nil {
			return nil, err
		}
		err = t.add(p, node{mode: info.Mode().Perm() & 0o755, host: f.Host, origin: origin{f.Package.Name, f.Package.Version}})
		if err != nil {
			return nil, err
		}
	}
	return t, nil
}

// addBusybox compiles the commands and links each to /bbin.
func (s spec) addBusybox(ctx context.Context, t tree, o Options, us origin) error {
	scratch, err := os.MkdirTemp(o.Cache, "busybox-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(scratch)
	b := busybox{dir: o.Dir, scratch: scratch, commands: s.commands, tags: s.tags}
	binary, err := b.build(ctx)
	if err != nil {
		return err
	}
	if err := t.add("/bbin/bb", node{mode: 0o755, data: binary, origin: us}); err != nil {
		return err
	}
	for _, c := range s.commands {
		if err := t.add("/bbin/"+path.Base(c), node{mode: fs.ModeSymlink | 0o777, link: "bb", origin: us}); err != nil {
			return err
		}
	}
	return t.add("/init", node{mode: fs.ModeSymlink | 0o777, link: "bbin/" + path.Base(s.init), origin: us})
}

// addModules adds the kernel modules with what a loader needs to find them.
func (s spec) addModules(t tree, kernel *debian.Package) error {
	version := strings.TrimPrefix(kernel.Name, "linux-image-")
	k, err := readKernelModules(kernel.FS(), version)
	if err != nil {
		return err
	}
	modules, err := k.resolve(s.modules)
	if err != nil {
		return err
	}
	builtin, err := fs.ReadFile(kernel.FS(), k.dir+"/modules.builtin")
	if err != nil {
		return err
	}
	from := origin{kernel.Name, kernel.Version}
	dir := "/" + k.dir + "/"
	for _, m := range modules {
		if err := t.add(dir+m.path, node{mode: 0o644, data: m.data, origin: from}); err != nil {
			return err
		}
	}
	return errors.Join(
		t.add(dir+"modules.builtin", node{mode: 0o644, data: builtin, origin: from}),
		t.add(dir+"modules.dep", node{mode: 0o644, data: modulesDep(modules), origin: from}))
}
