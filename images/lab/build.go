package lab

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"sekisho/attest"
	"sekisho/attest/seal"
	"sekisho/images"
)

// builder makes images into the directory out, with this checkout's keys.
func (l *Lab) builder(out string) *images.Builder {
	return &images.Builder{Source: l.Root, Out: out, Keys: l.out("keys"), Cache: l.out("cache"), Card: l.Logon, Now: time.Now, Progress: l.progress()}
}

// Build makes what the lab boots, unless it is there and was made of the same
// sources.
func (l *Lab) Build(ctx context.Context) error {
	if err := l.preparePKI(); err != nil {
		return err
	}
	sum, err := l.sources()
	if err != nil {
		return err
	}
	made, _ := os.ReadFile(l.lab("image.sum"))
	if string(made) == sum && exist(l.Laptop().Disk, l.Laptop().Vars, l.out(images.HostReference)) {
		return nil
	}
	l.say("lab: building the laptop's images")
	b := l.builder(l.out())
	if _, err := b.Host(ctx, images.HostOptions{Organization: l.OrganizationFile(), Version: "0-lab", Lab: true}); err != nil {
		return err
	}
	if err := l.seal(b, seal.FirstEpoch); err != nil {
		return err
	}
	if _, err := b.Work(ctx, true, false); err != nil {
		return err
	}
	if _, err := b.Disk(l.out(images.WorkImage)); err != nil {
		return err
	}
	return writeFile(l.lab("image.sum"), []byte(sum), 0o644)
}

// seal puts the signed policies of a release into the image in b.Out, as the
// release side does.
func (l *Lab) seal(b *images.Builder, epoch uint64) error {
	signer, err := l.signer("release")
	if err != nil {
		return err
	}
	data, err := os.ReadFile(filepath.Join(b.Out, images.HostReference))
	if err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	refs, err := attest.ParseReferenceValues(data)
	if err != nil {
		return err
	}
	r, err := seal.SignPolicy(signer, refs, epoch)
	if err != nil {
		return err
	}
	if data, err = r.Encode(); err != nil {
		return err
	}
	policy := filepath.Join(b.Out, "release.json")
	if err := writeFile(policy, data, 0o644); err != nil {
		return err
	}
	_, err = b.Policy(filepath.Join(b.Out, images.HostImage), policy)
	return err
}

func exist(files ...string) bool {
	return !slices.ContainsFunc(files, func(f string) bool { _, err := os.Stat(f); return err != nil })
}

// notInImage are folders whose sources no image is made of.
var notInImage = []string{"images/cmd", "images/lab/cmd/lab", "images/lab/capture", "attest/cmd/verifier", "attest/cmd/attestctl", "netd/cmd/gateway", "netd/gateway"}

// sources returns a digest of everything the images are made of.
func (l *Lab) sources() (string, error) {
	h := sha256.New()
	root := os.DirFS(l.Root)
	add := func(name string) error {
		f, err := root.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		fmt.Fprintf(h, "%d %s\n", len(name), name)
		_, err = io.Copy(h, f)
		return err
	}
	for _, top := range []string{"go.mod", "go.sum", "out/lab/organization.json"} {
		if err := add(top); err != nil {
			return "", fmt.Errorf("lab: sources: %w", err)
		}
	}
	for _, area := range []string{"attest", "guestlink", "netd", "hostos", "images"} {
		err := fs.WalkDir(root, area, func(name string, d fs.DirEntry, err error) error {
			switch {
			case err != nil:
				return err
			case d.IsDir() && (slices.Contains(notInImage, name) || d.Name() == "testdata"):
				return fs.SkipDir
			case d.IsDir(), filepath.Dir(name) == "images/lab", strings.HasSuffix(name, "_test.go"):
				return nil
			}
			return add(name)
		})
		if err != nil {
			return "", fmt.Errorf("lab: sources: %w", err)
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// Components are the parts of the image that Tamper can change.
func Components() []string {
	var names []string
	for _, c := range images.Components() {
		names = append(names, string(c))
	}
	return names
}

// Tamper makes a laptop whose image was changed in one component and properly
// signed again, as whoever got hold of the signing key could: it boots, and it
// is for attestation to refuse it.
func (l *Lab) Tamper(component string) (Image, error) {
	return l.tamper(component, l.out())
}

// tamper is Tamper with the image in the directory from.
func (l *Lab) tamper(component, from string) (Image, error) {
	b := l.builder(l.out("tamper-" + component))
	if err := os.MkdirAll(b.Out, 0o755); err != nil {
		return Image{}, fmt.Errorf("lab: %w", err)
	}
	if _, err := b.Tamper(filepath.Join(from, images.HostImage), images.Component(component)); err != nil {
		return Image{}, err
	}
	return l.disk(b, "tampered "+component)
}

// Next makes the release after the laptop's, with a later epoch, and returns
// it with the file of its reference values.
func (l *Lab) Next(version string, epoch uint64) (Image, string, error) {
	b := l.builder(l.out("next"))
	if err := os.MkdirAll(b.Out, 0o755); err != nil {
		return Image{}, "", fmt.Errorf("lab: %w", err)
	}
	if _, err := b.Next(l.out(images.HostImage), version, true); err != nil {
		return Image{}, "", err
	}
	if err := l.seal(b, epoch); err != nil {
		return Image{}, "", err
	}
	image, err := l.disk(b, "release "+version)
	return image, filepath.Join(b.Out, images.HostReference), err
}

// Unsign makes a laptop whose image carries no signature: the firmware has to
// refuse it.
func (l *Lab) Unsign() (Image, error) {
	b := l.builder(l.out("unsigned"))
	if err := os.MkdirAll(b.Out, 0o755); err != nil {
		return Image{}, fmt.Errorf("lab: %w", err)
	}
	if err := copySparse(filepath.Join(b.Out, images.HostImage), l.out(images.HostUnsigned)); err != nil {
		return Image{}, err
	}
	return l.disk(b, "unsigned")
}

func (l *Lab) disk(b *images.Builder, name string) (Image, error) {
	if _, err := b.Disk(l.out(images.WorkImage)); err != nil {
		return Image{}, err
	}
	return Image{Name: name, Disk: filepath.Join(b.Out, images.LaptopDisk), Vars: filepath.Join(b.Out, images.LaptopVars)}, nil
}
