package boot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

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
