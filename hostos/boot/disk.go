package boot

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"sekisho/attest"
	"sekisho/attest/gate"
	"sekisho/hostos/disk"
	"sekisho/hostos/store"
)

// policyFile is where the stub leaves the image's signed policies
// (systemd-stub(7), .pcrsig).
const policyFile = "/.extra/tpm2-pcr-signature.json"

// maxToolOutput bounds what is kept of a program's output in bytes.
const maxToolOutput = 4 << 10

// maxTyped bounds a line typed at the console in bytes.
const maxTyped = 256

func readOrganization() (*attest.Organization, error) {
	b, err := os.ReadFile(attest.OrganizationFile)
	if err != nil {
		return nil, err
	}
	return attest.ParseOrganization(b)
}

// newDisk returns the work domain's disk. An organisation that cannot be read
// makes it ephemeral, and startWork says why there is no work domain.
func (h *host) newDisk() *disk.Disk {
	org, err := readOrganization()
	return disk.New(disk.Config{
		Partition: byPartlabel + "/" + WorkPart,
		Factory:   byPartlabel + "/" + FactoryPart,
		Scratch:   byPartlabel + "/" + ScratchPart,
		Record:    store.Record{Path: byPartlabel + "/" + HostPart, Place: store.VolumePlace},
		Release:   policyFile,
		Mapper:    "/dev/mapper",
		Ephemeral: err != nil || org.WorkDomain.Disk != attest.DiskPersistent,
		Keys:      gate.NewClient(AttestdSocket),
		Run:       h.tool,
		Say:       func(format string, a ...any) { h.console.line("init", format, a...) },
		Now:       time.Now,
	})
}

// openDisk opens the work domain's disk and hands the device to vmm.
func (h *host) openDisk(ctx context.Context) (string, error) {
	device, err := h.disk.Open(ctx)
	if err != nil {
		return "", err
	}
	return device, node{path: device, user: "vmm", mode: 0o600}.give()
}

// recoverDisk opens the disk by its recovery key and starts the work domain.
func (h *host) recoverDisk(request, ctx context.Context, wg *sync.WaitGroup, typed string) error {
	if _, err := h.disk.Recover(request, typed); err != nil {
		return err
	}
	h.console.line("init", "work disk opened by its recovery key / 回復キーで業務ディスクを開きました")
	until, cancel := h.untilOff(ctx)
	defer cancel()
	h.tryWork(until, ctx, wg)
	return nil
}

// promptRecovery lets whoever sits at the console type the recovery key, until
// one opens the disk or the machine goes off.
func (h *host) promptRecovery(ctx context.Context, wg *sync.WaitGroup) {
	// Not blocking, so that closing it ends a read.
	f, err := os.OpenFile("/dev/console", os.O_RDONLY|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
	if err != nil {
		return // nobody sits there
	}
	until, cancel := h.untilOff(ctx)
	defer cancel()
	defer context.AfterFunc(until, func() { f.Close() })()
	h.askRecovery(f, func(typed string) error { return h.recoverDisk(until, ctx, wg, typed) })
	f.Close()
}

// askRecovery passes the lines of in on until one is taken.
func (h *host) askRecovery(in io.Reader, try func(string) error) {
	h.console.line("init", "type the recovery key and press Enter / 回復キーを入力し、Enter を押してください")
	lines, tail := bufio.NewReaderSize(in, maxTyped), false
	for {
		line, more, err := lines.ReadLine()
		if err != nil {
			return
		}
		whole := !more && !tail
		typed := strings.TrimSpace(string(line))
		if tail = more; !whole || typed == "" {
			continue // too long for a recovery key
		}
		err = try(typed)
		if err == nil {
			return
		}
		var locked *disk.Fault
		if errors.As(err, &locked) {
			h.console.line("init", "%s", locked.Words())
		} else {
			h.console.line("init", "recovery key: %v", err)
		}
	}
}

// wipeDisk destroys the key of the work domain's disk and switches the laptop
// off, with which the key leaves the kernel too.
func (h *host) wipeDisk() error {
	if err := h.disk.Wipe(); err != nil {
		return err
	}
	h.console.line("init", "the key of the work disk is destroyed; switching off / 業務ディスクの鍵を消去しました。電源を切ります")
	h.powerOff()
	return nil
}

// tool runs a program to its end, with stdin over a pipe.
func (h *host) tool(ctx context.Context, stdin []byte, argv ...string) error {
	in, feed, err := os.Pipe()
	if err != nil {
		return err
	}
	defer in.Close()
	out, said, err := os.Pipe()
	if err != nil {
		return errors.Join(err, feed.Close())
	}
	defer out.Close()
	pid, exited, err := h.children.start(argv[0], argv, &syscall.ProcAttr{
		Dir: "/",
		// No udev here: libdevmapper makes the nodes itself.
		Env:   []string{"PATH=/usr/sbin:/usr/bin", "HOME=/", "DM_DISABLE_UDEV=1"},
		Files: []uintptr{in.Fd(), said.Fd(), said.Fd()}, Sys: &syscall.SysProcAttr{Setsid: true},
	}, "")
	if err = errors.Join(err, said.Close()); err != nil {
		return errors.Join(err, feed.Close())
	}
	var text bytes.Buffer
	var wg sync.WaitGroup
	wg.Go(func() { // ends with the program
		_, _ = io.Copy(&text, io.LimitReader(out, maxToolOutput))
		_, _ = io.Copy(io.Discard, out)
	})
	wg.Go(func() {
		_, _ = feed.Write(stdin) // a program that ends early says why itself
		feed.Close()
	})
	defer wg.Wait()
	select {
	case ws := <-exited:
		if ws.ExitStatus() == 0 {
			return nil
		}
		in.Close() // so that a pipe that nobody reads frees the writer
		wg.Wait()
		return fmt.Errorf("%s %s: %s: %s", argv[0], argv[1], exitText(ws), bytes.TrimSpace(text.Bytes()))
	case <-ctx.Done():
		h.children.signal(pid, syscall.SIGKILL)
		<-exited
		in.Close()
		return ctx.Err()
	}
}
