//go:build linux

package wpa

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"sekisho/netd"
	"sekisho/netd/internal/nstest"
)

// authority issues certificates for a test.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{t: t, key: key}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "City CA"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	a.cert = a.sign(template, template, key)
	return a
}

func (a *authority) sign(template, parent *x509.Certificate, key *ecdsa.PrivateKey) *x509.Certificate {
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert
}

func (a *authority) issue(name string, usage x509.ExtKeyUsage) (cert, key []byte) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	c := a.sign(&x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{usage}}, a.cert, k)
	if key, err = x509.MarshalECPrivateKey(k); err != nil {
		a.t.Fatal(err)
	}
	return c.Raw, key
}

func writePEM(t *testing.T, path, kind string, der []byte) string {
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// lan is a switch that asks for 802.1X: hostapd with its own EAP server, and
// wpa_supplicant as init runs it, with one link to the switch.
type lan struct {
	ca     *authority
	dir    string
	laptop *nstest.NS
}

func newLAN(t *testing.T) *lan {
	nstest.Require(t, "hostapd", "wpa_supplicant")
	dir, err := os.MkdirTemp("", "wpa") // short: a socket's path has 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	l := &lan{ca: newAuthority(t), dir: dir, laptop: nstest.New(t, "laptop")}
	port := nstest.New(t, "switch")
	nstest.Pair(port, "port0", "", l.laptop, "eth0", "")
	cert, key := l.ca.issue("radius.city.example", x509.ExtKeyUsageServerAuth)
	conf := fmt.Sprintf("interface=port0\ndriver=wired\nieee8021x=1\neap_server=1\neap_user_file=%s\nca_cert=%s\nserver_cert=%s\nprivate_key=%s\nuse_pae_group_addr=1\neap_reauth_period=0\n",
		filepath.Join(dir, "users"), writePEM(t, filepath.Join(dir, "ca.pem"), "CERTIFICATE", l.ca.cert.Raw),
		writePEM(t, filepath.Join(dir, "server.pem"), "CERTIFICATE", cert), writePEM(t, filepath.Join(dir, "server.key"), "EC PRIVATE KEY", key))
	for name, text := range map[string]string{"users": "* TLS\n", "hostapd.conf": conf} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	port.Start("hostapd", filepath.Join(dir, "hostapd.conf"))
	l.laptop.Start("wpa_supplicant", "-g", filepath.Join(dir, "global"))
	nstest.Eventually(t, 10*time.Second, func() error { _, err := os.Stat(filepath.Join(dir, "global")); return err })
	return l
}

// supplicant is one that reaches wpa_supplicant's namespace, where its
// answers go to abstract addresses.
func (l *lan) supplicant(identity *Identity) *Supplicant {
	s := New(l.dir, slog.New(slog.DiscardHandler))
	s.SetIdentity(identity)
	s.dial = func(path string) (c *Conn, err error) {
		err = l.laptop.Do(func() (err error) { c, err = Dial(path); return err })
		return c, err
	}
	return s
}

// watched collects what a station reports.
type watched struct {
	*Supplicant
	mu   sync.Mutex
	last Facts
}

func (w *watched) report(f Facts) { w.mu.Lock(); w.last = f; w.mu.Unlock() }
func (w *watched) until(t *testing.T, what string, holds func(Facts) bool) {
	t.Helper()
	nstest.Eventually(t, 30*time.Second, func() error {
		w.mu.Lock()
		defer w.mu.Unlock()
		if !holds(w.last) {
			return fmt.Errorf("%+v, want %s", w.last, what)
		}
		return nil
	})
}

// run follows the wired link while script runs.
func (l *lan) run(t *testing.T, identity *Identity, server string, script func(*watched)) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	w := watched{Supplicant: l.supplicant(identity)}
	done := make(chan struct{})
	go func() { defer close(done); w.Wired(ctx, "eth0", server, w.report) }()
	script(&w)
	cancel()
	<-done
}

// TestWired is 802.1X with EAP-TLS against a real hostapd; a new one each time,
// because a port stays shut for a minute after a failure.
func TestWired(t *testing.T) {
	const radius = "radius.city.example"
	for _, c := range []struct {
		name   string
		change func(*testing.T, *Identity)
		server string
		reason string // empty: let in
		detail string
	}{
		{"let in", nil, radius, "", ""},
		{"certificate of somebody else's CA", func(t *testing.T, i *Identity) {
			i.Certificate, i.Key = newAuthority(t).issue(i.Name, x509.ExtKeyUsageClientAuth)
		}, radius, netd.ReasonWrongSecret, "refused the certificate"},
		{"server with another name", nil, "radius.elsewhere.example", netd.ReasonWrongSecret, "not the organisation's"},
		{"server of somebody else's CA", func(t *testing.T, i *Identity) { i.CA = newAuthority(t).cert.Raw }, radius, netd.ReasonWrongSecret, "not the organisation's"},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLAN(t)
			i := l.identity()
			if c.change != nil {
				c.change(t, i)
			}
			l.run(t, i, c.server, func(w *watched) {
				w.until(t, cmp.Or(c.reason, "joined"), func(f Facts) bool {
					return f.Reason == c.reason && strings.Contains(f.Detail, c.detail) && (f.Joined > 0) == (c.reason == "")
				})
			})
		})
	}
	t.Run("no identity, then one", func(t *testing.T) {
		l := newLAN(t)
		l.run(t, nil, radius, func(w *watched) {
			w.until(t, "a reason", func(f Facts) bool {
				return f.Reason == netd.ReasonNoIdentity && strings.Contains(f.Detail, "no network identity")
			})
			w.SetIdentity(l.identity())
			w.until(t, "joined", func(f Facts) bool { return f.Reason == "" && f.Joined > 0 })
			w.SetIdentity(nil)
			w.until(t, "a reason", func(f Facts) bool { return f.Reason == netd.ReasonNoIdentity })
		})
	})
}

// identity is the laptop's, by the LAN's CA.
func (l *lan) identity() *Identity {
	const name = "laptop-1.city.example"
	cert, key := l.ca.issue(name, x509.ExtKeyUsageClientAuth)
	return &Identity{Name: name, Certificate: cert, Key: key, CA: l.ca.cert.Raw}
}
