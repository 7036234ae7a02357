// Package images builds what a laptop boots: the host domain's signed image
// with its reference values, the work domain's disk, and the laptop's disk with
// the firmware's variables. Its parts are in the packages below it; here they
// are put together, for mkimage and for the virtual lab.
package images

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"sekisho/attest"
	"sekisho/hostos/boot"
	"sekisho/images/disk"
	"sekisho/images/initramfs"
	"sekisho/images/uki"
)

// Names of what Builder writes into its output directory.
const (
	HostImage     = "host.efi"            // signed UKI of the host domain
	HostUnsigned  = "host.unsigned.efi"   // the same before signing, reproducible
	HostManifest  = "host.manifest.json"  // every file of it, with its origin
	HostReference = "host.reference.json" // attest.ReferenceValues of it
	WorkImage     = "work.img"            // disk of the stand-in work domain
	WorkManifest  = "work.manifest.json"
	LaptopDisk    = "laptop.img"   // GPT disk, docs/host-domain.md
	LaptopVars    = "OVMF_VARS.fd" // firmware variables with our keys alone
)

// BlankVars is the blank variable file of Debian's package ovmf.
const BlankVars = "/usr/share/OVMF/OVMF_VARS_4M.fd"

// scratchSize is of the partition sekisho-scratch in bytes.
const scratchSize = 256 << 20

// maxOrganization bounds the organisation file before it is read, in bytes.
const maxOrganization = 256 << 10

// Builder says where things are and go.
type Builder struct {
	Source string // root of this module's source tree
	Out    string // directory for results
	Keys   string // directory of the Secure Boot keys
	Cache  string // directory kept between builds
	Card   bool   // clients of the smart card in the lab's work domain
	// Now is the clock for the validity of new keys.
	Now func() time.Time
	// Progress is told of each step; it may be nil.
	Progress func(what string, done, total int64)
}

// File is a file that a build wrote.
type File struct {
	Path string `json:"path"`
	Size int64  `json:"size"` // bytes
}

// HostOptions is what differs between host images.
type HostOptions struct {
	Organization string // organization.json
	Version      string // of the release
	Lab          bool   // with the lab's hooks; never for a real laptop
	Refresh      bool   // ask Debian for newer packages
}

func (b *Builder) step(what string) {
	if b.Progress != nil {
		b.Progress(what, 0, 0)
	}
}

func (b *Builder) initramfs(o HostOptions) initramfs.Options {
	var modules []string
	for _, m := range slices.Concat(boot.BaseModules(), boot.NICModules()) {
		modules = append(modules, m.Name)
	}
	return initramfs.Options{
		Dir: b.Source, Cache: b.Cache, Version: o.Version, Lab: o.Lab, Card: b.Card,
		Modules: modules, Refresh: o.Refresh, Progress: b.Progress,
	}
}

// Host builds and signs the host domain's image and computes its reference
// values.
func (b *Builder) Host(ctx context.Context, o HostOptions) ([]File, error) {
	organization, err := readCapped(o.Organization, maxOrganization)
	if err != nil {
		return nil, fmt.Errorf("host image: %w", err)
	}
	if _, err := attest.ParseOrganization(organization); err != nil {
		return nil, fmt.Errorf("host image: %s: %w", o.Organization, err)
	}
	options := b.initramfs(o)
	options.Organization = organization
	img, err := initramfs.Host(ctx, options)
	if err != nil {
		return nil, err
	}
	if !o.Lab {
		b.step("checking that no lab hook and no shell is inside")
		if err := checkRelease(&img.Manifest, img.Initrd, forbiddenHost()); err != nil {
			return nil, fmt.Errorf("host image: %w", err)
		}
	}
	manifest, err := img.Manifest.JSON()
	if err != nil {
		return nil, fmt.Errorf("host image: %w", err)
	}
	parts := uki.Parts{
		Stub: img.Stub, Kernel: img.Kernel, Initrd: img.Initrd, Uname: img.KernelVersion,
		Cmdline: hostCommandLine(o.Lab), OSRelease: osRelease("host domain", o.Version, o.Lab),
	}
	return b.finishHost(parts, imageName("host", o.Lab), o.Version, manifest)
}

// Tamper makes an image from that in the file from, which differs in one
// component, as an attacker who holds the signing key would: correctly signed,
// bootable, and not what was released. Its reference values say what a verifier
// will see, so that tests can name it; nobody should accept them.
func (b *Builder) Tamper(from string, c Component) ([]File, error) {
	image, err := readCapped(from, uki.MaxImage)
	if err != nil {
		return nil, fmt.Errorf("tampered image: %w; build it with: mkimage host", err)
	}
	parts, err := uki.Split(image)
	if err != nil {
		return nil, fmt.Errorf("tampered image: %s: %w", from, err)
	}
	if err := tamper(&parts, c); err != nil {
		return nil, err
	}
	return b.finishHost(parts, "tampered-"+string(c), "0", nil)
}

// Next makes the release after the image in the file from: the same parts
// under another version, without signed policies. For tests of updates.
func (b *Builder) Next(from, version string, lab bool) ([]File, error) {
	image, err := readCapped(from, uki.MaxImage)
	if err != nil {
		return nil, fmt.Errorf("next image: %w; build it with: mkimage host", err)
	}
	parts, err := uki.Split(image)
	if err != nil {
		return nil, fmt.Errorf("next image: %s: %w", from, err)
	}
	parts.Policy, parts.OSRelease = nil, osRelease("host domain", version, lab)
	return b.finishHost(parts, imageName("host", lab), version, nil)
}

// finishHost assembles, signs, predicts and writes a host image.
func (b *Builder) finishHost(parts uki.Parts, name, version string, manifest []byte) ([]File, error) {
	keys, err := b.LoadKeys()
	if err != nil {
		return nil, err
	}
	b.step("assembling and signing the host image")
	unsigned, err := uki.Build(parts)
	if err != nil {
		return nil, fmt.Errorf("host image: %w", err)
	}
	signed, err := uki.Sign(unsigned, keys.DB)
	if err != nil {
		return nil, fmt.Errorf("host image: %w", err)
	}
	b.step("computing the reference values")
	reference, err := uki.Predict(signed, keys.SecureBoot(), name, version)
	if err != nil {
		return nil, fmt.Errorf("host image: %w", err)
	}
	data, err := json.MarshalIndent(reference, "", "\t")
	if err != nil {
		return nil, fmt.Errorf("host image: %w", err)
	}
	files := []content{{HostImage, signed}, {HostUnsigned, unsigned}, {HostReference, append(data, '\n')}}
	if manifest != nil {
		files = append(files, content{HostManifest, manifest})
	}
	return b.write(files...)
}

// Work builds the disk of the Linux work domain that stands in for Windows: an
// ESP with a UKI that is not signed, and the same for a legacy BIOS (see
// attest.FirmwareBIOS). The work domain's firmware runs without
// Secure Boot; what is trusted is the host domain below it.
func (b *Builder) Work(ctx context.Context, lab, refresh bool) ([]File, error) {
	img, err := initramfs.Work(ctx, b.initramfs(HostOptions{Version: "0", Lab: lab, Refresh: refresh}))
	if err != nil {
		return nil, err
	}
	if !lab {
		b.step("checking that no lab hook is inside")
		if err := checkRelease(&img.Manifest, img.Initrd, forbiddenWork()); err != nil {
			return nil, fmt.Errorf("work image: %w", err)
		}
	}
	image, err := uki.Build(uki.Parts{
		Stub: img.Stub, Kernel: img.Kernel, Initrd: img.Initrd, Uname: img.KernelVersion,
		Cmdline: workCommandLine, OSRelease: osRelease("stand-in work domain", "0", lab),
	})
	if err != nil {
		return nil, fmt.Errorf("work image: %w", err)
	}
	manifest, err := img.Manifest.JSON()
	if err != nil {
		return nil, fmt.Errorf("work image: %w", err)
	}
	files, err := b.write(content{WorkManifest, manifest})
	if err != nil {
		return nil, err
	}
	b.step("writing the work domain's disk")
	name := filepath.Join(b.Out, WorkImage)
	bios := &disk.BIOS{Kernel: img.Kernel, Initrd: img.Initrd, Cmdline: workCommandLine}
	if err := disk.Create(name, disk.Layout{Boot: image, BIOS: bios, Small: true}); err != nil {
		return nil, err
	}
	return append(files, File{name, size(name)}), nil
}

// Disk writes the laptop's disk, with the host image of the output directory
// and the work domain's disk in the file work, and the firmware's variables.
func (b *Builder) Disk(work string) ([]File, error) {
	image, err := readCapped(filepath.Join(b.Out, HostImage), uki.MaxImage)
	if err != nil {
		return nil, fmt.Errorf("laptop disk: %w; build it with: mkimage host", err)
	}
	if _, err := os.Stat(work); err != nil {
		return nil, fmt.Errorf("laptop disk: %w; build it with: mkimage work", err)
	}
	keys, err := b.LoadKeys()
	if err != nil {
		return nil, err
	}
	blank, err := readCapped(BlankVars, 16<<20)
	if err != nil {
		return nil, fmt.Errorf("laptop disk: %w; install ovmf", err)
	}
	vars, err := keys.SecureBoot().Variables(blank)
	if err != nil {
		return nil, fmt.Errorf("laptop disk: %w", err)
	}
	b.step("writing the laptop's disk")
	name := filepath.Join(b.Out, LaptopDisk)
	if err := disk.Create(name, disk.Layout{Boot: image, State: true, Factory: work, Scratch: scratchSize}); err != nil {
		return nil, err
	}
	files, err := b.write(content{LaptopVars, vars})
	return append(files, File{name, size(name)}), err
}

// LoadKeys reads the Secure Boot keys and makes them on first use.
func (b *Builder) LoadKeys() (*uki.Keys, error) {
	if _, err := os.Stat(filepath.Join(b.Keys, "db.pem")); errors.Is(err, fs.ErrNotExist) {
		b.step("making Secure Boot keys in " + b.Keys)
	}
	return uki.LoadKeys(b.Keys, b.Now())
}

// Predict computes the reference values of an image file.
func (b *Builder) Predict(file string) (*attest.ReferenceValues, error) {
	image, err := readCapped(file, uki.MaxImage)
	if err != nil {
		return nil, fmt.Errorf("predict: %w", err)
	}
	trust, err := uki.LoadCertificates(b.Keys)
	if err != nil {
		return nil, err
	}
	return uki.Predict(image, trust, filepath.Base(file), "")
}
