package login

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"encoding/pem"
	"errors"
	"log/slog"
	"math/big"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"sekisho/attest"
	"sekisho/attest/gate"
	"sekisho/hostos/login/fprint"
	"sekisho/hostos/login/piv"
)

// world is attestd, disk and reader of a test.
type world struct {
	mu     sync.Mutex
	status gate.Status
	news   chan struct{}
	key    *ecdsa.PrivateKey
	uses   int
	disk   []byte
	full   bool
	match  chan error // what the next touch is
	stored int
}

func newWorld() *world {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	return &world{key: k, news: make(chan struct{}), match: make(chan error, 8)}
}

func (w *world) set(state string, until time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.status = gate.Status{Version: w.status.Version + 1, State: state, NotAfter: until, DeviceID: "d1"}
	close(w.news)
	w.news = make(chan struct{})
}

func (w *world) Wait(ctx context.Context, after uint64) (gate.Status, error) {
	for {
		w.mu.Lock()
		s, news := w.status, w.news
		w.mu.Unlock()
		if s.Version > after {
			return s, nil
		}
		select {
		case <-news:
		case <-ctx.Done():
			return gate.Status{}, ctx.Err()
		}
	}
}

func (w *world) CreateLogonKey(context.Context, gate.CreateLogonKey) (gate.LogonKey, error) {
	spki, err := x509.MarshalPKIXPublicKey(w.key.Public())
	return gate.LogonKey{Key: json.RawMessage(`{}`), Public: spki, Area: []byte("area"), Storage: []byte("storage"), Certify: []byte("certify"), CertifySig: []byte("signature")}, err
}

func (w *world) UseLogonKey(_ context.Context, r gate.UseLogonKey) ([]byte, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.status.State != gate.StateAffirming {
		return nil, gate.ErrShut
	}
	w.uses++
	return ecdsa.SignASN1(rand.Reader, w.key, r.Input)
}

func (w *world) LogonState(context.Context) ([]byte, error) { return w.disk, nil }

func (w *world) SaveLogonState(_ context.Context, s []byte) error {
	if w.full {
		return errors.New("disk full")
	}
	w.disk = s
	w.stored++
	return nil
}

// Verify is the reader: the next touch comes from the test.
func (w *world) Verify(ctx context.Context, _ string, tell func(fprint.Feedback)) error {
	tell(fprint.Touch)
	select {
	case err := <-w.match:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

var policy = attest.Logon{Key: attest.LogonP256, PIN: true, Finger: true, FingerSeconds: 30, PINTries: 3, FingerTries: 3, LockSeconds: 60}

const pinText = "123456"

// issue makes an engine with a card that was issued: key, certificate, PIN.
func issue(t *testing.T, w *world, p attest.Logon) *Engine {
	t.Helper()
	e, err := New(t.Context(), Config{Policy: p, Agency: "Example City", Attestd: w, Disk: w, Now: time.Now, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	w.set(gate.StateAffirming, time.Now().Add(time.Hour))
	e.attest(w.status)
	if _, err := e.Setup(t.Context(), "taro@EXAMPLE.LG.JP", "山田太郎"); err != nil {
		t.Fatal(err)
	}
	r, err := e.Request(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	// It carries what attestctl card check needs.
	if data, err := json.Marshal(r); err != nil {
		t.Fatal(err)
	} else if got, err := gate.ParseCardRequest(data); err != nil || string(got.Key)+string(got.Storage) != "areastorage" {
		t.Fatalf("%+v, %v", got, err)
	}
	block, _ := pem.Decode(r.CSR)
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil || csr.CheckSignature() != nil || csr.Subject.CommonName != "taro@EXAMPLE.LG.JP" {
		t.Fatalf("request: %v", err)
	}
	if err := e.Import(t.Context(), certificate(t, csr.PublicKey, []asn1.ObjectIdentifier{oidSmartCardLogon})); err != nil {
		t.Fatal(err)
	}
	if err := e.SetPIN(pinText); err != nil {
		t.Fatal(err)
	}
	e.SetReader(w)
	w.uses = 0
	return e
}

func certificate(t *testing.T, public any, usages []asn1.ObjectIdentifier) []byte {
	t.Helper()
	ca, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "taro"}, UnknownExtKeyUsage: usages,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
	}, &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "ca"}}, public, ca)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// sign has the card sign, as a reader would; it returns the status word.
func sign(t *testing.T, e *Engine, pin string) piv.Status {
	t.Helper()
	send := func(apdu []byte) ([]byte, piv.Status) {
		r := e.card.Transmit(t.Context(), apdu)
		return r[:len(r)-2], piv.Status(r[len(r)-2])<<8 | piv.Status(r[len(r)-1])
	}
	send([]byte{0, 0xa4, 4, 0, 9, 0xa0, 0, 0, 3, 8, 0, 0, 0x10, 0, 0})
	if pin != "" {
		b, err := piv.Pad(pin)
		if err != nil {
			t.Fatal(err)
		}
		if _, sw := send(append([]byte{0, 0x20, 0, 0x80, 8}, b...)); sw != piv.OK {
			return sw
		}
	}
	digest := sha256.Sum256([]byte("logon"))
	data, sw := send(append(append([]byte{0, 0x87, 0x11, 0x9a, 38, 0x7c, 36, 0x82, 0, 0x81, 32}, digest[:]...), 0))
	if sw == piv.OK {
		if len(data) < 5 || !ecdsa.VerifyASN1(publicOf(t, e), digest[:], data[4:]) {
			t.Errorf("the signature %x does not verify", data)
		}
	} else if len(data) > 0 {
		t.Errorf("status %04X with data", uint16(sw))
	}
	e.card.Reset()
	return sw
}

func publicOf(t *testing.T, e *Engine) *ecdsa.PublicKey {
	t.Helper()
	var k crypto.PublicKey
	k, err := e.store.get().public()
	if err != nil {
		t.Fatal(err)
	}
	return k.(*ecdsa.PublicKey)
}

func (e *Engine) lastEvent() Event {
	ev := e.store.get().Events
	if len(ev) == 0 {
		return Event{}
	}
	return ev[len(ev)-1]
}

func TestLogon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		e := issue(t, w, policy)
		if !e.Slot.Inserted() {
			t.Fatal("the card is not in the reader")
		}
		w.match <- nil
		if sw := sign(t, e, pinText); sw != piv.OK || w.uses != 1 {
			t.Fatalf("finger and PIN: %04X, %d uses", uint16(sw), w.uses)
		}
		if ev := e.lastEvent(); ev.Factor != "finger+pin" || ev.Reason != Open || ev.User != "taro@EXAMPLE.LG.JP" {
			t.Errorf("event %+v", ev)
		}
		// One match is for one operation.
		if sw := sign(t, e, pinText); sw != piv.SecurityStatus || e.lastEvent().Reason != FingerWanted {
			t.Errorf("a second signature without a touch: %04X, %s", uint16(sw), e.lastEvent().Reason)
		}
		if sw := sign(t, e, ""); sw != piv.SecurityStatus || e.lastEvent().Reason != PINWanted {
			t.Errorf("no PIN: %04X, %s", uint16(sw), e.lastEvent().Reason)
		}
		if sw := sign(t, e, "000000"); sw != piv.VerifyFailed+2 || e.lastEvent().Reason != PINWrong {
			t.Errorf("wrong PIN: %04X, %s", uint16(sw), e.lastEvent().Reason)
		}
		for range 3 {
			w.match <- fprint.ErrNoMatch
		}
		if sw := sign(t, e, pinText); sw != piv.SecurityStatus || e.lastEvent().Reason != FingerLocked {
			t.Errorf("three wrong fingers: %04X, %s", uint16(sw), e.lastEvent().Reason)
		}
		w.match <- nil
		if sw := sign(t, e, pinText); sw != piv.SecurityStatus {
			t.Errorf("locked out: %04X", uint16(sw))
		}
		time.Sleep(61 * time.Second) // of synctest's clock
		if sw := sign(t, e, pinText); sw != piv.OK {
			t.Errorf("after the lock: %04X", uint16(sw))
		}
		if w.uses != 2 {
			t.Errorf("the key was used %d times, want 2", w.uses)
		}
	})
}

// The card goes when the result lapses or the device is revoked, and comes
// back with a new result; the state comes back over a restart.
func TestCardFollowsAttestation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		e := issue(t, w, policy)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- e.Run(ctx) }()
		w.set(gate.StateAffirming, time.Now().Add(time.Minute))
		synctest.Wait()
		if !e.Slot.Inserted() {
			t.Error("affirming, but no card")
		}
		time.Sleep(time.Minute + 2*time.Millisecond)
		synctest.Wait()
		if e.Slot.Inserted() {
			t.Error("lapsed, and the card is still in")
		}
		w.match <- nil
		if sw := sign(t, e, pinText); sw == piv.OK || e.lastEvent().Reason != NotAttested || w.uses != 0 {
			t.Errorf("lapsed: %04X, %s", uint16(sw), e.lastEvent().Reason)
		}
		w.set(gate.StateAffirming, time.Now().Add(time.Minute))
		synctest.Wait()
		if !e.Slot.Inserted() {
			t.Error("renewed, but no card")
		}
		w.set(gate.StateRefused, time.Time{})
		synctest.Wait()
		if e.Slot.Inserted() || e.Status().State != "removed" {
			t.Error("revoked, and the card is still in")
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		again, err := New(t.Context(), e.Config)
		if err != nil {
			t.Fatal(err)
		}
		w.set(gate.StateAffirming, time.Now().Add(time.Minute))
		again.attest(w.status)
		again.SetReader(w)
		if sw := sign(t, again, pinText); sw != piv.OK { // by the touch that waits
			t.Errorf("after a restart: %04X", uint16(sw))
		}
		again.timer.Stop()
	})
}

func TestPINOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		p := policy
		p.PIN = false
		e := issue(t, w, p)
		w.match <- nil
		if sw := sign(t, e, "999999"); sw != piv.OK || e.lastEvent().Factor != "finger" {
			t.Errorf("finger alone: %04X", uint16(sw))
		}
		e.SetReader(nil)
		if sw := sign(t, e, pinText); sw != piv.SecurityStatus || e.lastEvent().Reason != NoReader {
			t.Errorf("broken reader: %04X", uint16(sw))
		}
		if err := e.AllowPINOnly(t.Context(), time.Now().Add(25*time.Hour)); err == nil {
			t.Error("25 hours were allowed")
		}
		if err := e.AllowPINOnly(t.Context(), time.Now().Add(time.Hour)); err != nil {
			t.Fatal(err)
		}
		if sw := sign(t, e, "999999"); sw != piv.VerifyFailed+2 {
			t.Errorf("a wrong PIN alone: %04X", uint16(sw))
		}
		if sw := sign(t, e, pinText); sw != piv.OK || e.lastEvent().Factor != "pin" {
			t.Errorf("the PIN alone: %04X", uint16(sw))
		}
		e.timer.Stop()
	})
}

func TestImportRefuses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		e := issue(t, w, policy)
		other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		for name, chain := range map[string][]byte{
			"another key":    certificate(t, other.Public(), []asn1.ObjectIdentifier{oidSmartCardLogon}),
			"other purposes": certificate(t, w.key.Public(), []asn1.ObjectIdentifier{{1, 2, 3}}),
			"nothing":        nil,
			"noise":          []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
		} {
			if err := e.Import(t.Context(), chain); err == nil {
				t.Errorf("%s was imported", name)
			}
		}
		e.timer.Stop()
	})
}
