// Package initramfs builds the root filesystems of both domains, as data: a
// Spec lists commands, kernel modules, foreign programs and files; Build turns
// it into a compressed cpio archive and a Manifest that names the origin of
// every file.
package initramfs

import (
	"context"
	"errors"

	"sekisho/images/debian"
)

// Options is what differs from build to build.
type Options struct {
	// Dir is the root of this module's source tree.
	Dir string
	// Cache is a directory kept between builds (packages, Go build scratch).
	Cache string
	// Version is recorded in the manifest as the version of our own files.
	Version string
	// Lab adds the hooks of the virtual lab (build tag lab) and tools for
	// debugging. A release image is built with Lab false.
	Lab bool
	// Organization is the content of /etc/sekisho/organization.json.
	Organization []byte
	// Modules names the kernel modules wanted in the host domain, without
	// their dependencies: those of hostos/boot.
	Modules []string
	// Refresh asks the Debian mirror for newer packages.
	Refresh bool
	// Progress may be nil.
	Progress debian.Progress
}

// Image is a kernel with its root filesystem.
type Image struct {
	KernelVersion string // as uname -r prints it
	Kernel        []byte // bzImage
	Initrd        []byte // cpio archive, compressed with zstd
	Unpacked      int64  // bytes of the cpio archive before compression
	Stub          []byte // systemd's EFI stub, linuxx64.efi.stub
	StubVersion   string // version of the package systemd-boot-efi
	Manifest      Manifest
}

// Manifest lists every file of an image.
type Manifest struct {
	Name    string `json:"name"` // "host" or "work"
	Version string `json:"version"`
	Kernel  string `json:"kernel"`
	Files   []File `json:"files"` // ordered by Path
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

// Host builds the host domain's image.
func Host(ctx context.Context, o Options) (*Image, error) {
	return nil, errors.New("initramfs: host image: not built yet")
}

// Work builds the image of the Linux work domain that stands in for Windows.
func Work(ctx context.Context, o Options) (*Image, error) {
	return nil, errors.New("initramfs: work image: not built yet")
}
