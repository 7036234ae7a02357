package initramfs

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"log/slog"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/attest/gate"
	"sekisho/hostos/login"
)

// softAttestd is attestd with a key in software.
type softAttestd struct {
	key *ecdsa.PrivateKey

	mu   sync.Mutex
	shut chan struct{} // closed: the device is revoked
	uses int
	disk []byte
}

func (a *softAttestd) Wait(ctx context.Context, after uint64) (gate.Status, error) {
	if after == 0 {
		return gate.Status{Version: 1, State: gate.StateAffirming, NotAfter: time.Now().Add(time.Hour)}, nil
	}
	if after == 1 {
		select {
		case <-a.shut:
			return gate.Status{Version: 2, State: gate.StateRefused}, nil
		case <-ctx.Done():
			return gate.Status{}, ctx.Err()
		}
	}
	<-ctx.Done()
	return gate.Status{}, ctx.Err()
}

func (a *softAttestd) CreateLogonKey(context.Context, gate.CreateLogonKey) (gate.LogonKey, error) {
	spki, err := x509.MarshalPKIXPublicKey(a.key.Public())
	return gate.LogonKey{Key: json.RawMessage(`{}`), Public: spki}, err
}

func (a *softAttestd) UseLogonKey(_ context.Context, r gate.UseLogonKey) ([]byte, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.uses++
	return ecdsa.SignASN1(rand.Reader, a.key, r.Input)
}

func (a *softAttestd) LogonState(context.Context) ([]byte, error) { return a.disk, nil }

func (a *softAttestd) SaveLogonState(_ context.Context, s []byte) error { a.disk = s; return nil }

// TestCardInQEMU: Debian's pcscd and OpenSC in a virtual machine find the card
// in QEMU's own reader, sign with it, and see it go when the device is revoked.
func TestCardInQEMU(t *testing.T) {
	options := realOptions(t)
	options.Lab, options.Card = true, true
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	img, err := Work(ctx, options)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a := &softAttestd{key: key, shut: make(chan struct{})}
	p := attest.DefaultLogon()
	p.Key, p.Finger = attest.LogonP256, false
	e, err := login.New(ctx, login.Config{Policy: p, Agency: "Example City", Attestd: a, Disk: a, Now: time.Now, Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "taro"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.Setup(ctx, "taro", ""); err != nil {
		t.Fatal(err)
	}
	if err := e.Import(ctx, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})); err != nil {
		t.Fatal(err)
	}
	if err := e.SetPIN("123456"); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	l, err := login.ListenCard(dir)
	if err != nil {
		t.Fatal(err)
	}
	run, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	wg.Go(func() { e.Run(run) })
	wg.Go(func() { e.ServeCard(run, l) })
	for name, data := range map[string][]byte{"kernel": img.Kernel, "initrd": img.Initrd} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	qemu := exec.CommandContext(ctx, "qemu-system-x86_64", "-machine", "q35,accel=tcg", "-cpu", "max", "-m", "768", "-nodefaults", "-display", "none", "-no-reboot",
		"-kernel", filepath.Join(dir, "kernel"), "-initrd", filepath.Join(dir, "initrd"), "-append", "rdinit=/bbin/cardcheck console=ttyS0 quiet panic=-1",
		"-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
		// reconnect-ms of the laptop's QEMU is reconnect here (before 9.2).
		"-device", "qemu-xhci,id=usb", "-chardev", "socket,id=card,reconnect=1,path="+filepath.Join(dir, login.CardSocket),
		"-device", "usb-ccid,id=ccid,bus=usb.0", "-device", "ccid-card-passthru,chardev=card,bus=ccid.0")
	qemu.Stderr = t.Output()
	out, err := qemu.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := qemu.Start(); err != nil {
		t.Fatal(err)
	}
	var said strings.Builder
	for s := bufio.NewScanner(out); s.Scan(); {
		said.WriteString(s.Text() + "\n")
		if strings.HasPrefix(s.Text(), "card: remove") {
			close(a.shut)
		}
	}
	if err := qemu.Wait(); err != nil {
		t.Error(err)
	}
	text := said.String()
	for _, want := range []string{"Personal Identity Verification Card", "--output-file /tmp/signature: <nil>", "CKR_PIN_INCORRECT", "No errors", "card: end"} {
		if !strings.Contains(text, want) {
			t.Errorf("the work domain says nothing of %q", want)
		}
	}
	if a.uses == 0 || strings.Contains(text, "card: failed") || e.Slot.Inserted() {
		t.Errorf("the key was used %d times, the card is in the reader: %v", a.uses, e.Slot.Inserted())
	}
	if t.Failed() {
		t.Log(text)
	}
}
