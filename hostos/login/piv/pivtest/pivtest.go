// Package pivtest puts a card into a real pcscd for tests, by vsmartcard's
// virtual reader.
package pivtest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Card is the card in the reader.
type Card interface {
	Reset()
	Transmit(ctx context.Context, command []byte) []byte
}

// Reader is a real pcscd whose one reader is vsmartcard's vpcd, with a card in
// it.
type Reader struct {
	Dir string   // working directory of its clients
	Env []string // their environment

	t *testing.T
}

// Need skips t unless it runs as root with SEKISHO_TEST=all; then the programs
// must be there.
func Need(t *testing.T, programs ...string) {
	t.Helper()
	if os.Geteuid() != 0 || os.Getenv("SEKISHO_TEST") != "all" {
		t.Skip("starts a pcscd of its own: runs only as root with SEKISHO_TEST=all")
	}
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Fatal(err)
		}
	}
}

const vpcdDriver = "/usr/lib/pcsc/drivers/serial/libifdvpcd.so"

// Start starts pcscd in a mount namespace with a /run/pcscd of its own.
func Start(t *testing.T, card Card, atr []byte) *Reader {
	t.Helper()
	dir := t.TempDir()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := l.Addr().(*net.TCPAddr).Port
	l.Close() // vpcd opens it
	conf := fmt.Sprintf("FRIENDLYNAME \"Virtual\"\nDEVICENAME /dev/null:0x%X\nLIBPATH %s\nCHANNELID 0x%X\n", port, vpcdDriver, port)
	if err := os.WriteFile(filepath.Join(dir, "reader.conf"), []byte(conf), 0o644); err != nil {
		t.Fatal(err)
	}
	// The emulated reader of the work domain says that it has a PIN pad and
	// has none; the same configuration holds for both.
	opensc := "app default {\n reader_driver pcsc { enable_pinpad = false; }\n framework pkcs15 { use_file_caching = no; }\n}\n"
	if err := os.WriteFile(filepath.Join(dir, "opensc.conf"), []byte(opensc), 0o644); err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(filepath.Join(dir, "pcscd.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command("unshare", "--mount", "sh", "-c",
		"mkdir -p /run/pcscd && mount -t tmpfs tmpfs /run/pcscd && exec pcscd --foreground --config "+filepath.Join(dir, "reader.conf"))
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	sock := fmt.Sprintf("/proc/%d/root/run/pcscd/pcscd.comm", cmd.Process.Pid)
	var conn net.Conn
	deadline := time.Now().Add(30 * time.Second)
	for ; ; <-time.After(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			out, _ := os.ReadFile(log.Name())
			t.Fatalf("pcscd with vpcd is not there: %s", out)
		}
		if conn == nil {
			conn, _ = net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		}
		if _, err := os.Stat(sock); err == nil && conn != nil {
			break
		}
	}
	done := make(chan error, 1)
	go func() { done <- serve(t.Context(), conn, card, atr) }()
	t.Cleanup(func() {
		conn.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	r := &Reader{t: t, Dir: dir, Env: append(os.Environ(), "PCSCLITE_CSOCK_NAME="+sock, "OPENSC_CONF="+filepath.Join(dir, "opensc.conf"))}
	r.awaitCard()
	return r
}

// serve is vpcd's protocol: two bytes of length, then one byte of control
// (0 off, 1 on, 2 reset, 4 answer to reset) or a command.
func serve(ctx context.Context, conn net.Conn, card Card, atr []byte) error {
	for {
		var n [2]byte
		if _, err := io.ReadFull(conn, n[:]); err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) || errors.Is(err, io.ErrUnexpectedEOF) || ctx.Err() != nil {
				return nil
			}
			return err
		}
		m := make([]byte, binary.BigEndian.Uint16(n[:]))
		if _, err := io.ReadFull(conn, m); err != nil {
			return err
		}
		var answer []byte
		switch {
		case len(m) == 1 && m[0] == 4:
			answer = atr
		case len(m) == 1:
			card.Reset()
			continue
		default:
			answer = card.Transmit(ctx, m)
		}
		if _, err := conn.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(answer))), answer...)); err != nil {
			return err
		}
	}
}

// Run runs a program against the reader.
func (r *Reader) Run(program string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(r.t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env, cmd.Dir = r.Env, r.Dir
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// Must is Run of a program that has to succeed.
func (r *Reader) Must(program string, args ...string) string {
	r.t.Helper()
	out, err := r.Run(program, args...)
	if err != nil {
		r.t.Fatalf("%s %s: %v\n%s", program, strings.Join(args, " "), err, out)
	}
	return out
}

// awaitCard waits until pcscd has seen the card.
func (r *Reader) awaitCard() {
	r.t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		out, err := r.Run("opensc-tool", "--list-readers")
		if err == nil && strings.Contains(out, "Yes") {
			return
		}
		if time.Now().After(deadline) {
			r.t.Fatalf("no card in the reader: %v\n%s", err, out)
		}
		<-time.After(50 * time.Millisecond)
	}
}
