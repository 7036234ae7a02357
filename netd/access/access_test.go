//go:build linux

package access

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"sekisho/attest"
	"sekisho/attest/gate"
	"sekisho/netd"
	"sekisho/netd/uplink/wpa"
)

// vault is attestd's part.
type vault struct {
	mu     sync.Mutex
	data   []byte
	err    error // of every request about the state
	issuer *issuer
	issued int
	asked  int   // for certificates
	fault  error // of a verifier
}

func (v *vault) NetworkState(context.Context) ([]byte, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.data, v.err
}

func (v *vault) SaveNetworkState(_ context.Context, data []byte) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.err == nil {
		v.data = bytes.Clone(data)
	}
	return v.err
}

func (v *vault) NetworkCertificate(_ context.Context, request []byte) ([]byte, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.asked++
	if v.fault != nil {
		return nil, v.fault
	}
	if v.issuer == nil {
		return nil, gate.ErrNoCredential
	}
	v.issued++
	return v.issuer.issue(request)
}

func (v *vault) set(f func()) {
	v.mu.Lock()
	defer v.mu.Unlock()
	f()
}

// issuer certifies for 90 days.
type issuer struct{ key *ecdsa.PrivateKey }

func (i *issuer) issue(request []byte) ([]byte, error) {
	csr, err := x509.ParseCertificateRequest(request)
	if err != nil {
		return nil, err
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "3f0c"}, NotBefore: time.Now(), NotAfter: time.Now().Add(90 * 24 * time.Hour)}
	return x509.CreateCertificate(rand.Reader, c, c, csr.PublicKey, i.key)
}

// laptop is a netd as far as this package goes.
type laptop struct {
	*Keeper
	book     *wpa.Book
	mu       sync.Mutex
	identity *wpa.Identity
	stop     func()
}

func newLaptop(t *testing.T, v *vault, file string, want *attest.NetworkAccess) *laptop {
	t.Helper()
	l := &laptop{}
	k, err := New(Config{Vault: v, File: file, Access: want, Now: time.Now, Log: slog.New(slog.DiscardHandler),
		Loaded: func(list []wpa.Network) {
			if err := l.book.Adopt(list); err != nil {
				t.Error(err)
			}
		},
		Identify: func(i *wpa.Identity) { l.mu.Lock(); l.identity = i; l.mu.Unlock() }})
	if err != nil {
		t.Fatal(err)
	}
	l.Keeper = k
	if l.book, err = wpa.OpenBook(k, wpa.New(t.TempDir(), slog.New(slog.DiscardHandler)), nil); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); k.Run(ctx) }()
	l.stop = func() { cancel(); <-done }
	return l
}

func (l *laptop) names(t *testing.T) string {
	t.Helper()
	list, err := l.book.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range list {
		names = append(names, e.Name)
	}
	return strings.Join(names, " ")
}

func (l *laptop) join(t *testing.T, name string) {
	t.Helper()
	if err := l.book.Join(wpa.Network{SSID: wpa.SSID(name), Security: wpa.Personal, Passphrase: "the secret of " + wpa.Secret(name)}); err != nil {
		t.Fatal(err)
	}
}

func inMemory(t *testing.T) string { return filepath.Join(t.TempDir(), "networks") }

// TestOverPowerOff: what was saved comes back in the next boot, also what was
// joined before attestd answered, and what was forgotten does not.
func TestOverPowerOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := &vault{}
		l := newLaptop(t, v, inMemory(t), nil)
		l.join(t, "home")
		l.join(t, "hotel")
		if s := l.Settled(t.Context()); s.State != netd.AccessKept {
			t.Fatalf("%+v", s)
		}
		if !bytes.Contains(v.data, []byte("networks")) {
			t.Error("the vault holds nothing")
		}
		l.stop()

		v.set(func() { v.err = errors.New("attestd is starting") })
		next := newLaptop(t, v, inMemory(t), nil)
		synctest.Wait()
		if s := next.Status(); s.State != netd.AccessPending || s.Detail != "attestd is starting" || next.names(t) != "" {
			t.Errorf("%+v, %s", s, next.names(t))
		}
		next.join(t, "cafe")
		v.set(func() { v.err = nil })
		if s := next.Settled(t.Context()); s.State != netd.AccessKept || next.names(t) != "cafe hotel home" {
			t.Errorf("%+v, %s", s, next.names(t))
		}
		if err := next.book.Forget(wpa.SSID("hotel")); err != nil {
			t.Fatal(err)
		}
		next.Settled(t.Context())
		next.stop()

		last := newLaptop(t, v, inMemory(t), nil)
		if s := last.Settled(t.Context()); s.State != netd.AccessKept || last.names(t) != "cafe home" {
			t.Errorf("%+v, %s", s, last.names(t))
		}
		last.stop()
	})
}

// TestNetdRestarted: the file in memory is the newer of both, and is for its
// owner alone.
func TestNetdRestarted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v, path := &vault{}, inMemory(t)
		l := newLaptop(t, v, path, nil)
		l.join(t, "home")
		l.join(t, "hotel")
		l.Settled(t.Context())
		v.set(func() { v.err = errors.New("attestd is away") })
		if err := l.book.Forget(wpa.SSID("hotel")); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		l.stop()
		next := newLaptop(t, v, path, nil)
		synctest.Wait()
		if got := next.names(t); got != "home" || next.Status().State != netd.AccessPending {
			t.Errorf("%s, %+v", got, next.Status())
		}
		v.set(func() { v.err = nil })
		if s := next.Settled(t.Context()); s.State != netd.AccessKept || next.names(t) != "home" {
			t.Errorf("%+v, %s: what was forgotten came back", s, next.names(t))
		}
		held, err := decode(v.data)
		if list, derr := held.networks(); err != nil || derr != nil || len(list) != 1 {
			t.Errorf("the vault holds %v, %v, %v", list, err, derr)
		}
		next.stop()
		if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("mode %v, %v", st.Mode(), err)
		}
		if err := os.Chmod(path, 0o644); err != nil {
			t.Fatal(err)
		}
		if k, err := New(Config{File: path}); err == nil || len(k.kept.Networks) != 0 {
			t.Error("a file that others can read was believed")
		}
	})
}

// TestAnotherImage: a boot that may not open the vault says why, has no saved
// networks, joins by hand, and leaves the vault alone.
func TestAnotherImage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := &vault{data: []byte(`{"networks": "W10="}`)}
		before := bytes.Clone(v.data)
		v.err = &gate.KeyRefused{Codes: []string{gate.CodeImage}, Detail: "PCR 11 is another"}
		l := newLaptop(t, v, inMemory(t), nil)
		l.join(t, "home")
		if s := l.Settled(t.Context()); s.State != netd.AccessVolatile || s.Detail != "PCR 11 is another" || l.names(t) != "home" {
			t.Errorf("%+v, %s", s, l.names(t))
		}
		l.stop()
		if !bytes.Equal(v.data, before) {
			t.Error("the vault was written")
		}
	})
}

// TestIdentity: made once a verifier certifies, kept over power-off, renewed at
// half its life, and removed when the organisation has no use for it.
func TestIdentity(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		want := &attest.NetworkAccess{Server: "radius.city.example", CA: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("root")}))}
		v := &vault{}
		l := newLaptop(t, v, inMemory(t), want)
		synctest.Wait()
		if l.identity != nil {
			t.Error("an identity from nowhere")
		}
		v.set(func() { v.issuer = &issuer{key} })
		time.Sleep(time.Minute)
		synctest.Wait()
		first := l.identity
		if first == nil || first.Name != "3f0c" || string(first.CA) != "root" || l.Status().Identity != "3f0c" {
			t.Fatalf("%+v, %+v", first, l.Status())
		}
		l.stop()

		v.set(func() { v.issuer = nil }) // no verifier in the next boot
		l = newLaptop(t, v, inMemory(t), want)
		l.Settled(t.Context())
		synctest.Wait()
		if i := l.identity; i == nil || !bytes.Equal(i.Key, first.Key) || !bytes.Equal(i.Certificate, first.Certificate) {
			t.Errorf("after power-off: %+v", i)
		}
		v.set(func() { v.issuer = &issuer{key} })
		time.Sleep(44 * 24 * time.Hour)
		synctest.Wait()
		if v.issued != 1 {
			t.Errorf("%d certificates before half the time was over", v.issued)
		}
		time.Sleep(2 * 24 * time.Hour)
		synctest.Wait()
		if i := l.identity; v.issued != 2 || bytes.Equal(i.Key, first.Key) {
			t.Errorf("%d certificates after half the time", v.issued)
		}
		l.Settled(t.Context())
		l.stop()

		l = newLaptop(t, v, inMemory(t), nil)
		l.Settled(t.Context())
		synctest.Wait()
		held, err := decode(v.data)
		if l.identity != nil || err != nil || len(held.Key) != 0 {
			t.Errorf("an identity that nobody asks for is still there: %v", err)
		}
		l.stop()
	})
}

// TestRefusedIdentity: a verifier that issues none is asked less and less often,
// and soon once there is one to ask.
func TestRefusedIdentity(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := &vault{fault: errors.New("this verifier issues no network identities")}
		l := newLaptop(t, v, inMemory(t), &attest.NetworkAccess{})
		time.Sleep(24 * time.Hour)
		synctest.Wait()
		if v.asked < 10 || v.asked > 200 {
			t.Errorf("asked %d times in a day", v.asked)
		}
		l.stop()
	})
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"networks": "W10="}`))
	f.Add([]byte(`{"networks": "W10=", "key": "AA==", "certificate": "AA=="}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		k, err := decode(data)
		if err != nil {
			return
		}
		if again, err := decode(k.encode()); err != nil || !bytes.Equal(again.encode(), k.encode()) {
			t.Errorf("%v", err)
		}
	})
}
