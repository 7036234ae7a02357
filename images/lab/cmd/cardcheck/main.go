//go:build lab

// cardcheck is PID 1 of a work domain that has nothing but a card reader: it
// starts pcscd, uses the card with OpenSC, prints what these say and switches
// off. It exists in lab images only.
//
// Synopsis:
//
//	cardcheck         as PID 1
//	cardcheck pcscd   waits for the card reader and becomes pcscd
//
// Its lines begin with "card:"; "card: remove" asks whoever reads them to take
// the card out.
package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/u-root/u-root/pkg/kmodule"
	"golang.org/x/sys/unix"

	"sekisho/images/work"
)

// limit bounds each wait; the machine that runs this may be an emulated one.
const limit = 2 * time.Minute

var (
	pcscd       = []string{"/usr/sbin/pcscd", "--foreground", "--disable-polkit"}
	environment = []string{"PATH=/usr/bin", "HOME=/"}
)

func main() {
	if len(os.Args) == 2 && os.Args[1] == "pcscd" {
		err := reader()
		if err == nil {
			err = unix.Exec(pcscd[0], pcscd, environment)
		}
		fmt.Fprintln(os.Stderr, "cardcheck:", err)
		os.Exit(1)
	}
	if err := check(); err != nil {
		fmt.Println("card: failed:", err)
	}
	fmt.Println("card: end")
	if err := work.PowerOff(); err != nil {
		fmt.Println("card:", err)
	}
}

func check() error {
	if err := work.Mount(); err != nil {
		return err
	}
	if err := reader(); err != nil {
		return err
	}
	if err := command(pcscd[0], pcscd[1:]...).Start(); err != nil {
		return err
	}
	if err := await("Yes"); err != nil {
		return err
	}
	if err := os.WriteFile("/tmp/digest", make([]byte, 32), 0o600); err != nil {
		return err
	}
	pkcs11 := func(args ...string) {
		run("/usr/bin/pkcs11-tool", append([]string{"--login"}, args...)...)
	}
	run("/usr/bin/opensc-tool", "--name")
	pkcs11("--pin", "123456", "--sign", "--id", "01", "--mechanism", "ECDSA", "--input-file", "/tmp/digest", "--output-file", "/tmp/signature")
	pkcs11("--pin", "999999", "--list-objects")
	pkcs11("--pin", "123456", "--test")
	fmt.Println("card: remove")
	return await("No ")
}

// reader waits for the card reader: there is no udev to tell pcscd of one that
// comes later.
func reader() error {
	if err := kmodule.Probe("xhci_pci", ""); err != nil {
		return err
	}
	for end := time.Now().Add(limit); !readerThere(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			return fmt.Errorf("no card reader on USB in %v", limit)
		}
	}
	return nil
}

// readerThere reports whether the kernel has set up a USB interface of class
// smart card (CCID 1.1, section 4.3); a root hub has interfaces too.
func readerThere() bool {
	classes, _ := filepath.Glob("/sys/bus/usb/devices/*/bInterfaceClass")
	return slices.ContainsFunc(classes, func(file string) bool {
		class, _ := os.ReadFile(file)
		return strings.TrimSpace(string(class)) == "0b"
	})
}

func command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(name, args...)
	cmd.Env = environment
	return cmd
}

// run prints what a program says and how it ended.
func run(name string, args ...string) string {
	out, err := command(name, args...).CombinedOutput()
	fmt.Printf("card: %s %s: %v\n%s\n", name, strings.Join(args, " "), err, out)
	return string(out)
}

// await asks for the readers until their list holds want.
func await(want string) error {
	var out []byte
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		out, _ = command("/usr/bin/opensc-tool", "--list-readers").CombinedOutput()
		if strings.Contains(string(out), want) {
			return nil
		}
	}
	return fmt.Errorf("no reader says %q in %v, but: %s", want, limit, out)
}
