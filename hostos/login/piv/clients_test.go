package piv

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
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

// reader is a real pcscd whose one reader is vsmartcard's vpcd, with our card
// in it.
type reader struct {
	t   *testing.T
	dir string
	env []string
}

// need skips t unless it runs as root with SEKISHO_TEST=all; then the programs
// must be there.
func need(t *testing.T, programs ...string) {
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

// newReader starts pcscd in a mount namespace with a /run/pcscd of its own.
func newReader(t *testing.T, card *Card) *reader {
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
	go func() { done <- serveVPCD(t.Context(), conn, card) }()
	t.Cleanup(func() {
		conn.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return &reader{t, dir, append(os.Environ(), "PCSCLITE_CSOCK_NAME="+sock, "OPENSC_CONF="+filepath.Join(dir, "opensc.conf"))}
}

// serveVPCD is vpcd's protocol: two bytes of length, then one byte of control
// (0 off, 1 on, 2 reset, 4 answer to reset) or a command.
func serveVPCD(ctx context.Context, conn net.Conn, card *Card) error {
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
			answer = ATR()
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

// run runs a program against the reader.
func (r *reader) run(program string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(r.t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env, cmd.Dir = r.env, r.dir
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (r *reader) must(program string, args ...string) string {
	r.t.Helper()
	out, err := r.run(program, args...)
	if err != nil {
		r.t.Fatalf("%s %s: %v\n%s", program, strings.Join(args, " "), err, out)
	}
	return out
}

// awaitCard waits until pcscd has seen the card.
func (r *reader) awaitCard() {
	r.t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		out, err := r.run("opensc-tool", "--list-readers")
		if err == nil && strings.Contains(out, "Yes") {
			return
		}
		if time.Now().After(deadline) {
			r.t.Fatalf("no card in the reader: %v\n%s", err, out)
		}
		<-time.After(50 * time.Millisecond)
	}
}

// OpenSC over a real pcscd finds the card, reads it, logs in, signs, agrees on
// keys, changes the PIN and blocks it.
func TestOpenSC(t *testing.T) {
	need(t, "pcscd", "opensc-tool", "piv-tool", "pkcs11-tool", "pkcs15-tool", "openssl")
	for name, rsaKey := range map[string]bool{"RSA-2048": true, "P-256": false} {
		t.Run(name, func(t *testing.T) {
			f := newCard(t, rsaKey)
			r := newReader(t, f.Card)
			r.awaitCard()
			r.says("Personal Identity Verification Card", "opensc-tool", "--name")
			r.must("piv-tool", "--serial", "--name")
			dump := r.must("pkcs15-tool", "--dump")
			for _, want := range []string{"PIV AUTH key", "SIGN key", "KEY MAN key", "CARD AUTH key", "Certificate for PIV Authentication"} {
				if !strings.Contains(dump, want) {
					t.Errorf("pkcs15-tool --dump says nothing of %q:\n%s", want, dump)
				}
			}
			r.says("No errors", "pkcs11-tool", "--test", "--login", "--pin", testPIN)
			r.signs(f, rsaKey)
			if !rsaKey {
				r.agrees(f)
			}
			out, err := r.run("pkcs11-tool", "--login", "--pin", "654321", "--list-objects")
			if err == nil || !strings.Contains(out, "CKR_PIN_INCORRECT") || f.store.state.Left != 2 {
				t.Errorf("a wrong PIN: %v, %d tries left, want 2\n%s", err, f.store.state.Left, out)
			}
			r.must("pkcs15-tool", "--change-pin", "--auth-id", "01", "--pin", testPIN, "--new-pin", "87654321")
			for range 3 {
				out, err = r.run("pkcs11-tool", "--login", "--pin", testPIN, "--list-objects")
			}
			if err == nil || !strings.Contains(out, "CKR_PIN_LOCKED") {
				t.Errorf("after three wrong PINs: %v\n%s", err, out)
			}
			if out, err = r.run("pkcs11-tool", "--login", "--pin", "87654321", "--list-objects"); err == nil {
				t.Errorf("a blocked PIN was taken:\n%s", out)
			}
		})
	}
}

// says runs a program that has to succeed and say want.
func (r *reader) says(want, program string, args ...string) {
	r.t.Helper()
	if out := r.must(program, args...); !strings.Contains(out, want) {
		r.t.Errorf("%s %s says nothing of %q:\n%s", program, strings.Join(args, " "), want, out)
	}
}

// signs has the card sign a file by PKCS #11 and checks the signature.
func (r *reader) signs(f *fixture, rsaKey bool) {
	r.t.Helper()
	message := []byte("関所")
	input := message
	if !rsaKey { // OpenSC has the caller hash
		digest := sha256.Sum256(message)
		input = digest[:]
	}
	if err := os.WriteFile(filepath.Join(r.dir, "message"), input, 0o600); err != nil {
		r.t.Fatal(err)
	}
	mechanism, alg := "ECDSA", x509.ECDSAWithSHA256
	args := []string{"--signature-format", "openssl"}
	if rsaKey {
		mechanism, alg, args = "SHA256-RSA-PKCS", x509.SHA256WithRSA, nil
	}
	r.must("pkcs11-tool", append([]string{"--login", "--pin", testPIN, "--sign", "--id", "01", "--mechanism", mechanism,
		"--input-file", "message", "--output-file", "signature"}, args...)...)
	signature, err := os.ReadFile(filepath.Join(r.dir, "signature"))
	if err != nil {
		r.t.Fatal(err)
	}
	if err := f.cert[Authentication].CheckSignature(alg, message, signature); err != nil {
		r.t.Error(err)
	}
	// The gate shut: the same command fails.
	f.host.shut(true)
	defer f.host.shut(false)
	if out, err := r.run("pkcs11-tool", append([]string{"--login", "--pin", testPIN, "--sign", "--id", "01", "--mechanism", mechanism,
		"--input-file", "message", "--output-file", "none"}, args...)...); err == nil || !strings.Contains(out, "CKR_USER_NOT_LOGGED_IN") {
		r.t.Errorf("with the gate shut: %v\n%s", err, out)
	}
}

// agrees has the card's 9D agree with a key of ours.
func (r *reader) agrees(f *fixture) {
	r.t.Helper()
	ours := point(r.t)
	public, err := x509.MarshalPKIXPublicKey(ours.Public())
	if err != nil {
		r.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(r.dir, "peer"), public, 0o600); err != nil {
		r.t.Fatal(err)
	}
	r.must("pkcs11-tool", "--login", "--pin", testPIN, "--derive", "--id", "03", "--mechanism", "ECDH1-COFACTOR-DERIVE", "--input-file", "peer", "--output-file", "secret")
	got, err := os.ReadFile(filepath.Join(r.dir, "secret"))
	if err != nil {
		r.t.Fatal(err)
	}
	theirs, err := f.host.keys[KeyManagement].(*ecdsa.PrivateKey).PublicKey.ECDH()
	if err != nil {
		r.t.Fatal(err)
	}
	want, err := ours.ECDH(theirs)
	if err != nil {
		r.t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		r.t.Errorf("the card agreed on %x, we on %x", got, want)
	}
}
