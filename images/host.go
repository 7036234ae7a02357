package images

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"github.com/klauspost/compress/zstd"

	"sekisho/images/initramfs"
	"sekisho/images/uki"
)

// hostCommandLine is the measured command line of the host domain; docs/images.md
// says why for each word.
func hostCommandLine(lab bool) string {
	words := []string{
		"rdinit=/init", "quiet", "lockdown=integrity", "module.sig_enforce=1",
		"init_on_alloc=1", "slab_nomerge", "vsyscall=none", "randomize_kstack_offset=on",
		"iommu.passthrough=0", "iommu.strict=1", "intel_iommu=on",
	}
	if lab {
		// Serial console; a panic ends the virtual machine.
		return strings.Join(append(words, "console=ttyS0", "panic=-1"), " ")
	}
	return strings.Join(append(words, "console=tty0", "panic=10"), " ")
}

// workCommandLine is that of the stand-in work domain.
const workCommandLine = "rdinit=/init quiet console=ttyS0 panic=-1"

func imageName(name string, lab bool) string {
	if lab {
		return name + "-lab"
	}
	return name
}

// osRelease is the os-release(5) of an image. VARIANT_ID tells a lab image from
// a release for everybody who reads it.
func osRelease(what, version string, lab bool) string {
	variant := "release"
	if lab {
		variant = "lab"
	}
	return fmt.Sprintf("ID=sekisho\nNAME=Sekisho\nPRETTY_NAME=\"Sekisho %s %s\"\nVERSION_ID=%s\nVARIANT_ID=%s\n", what, version, version, variant)
}

// ValidVersion reports whether v can be an os-release VERSION_ID.
func ValidVersion(v string) bool {
	return v != "" && len(v) <= 64 && strings.Trim(v, "abcdefghijklmnopqrstuvwxyz0123456789._-") == ""
}

// Component is a part of the host image that Tamper can change.
type Component string

// The components, as the verifier's reasons name them.
const (
	Cmdline   Component = "cmdline"
	Kernel    Component = "kernel"
	Initramfs Component = "initramfs"
)

// Components lists what Tamper accepts.
func Components() []Component { return []Component{Cmdline, Kernel, Initramfs} }

// tamper changes one component so that the image still boots.
func tamper(parts *uki.Parts, c Component) error {
	switch c {
	case Cmdline:
		parts.Cmdline += " sekisho.tampered" // a word that nobody knows
	case Kernel:
		// Reserved words of the MS-DOS header (Microsoft, "PE Format", e_res2
		// at offset 40): loaded and measured, never read. Debian's own
		// signature on the kernel breaks by it, but nobody asks for that one:
		// ours on the whole image stands for it.
		parts.Kernel = bytes.Clone(parts.Kernel)
		if len(parts.Kernel) < 48 || strings.Trim(string(parts.Kernel[40:48]), "\x00") != "" {
			return errors.New("tampered image: the kernel's reserved words are in use")
		}
		copy(parts.Kernel[40:], "tampered")
	case Initramfs:
		// The kernel unpacks archives one after another (kernel
		// documentation, buffer-format): a second one adds a file.
		parts.Initrd = append(bytes.Clone(parts.Initrd), make([]byte, -len(parts.Initrd)&3)...)
		parts.Initrd = append(parts.Initrd, uki.Archive("tampered", "file", []byte("tampered\n"))...)
	default:
		return fmt.Errorf("tampered image: component %q: want one of %v", c, Components())
	}
	return nil
}

// forbiddenWork are names of programs that a release of the stand-in work
// domain must not hold: the lab's hooks, and what answers on the network. A
// shell is for whoever sits at the desk.
func forbiddenWork() []string {
	return []string{"labhook", "labguest", "cardcheck", "sshd", "telnetd", "dropbear", "gdbserver"}
}

// forbiddenHost are those of the host domain, which nobody sits at: also
// whatever would answer a person at a console with a shell.
func forbiddenHost() []string {
	return append(forbiddenWork(),
		"sh", "ash", "bash", "dash", "elvish", "gosh", "rush", "busybox",
		"getty", "agetty", "login", "sulogin", "su", "sudo",
		"strace",
	)
}

// hookMark is a name in the code of labhook and labguest alone: the lab's
// virtio port.
const hookMark = "org.sekisho.lab"

// maxInitrd bounds an unpacked initramfs in bytes.
const maxInitrd = 2 << 30

// checkRelease refuses an image with a program named in forbidden or with the
// code of a lab hook. It looks at names,
// and at the bytes of the archive, because all our programs are in one
// executable whose links could be left out.
func checkRelease(m *initramfs.Manifest, initrd []byte, forbidden []string) error {
	var found []string
	for _, f := range m.Files {
		for _, name := range []string{path.Base(f.Path), path.Base(f.Link)} {
			if slices.Contains(forbidden, name) {
				found = append(found, f.Path)
				break
			}
		}
	}
	if len(found) > 0 {
		return fmt.Errorf("a release must not contain %v; build with -lab for the virtual lab", found)
	}
	z, err := zstd.NewReader(bytes.NewReader(initrd), zstd.WithDecoderMaxMemory(1<<30))
	if err != nil {
		return fmt.Errorf("initramfs: %w", err)
	}
	defer z.Close()
	has, err := contains(io.LimitReader(z, maxInitrd), hookMark)
	if err != nil {
		return fmt.Errorf("initramfs: %w", err)
	}
	if has {
		return errors.New("a release must not contain the code of a lab hook (it names " + hookMark + ")")
	}
	return nil
}

// contains reports whether mark occurs in what r yields.
func contains(r io.Reader, mark string) (bool, error) {
	buf, kept := make([]byte, 1<<20), 0
	for {
		n, err := io.ReadFull(r, buf[kept:])
		if bytes.Contains(buf[:kept+n], []byte(mark)) {
			return true, nil
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		// A mark may lie across two pieces.
		kept = copy(buf, buf[len(buf)-len(mark):])
	}
}
