// Package debian fetches Debian packages for the images: resolved, downloaded
// and verified by apt in a private state directory, so the machine's own apt
// state is never touched, then unpacked side by side in a cache.
//
// What vouches for a file of a Set: apt checks the archive's signature with
// the keyring of the debian-archive-keyring package, the signed Release file
// names the index by hash, the index names each package by SHA-256, and that
// hash is checked again here before a package is unpacked.
package debian

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
	// packages, made if absent. It may be shared by all builds of a checkout.
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
	Deb     string `json:"deb"`    // file name of the .deb
	root    string // where it is unpacked
}
