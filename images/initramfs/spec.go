package initramfs

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"sekisho/attest"
	"sekisho/hostos/boot"
	"sekisho/hostos/disk"
)

// spec is a domain's root filesystem as data.
type spec struct {
	name     string
	init     string          // import path of the command that is PID 1, among commands
	commands []string        // import paths of all commands, ours and u-root's
	tags     []string        // build tags
	modules  []string        // kernel modules, without dependencies
	programs []string        // Debian's programs, to which their libraries are added
	firmware []string        // other files of Debian's
	files    map[string]node // everything else
}

// uroot is where u-root's commands lie.
const uroot = "github.com/u-root/u-root/cmds/core/"

func urootCommands(names string) []string {
	var list []string
	for _, n := range strings.Fields(names) {
		list = append(list, uroot+n)
	}
	return list
}

// tags of every busybox. goshsmall leaves the line editor out of u-root's
// shell, which here only runs commands that others hand to it.
func tags(lab bool) []string {
	if lab {
		return []string{"goshsmall", "lab"}
	}
	return []string{"goshsmall"}
}

// hostSpec is the host domain.
//
// A release image has our daemons and nothing else that can be called: nobody
// logs in, so a shell or a tool would only serve an intruder. The lab's image
// adds u-root commands to look around with; none of them opens a connection.
func hostSpec(o Options) spec {
	s := spec{
		name: "host",
		init: "sekisho/hostos/cmd/init",
		commands: []string{
			"sekisho/hostos/cmd/init",
			"sekisho/netd/cmd/netd",
			"sekisho/guestlink/cmd/linkd",
			"sekisho/attest/cmd/attestd",
			"sekisho/hostos/cmd/logind",
		},
		tags:     tags(o.Lab),
		modules:  o.Modules,
		programs: []string{"/usr/bin/qemu-system-x86_64", disk.Cryptsetup, disk.DMSetup, "/usr/sbin/wpa_supplicant"},
		// What a q35 machine with pflash, virtio-blk and vhost-vsock opens.
		// Option ROMs of network cards and VGA are left out: the work domain
		// has neither.
		firmware: []string{
			"/usr/share/OVMF/OVMF_CODE_4M.fd",
			"/usr/share/OVMF/OVMF_VARS_4M.fd",
			"/usr/share/seabios/bios-256k.bin",
			"/usr/share/qemu/kvmvapic.bin",
			"/usr/share/qemu/linuxboot_dma.bin",
			// What radios may send in which country; cfg80211 checks its signature.
			regulatory + "-debian", regulatory + ".p7s-debian",
		},
		files: baseFiles(),
	}
	passwd, group := accounts()
	s.files["/etc/passwd"], s.files["/etc/group"] = textFile(passwd), textFile(group)
	s.files["/etc/sekisho/organization.json"] = node{mode: 0o644, data: o.Organization}
	for _, suffix := range []string{"", ".p7s"} {
		s.files[regulatory+suffix] = symlink(path.Base(regulatory) + suffix + "-debian")
	}
	if org, err := attest.ParseOrganization(o.Organization); err == nil && org.Logon != nil {
		s.addLogon()
	}
	if o.Lab {
		// The air between simulated radios, with an access point in it.
		s.modules = append(slices.Clone(s.modules), "mac80211_hwsim", "bridge")
		s.programs = append(s.programs, "/usr/sbin/hostapd")
		s.commands = append(s.commands, "sekisho/images/lab/cmd/labhook")
		s.commands = append(s.commands, urootCommands("cat df dmesg echo find free gosh grep head hexdump id ip kill ls lsmod mount pci ps sleep tail uname")...)
		s.addShell()
	}
	return s
}

// regulatory is the kernel's name of the wireless regulatory database; Debian
// has a maintainer script choose between signatures.
const regulatory = "/usr/lib/firmware/regulatory.db"

// addLogon adds what logind starts, and the card reader that QEMU loads.
func (s *spec) addLogon() {
	s.programs = append(slices.Clone(s.programs), "/usr/bin/dbus-daemon", "/usr/libexec/fprintd",
		"/usr/lib/x86_64-linux-gnu/qemu/hw-usb-smartcard.so")
}

// accounts returns the passwd(5) and group(5) files of the host domain.
func accounts() (passwd, group string) {
	passwd, group = "root:x:0:0:root:/:/nologin\n", "root:x:0:\n"
	users := boot.Users()
	for _, u := range users {
		var members []string
		for _, m := range users {
			if slices.Contains(m.Groups, u.Name) {
				members = append(members, m.Name)
			}
		}
		passwd += fmt.Sprintf("%s:x:%d:%d::/:/nologin\n", u.Name, u.ID, u.ID)
		group += fmt.Sprintf("%s:x:%d:%s\n", u.Name, u.ID, strings.Join(members, ","))
	}
	return passwd, group
}

// workSpec is the Linux work domain that stands in for Windows. It has the
// tools that somebody at a desk would use, and no network driver but tun.
func workSpec(o Options) spec {
	s := spec{
		name: "work",
		init: "sekisho/images/work/cmd/workinit",
		commands: append([]string{
			"sekisho/images/work/cmd/workinit",
			"sekisho/images/work/cmd/fetch",
			"sekisho/images/work/cmd/poweroff",
			"sekisho/guestlink/cmd/guestagent",
		}, urootCommands("cat date df dmesg echo find free gosh grep head hexdump id ip kill ls lsmod mkdir mount ping ps rm sleep tail time uname wc")...),
		tags: tags(o.Lab),
		modules: []string{
			"virtio_pci", "virtio_blk", // its disk
			"vmw_vsock_virtio_transport", // its one way out,
			"virtio_console",             // or a port instead
			"tun",                        // the network interface that guestagent makes
			"button", "evdev",            // the power button
		},
		files: baseFiles(),
	}
	s.files["/etc/passwd"] = textFile("root:x:0:0:root:/:/bbin/gosh\n")
	s.files["/etc/group"] = textFile("root:x:0:\n")
	s.addShell()
	if o.Lab {
		s.commands = append(s.commands, "sekisho/images/lab/cmd/labguest")
		if o.Card {
			s.addCardClients()
		}
	}
	return s
}

// addCardClients adds, in the lab, what a desk needs that signs in with a smart
// card: the driver of the card reader, pcscd, OpenSC, and MIT Kerberos with
// PKINIT.
func (s *spec) addCardClients() {
	const libraries = "/usr/lib/x86_64-linux-gnu/"
	const bundle = "/usr/lib/pcsc/drivers/ifd-ccid.bundle/Contents/"
	s.commands = append(s.commands, "sekisho/images/lab/cmd/cardcheck")
	s.modules = append(s.modules, "xhci_pci")
	s.programs = append(s.programs, "/usr/sbin/pcscd", "/usr/bin/opensc-tool", "/usr/bin/pkcs11-tool", "/usr/bin/pkcs15-tool", "/usr/bin/kinit.mit", "/usr/bin/klist.mit",
		libraries+"krb5/plugins/preauth/pkinit.so", bundle+"Linux/libccid.so", libraries+"opensc-pkcs11.so", libraries+"libpcsclite.so.1", libraries+"libpcsclite_real.so.1",
		libraries+"libgcc_s.so.1") // opened by pthread_exit
	s.firmware = append(s.firmware, bundle+"Info.plist")
	// QEMU's reader says that it has a PIN pad, and has none.
	s.files["/etc/opensc/opensc.conf"] = textFile("app default {\n reader_driver pcsc { enable_pinpad = false; }\n framework pkcs15 { use_file_caching = no; }\n}\n")
}

// addShell gives the shell the name by which programs call it.
func (s *spec) addShell() {
	s.files["/bin"] = symlink("bbin")
	s.files["/bbin/sh"] = symlink("gosh")
}

// baseFiles is what every Linux needs before its init has mounted anything.
// The links are Debian's merged /usr.
func baseFiles() map[string]node {
	dir := func(perm fs.FileMode) node { return node{mode: fs.ModeDir | perm} }
	char := func(perm fs.FileMode, major, minor uint64) node {
		return node{mode: fs.ModeDevice | fs.ModeCharDevice | perm, major: major, minor: minor}
	}
	return map[string]node{
		"/dev": dir(0o755), "/proc": dir(0o555), "/sys": dir(0o555), "/run": dir(0o755),
		"/tmp": dir(0o777 | fs.ModeSticky), "/etc": dir(0o755), "/usr": dir(0o755), "/usr/lib": dir(0o755), "/usr/lib64": dir(0o755),
		"/lib": symlink("usr/lib"), "/lib64": symlink("usr/lib64"),
		// Documentation/admin-guide/devices.txt; the kernel opens /dev/console
		// for init before devtmpfs is there.
		"/dev/console": char(0o600, 5, 1),
		"/dev/null":    char(0o666, 1, 3),
	}
}

func textFile(s string) node     { return node{mode: 0o644, data: []byte(s)} }
func symlink(target string) node { return node{mode: fs.ModeSymlink | 0o777, link: target} }

func sum(b []byte) string {
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:])
}
