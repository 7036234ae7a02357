package lab

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/attest/attester"
	"sekisho/attest/gate"
	"sekisho/attest/seal"
	"sekisho/attest/tpm"
	"sekisho/attest/tpm/tpmtest"
	"sekisho/hostos/login"
	"sekisho/hostos/login/piv"
	"sekisho/hostos/login/vscard"
)

// timedTPM is attestd with a TPM and no verifier: what it takes is counted.
type timedTPM struct {
	*tpm.TPM
	disk attester.VaultFile

	mu         sync.Mutex
	use, store time.Duration // since they were read last
}

func (d *timedTPM) Wait(ctx context.Context, after uint64) (gate.Status, error) {
	if after > 0 {
		<-ctx.Done()
		return gate.Status{}, ctx.Err()
	}
	return gate.Status{Version: 1, State: gate.StateAffirming, NotAfter: time.Now().Add(time.Hour)}, nil
}

func (d *timedTPM) CreateLogonKey(_ context.Context, r gate.CreateLogonKey) (gate.LogonKey, error) {
	k, err := d.TPM.CreateLogonKey(tpm.Boot{}, r.Kind, r.Agreement)
	if err != nil {
		return gate.LogonKey{}, err
	}
	wrapped, err := json.Marshal(k.Sealed)
	return gate.LogonKey{Key: wrapped, Public: k.SPKI}, err
}

func (d *timedTPM) UseLogonKey(_ context.Context, r gate.UseLogonKey) ([]byte, error) {
	begin := time.Now()
	var key seal.Sealed
	if err := json.Unmarshal(r.Key, &key); err != nil {
		return nil, err
	}
	out, err := d.TPM.UseLogonKey(tpm.Boot{}, key, r.Operation, r.Input)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.use += time.Since(begin)
	return out, err
}

func (d *timedTPM) LogonState(context.Context) ([]byte, error) {
	data, err := d.disk.Load()
	if errors.Is(err, attester.ErrNoRecord) {
		return nil, nil
	}
	return data, err
}

func (d *timedTPM) SaveLogonState(_ context.Context, s []byte) error {
	begin := time.Now()
	err := d.disk.Store(s)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.store += time.Since(begin)
	return err
}

// BenchmarkCardRatio compares operations of the card (command over VSCARD, PIV
// application, gate, key loaded and used in swtpm, event written and synced)
// with bare TPM2_Sign of a loaded P-256 key in the same swtpm, in turns. It
// reports how many of the one go in the time of the other, and where an
// operation's time goes; medians count.
func BenchmarkCardRatio(b *testing.B) {
	tpmtest.Need(b)
	dev, err := tpm.Open(tpmtest.Start(b).Socket)
	if err != nil {
		b.Fatal(err)
	}
	defer dev.Close()
	dir := b.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "state"), make([]byte, 1<<20), 0o600); err != nil {
		b.Fatal(err)
	}
	d := &timedTPM{TPM: dev, disk: attester.LogonFile(filepath.Join(dir, "state"))}
	policy := attest.DefaultLogon()
	policy.Key, policy.Finger = attest.LogonP256, false
	ctx, stop := context.WithCancel(b.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	e, err := login.New(ctx, login.Config{Policy: policy, Agency: "bench", Attestd: d, Disk: d, Now: time.Now, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		b.Fatal(err)
	}
	key, err := e.Setup(ctx, "taro", "")
	if err != nil {
		b.Fatal(err)
	}
	public, err := x509.ParsePKIXPublicKey(key.Public)
	if err != nil {
		b.Fatal(err)
	}
	signer, err := x509.MarshalPKIXPublicKey(dev.Public())
	if err != nil || len(signer) == 0 {
		b.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "taro"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, c, c, public, dev)
	if err == nil {
		err = e.Import(ctx, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	}
	if err = errors.Join(err, e.SetPIN("123456")); err != nil {
		b.Fatal(err)
	}
	l, err := login.ListenCard(dir)
	if err != nil {
		b.Fatal(err)
	}
	wg.Go(func() { e.Run(ctx) })
	wg.Go(func() { e.ServeCard(ctx, l) })
	card := openCard(b, filepath.Join(dir, login.CardSocket))
	card.command([]byte{0, 0xa4, 4, 0, 9, 0xa0, 0, 0, 3, 8, 0, 0, 0x10, 0, 0})
	pin, err := piv.Pad("123456")
	if err != nil {
		b.Fatal(err)
	}
	card.command(append([]byte{0, 0x20, 0, 0x80, 8}, pin...))
	digest := sha256.Sum256([]byte("logon"))
	sign := append(append([]byte{0, 0x87, 0x11, 0x9a, 38, 0x7c, 36, 0x82, 0, 0x81, 32}, digest[:]...), 0)

	var ours, theirs, inTPM, inStore []time.Duration
	for b.Loop() {
		d.mu.Lock()
		d.use, d.store = 0, 0
		d.mu.Unlock()
		begin := time.Now()
		card.command(sign)
		ours = append(ours, time.Since(begin))
		d.mu.Lock()
		inTPM, inStore = append(inTPM, d.use), append(inStore, d.store)
		d.mu.Unlock()
		begin = time.Now()
		if _, err := dev.Sign(rand.Reader, digest[:], crypto.SHA256); err != nil {
			b.Fatal(err)
		}
		theirs = append(theirs, time.Since(begin))
	}
	mid := func(v []time.Duration) float64 {
		slices.Sort(v)
		return v[len(v)/2].Seconds()
	}
	slices.Sort(ours)
	b.ReportMetric(1000*ours[min(len(ours)-1, len(ours)*99/100)].Seconds(), "ms/operation-p99")
	whole, raw, use, store := mid(ours), mid(theirs), mid(inTPM), mid(inStore)
	b.ReportMetric(1/whole, "operations/s")
	b.ReportMetric(1/raw, "raw-signatures/s")
	b.ReportMetric(raw/whole, "ratio")
	b.ReportMetric(1000*use, "ms-TPM")
	b.ReportMetric(1000*store, "ms-store")
	b.ReportMetric(1000*(whole-use-store), "ms-transport")
	b.ReportMetric(0, "ns/op")
}

// benchCard is QEMU's end of the card's socket.
type benchCard struct {
	b *testing.B
	net.Conn
}

func openCard(b *testing.B, socket string) benchCard {
	c, err := net.Dial("unix", socket)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { c.Close() })
	card := benchCard{b, c}
	card.send(vscard.Init, []byte{0x56, 0x53, 0x43, 0x44, 0, 0, 0, 2, 0, 0, 0, 0}) // magic, version, capabilities
	for {
		switch m := card.read(); m.Type {
		case vscard.ReaderAdd:
			card.send(vscard.Error, make([]byte, 4))
		case vscard.ATR:
			return card
		}
	}
}

func (c benchCard) send(t vscard.Type, body []byte) {
	if _, err := c.Write((vscard.Message{Type: t, Body: body}).Append(nil)); err != nil {
		c.b.Fatal(err)
	}
}

func (c benchCard) read() vscard.Message {
	m, err := vscard.Read(c.Conn)
	if err != nil {
		c.b.Fatal(err)
	}
	return m
}

// command sends one command, which has to succeed.
func (c benchCard) command(apdu []byte) {
	c.send(vscard.APDU, apdu)
	m := c.read()
	for m.Type != vscard.APDU {
		m = c.read()
	}
	if n := len(m.Body); n < 2 || m.Body[n-2] != 0x90 {
		c.b.Fatalf("%X: %X", apdu, m.Body)
	}
}
