package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"sekisho/guestlink"
	"sekisho/guestlink/packet"
)

// wine runs guestagent.exe, built with the loopback transport, in a prefix of
// its own.
type wine struct {
	t   *testing.T
	exe string
	env []string
}

func newWine(t *testing.T) wine {
	t.Helper()
	if os.Getenv("SEKISHO_TEST") != "all" {
		t.Skip("needs wine: run with SEKISHO_TEST=all")
	}
	if _, err := exec.LookPath("wine"); err != nil {
		t.Fatalf("%v: apt-get install wine wine64", err)
	}
	dir := t.TempDir()
	w := wine{t: t, exe: filepath.Join(dir, "guestagent.exe")}
	build := exec.Command("go", "build", "-trimpath", "-tags", "loopback", "-o", w.exe, ".")
	build.Env = append(os.Environ(), "GOOS=windows", "GOARCH=amd64", "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	prefix := filepath.Join(dir, "prefix")
	w.env = append(os.Environ(), "WINEPREFIX="+prefix, "WINEDEBUG=-all", "DISPLAY=", "HOME="+dir)
	if err := os.Mkdir(prefix, 0o700); err != nil {
		t.Fatal(err)
	}
	// One program stays from the first, so that there is one session with one
	// service manager.
	session := exec.Command("wine", "cmd")
	session.Env = w.env
	stay, err := session.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := session.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stay.Close()
		c := exec.Command("/usr/lib/wine/wineserver", "-k", "-w") // of this prefix only
		c.Env = w.env
		c.Run()
		session.Wait()
	})
	// The first program makes the prefix, and others fail until it is there.
	ready := func() error {
		c := exec.Command("wine", "cmd", "/c", "exit")
		c.Env = w.env
		return c.Run()
	}
	for limit := time.After(60 * time.Second); ready() != nil; {
		select {
		case <-limit:
			t.Fatal("wine is not ready after 60 s")
		case <-time.After(500 * time.Millisecond):
		}
	}
	// Go's runtime wants ProcessPrng, which wine has only since 9.x.
	system := filepath.Join(prefix, "drive_c", "windows", "system32", "bcryptprimitives.dll")
	if _, err := os.Stat(system); err != nil {
		if err := os.WriteFile(system, forwarder("bcryptprimitives.dll", "ProcessPrng", "advapi32.SystemFunction036"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return w
}

func (w wine) command(ctx context.Context, args ...string) *exec.Cmd {
	c := exec.CommandContext(ctx, "wine", append([]string{w.exe}, args...)...)
	c.Env = w.env
	return c
}

// run runs guestagent.exe to its end and returns what it wrote.
func (w wine) run(args ...string) (out string, code int) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 90*time.Second)
	defer cancel()
	c := w.command(ctx, args...)
	c.WaitDelay = time.Second // the service manager may keep the pipe
	b, err := c.CombinedOutput()
	if _, exit := err.(*exec.ExitError); err != nil && !exit {
		w.t.Fatalf("guestagent.exe %q: %v", args, err)
	} else if exit {
		code = err.(*exec.ExitError).ExitCode()
	}
	w.t.Logf("guestagent.exe %s: %d\n%s", strings.Join(args, " "), code, b)
	return string(b), code
}

// host is a host end on TCP whose device is in memory.
type host struct {
	pump    *packet.Pump
	address string
	in, out chan []byte
	said    chan guestlink.Status
	closed  chan struct{}
}

func (h *host) Read(b []byte) (int, error) {
	select {
	case p := <-h.in:
		return copy(b, p), nil
	case <-h.closed:
		return 0, os.ErrClosed
	}
}

func (h *host) Write(b []byte) (int, error) { h.out <- bytes.Clone(b); return len(b), nil }

func (h *host) Close() error { return nil }

func newHost(t *testing.T) *host {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h := &host{address: l.Addr().String(), in: make(chan []byte), out: make(chan []byte, 64),
		said: make(chan guestlink.Status, 64), closed: make(chan struct{})}
	h.pump = packet.NewHost(h, func(s guestlink.Status) { h.said <- s })
	if err := h.pump.SetConfig(guestlink.Config{Address: netip.MustParsePrefix("10.80.0.2/32"), MTU: 1400}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { h.pump.Run(ctx) })
	wg.Go(func() { h.pump.Listen(ctx, l, func(bool, error) {}) })
	t.Cleanup(func() { cancel(); close(h.closed); wg.Wait() })
	return h
}

// echo sends a packet to the guest, which gives it back.
func (h *host) echo(t *testing.T) {
	t.Helper()
	for wait := time.After(60 * time.Second); ; {
		select {
		case s := <-h.said:
			if s.State != guestlink.StateConfigured {
				continue
			}
		case <-wait:
			t.Fatal("the guest is not configured after 60 s")
		}
		break
	}
	p := make([]byte, 1400)
	p[0], p[8], p[9] = 0x45, 64, 17
	binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	copy(p[12:], []byte{10, 1, 0, 1, 10, 80, 0, 2})
	h.in <- p
	select {
	case got := <-h.out:
		copy(p[12:], []byte{10, 80, 0, 2, 10, 1, 0, 1})
		if !bytes.Equal(got, p) {
			t.Errorf("%d bytes come back, and others", len(got))
		}
	case <-time.After(30 * time.Second):
		t.Fatalf("no packet comes back: %+v", h.pump.Counters())
	}
}

// TestWine runs the console program against a host end, and then the service
// through its life.
func TestWine(t *testing.T) {
	w := newWine(t)
	h := newHost(t)
	flags := []string{"-device", "echo", "-transport", "tcp:" + h.address}
	if out, code := w.run("-h"); code != 0 || !strings.Contains(out, "install") {
		t.Errorf("-h: %d", code)
	}
	if out, code := w.run("-transport", "carrier-pigeon"); code != 1 || !strings.Contains(out, "want auto, vsock or serial") {
		t.Errorf("unknown transport: %d", code)
	}
	if _, code := w.run("restart"); code != 2 {
		t.Errorf("unknown command: %d", code)
	}
	if out, code := w.run("-device", "tap"); code != 1 || !strings.Contains(out, "tap-windows6") {
		t.Errorf("no tap driver: %d", code)
	}
	if out, code := w.run("-device", "wintun"); code != 1 || !strings.Contains(out, "wintun.dll") {
		t.Errorf("no wintun.dll: %d", code)
	}

	t.Run("console", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		c := w.command(ctx, flags...)
		var log bytes.Buffer
		c.Stdout, c.Stderr = io.Discard, &log
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		h.echo(t)
		if agreed, _, up := h.pump.Link(); !up || agreed.Version != 2 || !agreed.Capabilities.Has(guestlink.CapTime|guestlink.CapPower|guestlink.CapProbe) {
			t.Errorf("in force: %+v, up %v", agreed, up)
		}
		cancel()
		c.Wait()
		t.Logf("%s", &log)
	})
	t.Run("service", func(t *testing.T) {
		if out, code := w.run("status"); code != 0 || !strings.Contains(out, "absent") {
			t.Fatal("there before it is installed")
		}
		if _, code := w.run(append([]string{"install"}, flags...)...); code != 0 {
			t.Fatal("install")
		}
		if out, _ := w.run("status", "-json"); !strings.Contains(out, `"stopped"`) || !strings.Contains(out, `"automatic"`) || !strings.Contains(out, h.address) {
			t.Error("installed: want stopped, automatic, with its flags")
		}
		if _, code := w.run("start"); code != 0 {
			t.Fatal("start")
		}
		h.echo(t)
		if out, _ := w.run("status"); !strings.Contains(out, "running") {
			t.Error("not running")
		}
		if _, code := w.run("stop"); code != 0 {
			t.Error("stop")
		}
		if _, code := w.run("uninstall"); code != 0 {
			t.Error("uninstall")
		}
		if out, _ := w.run("status"); !strings.Contains(out, "absent") {
			t.Error("still there after it was uninstalled")
		}
	})
}

// forwarder builds a 64-bit DLL that exports one name of another DLL under a
// name of its own: headers and one section with the export directory
// (Microsoft, PE format).
func forwarder(dll, name, target string) []byte {
	const rva, raw = 0x1000, 0x200
	le := binary.LittleEndian
	b := make([]byte, 2*raw)
	copy(b, "MZ")
	le.PutUint32(b[0x3c:], 0x40)
	copy(b[0x40:], "PE\x00\x00")
	coff := b[0x44:]
	le.PutUint16(coff, 0x8664) // AMD64
	le.PutUint16(coff[2:], 1)  // sections
	le.PutUint16(coff[16:], 240)
	le.PutUint16(coff[18:], 0x2022) // executable, large addresses, DLL
	opt := coff[20:]
	le.PutUint16(opt, 0x20b)            // PE32+
	le.PutUint64(opt[24:], 0x180000000) // image base
	le.PutUint32(opt[32:], rva)         // section alignment
	le.PutUint32(opt[36:], raw)         // file alignment
	le.PutUint16(opt[40:], 6)           // operating system
	le.PutUint16(opt[48:], 6)           // subsystem
	le.PutUint32(opt[56:], 2*rva)       // size of the image
	le.PutUint32(opt[60:], raw)         // size of the headers
	le.PutUint16(opt[68:], 3)           // console
	le.PutUint32(opt[108:], 16)         // directories
	le.PutUint32(opt[112:], rva)        // export directory
	le.PutUint32(opt[116:], raw)        // an address in it is a forwarder
	section := opt[240:]
	copy(section, ".rdata")
	le.PutUint32(section[8:], raw)
	le.PutUint32(section[12:], rva)
	le.PutUint32(section[16:], raw)
	le.PutUint32(section[20:], raw)
	le.PutUint32(section[36:], 0x40000040) // data, readable
	dir := b[raw:]
	const functions, names, ordinals, text = 40, 44, 48, 52
	at := text
	put := func(s string) uint32 {
		defer func() { at += len(s) + 1 }()
		copy(dir[at:], s)
		return rva + uint32(at)
	}
	le.PutUint32(dir[12:], put(dll))
	le.PutUint32(dir[16:], 1) // first ordinal
	le.PutUint32(dir[20:], 1)
	le.PutUint32(dir[24:], 1)
	le.PutUint32(dir[28:], rva+functions)
	le.PutUint32(dir[32:], rva+names)
	le.PutUint32(dir[36:], rva+ordinals)
	le.PutUint32(dir[functions:], put(target))
	le.PutUint32(dir[names:], put(name))
	return b
}
