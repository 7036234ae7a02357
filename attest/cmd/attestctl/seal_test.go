package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/attest/approval"
	"sekisho/attest/eventlog/logtest"
	"sekisho/attest/fleet"
	"sekisho/attest/seal"
)

// desk is a folder with keys and documents, as an administrator has it.
type desk struct {
	t    *testing.T
	dir  string
	keys map[string]*ecdsa.PrivateKey
}

func newDesk(t *testing.T, names ...string) *desk {
	d := &desk{t, t.TempDir(), make(map[string]*ecdsa.PrivateKey)}
	for _, n := range names {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		der, err := x509.MarshalPKCS8PrivateKey(k)
		if err != nil {
			t.Fatal(err)
		}
		d.keys[n] = k
		d.write(n+".key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	}
	return d
}

func (d *desk) path(name string) string { return filepath.Join(d.dir, name) }

func (d *desk) write(name string, data []byte) {
	d.t.Helper()
	if err := os.WriteFile(d.path(name), data, 0o600); err != nil {
		d.t.Fatal(err)
	}
}

func (d *desk) json(name string, v any) {
	d.t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		d.t.Fatal(err)
	}
	d.write(name, data)
}

// run runs a command and keeps what it prints in the file out.
func (d *desk) run(out, command string, o options, args ...string) error {
	d.t.Helper()
	c, ok := commands()[command]
	if !ok || len(args) != c.args {
		d.t.Fatalf("%s with %d arguments: no such command", command, len(args))
	}
	result, err := c.run(d.t.Context(), &o, args)
	if err != nil {
		return err
	}
	var b bytes.Buffer
	if err := c.print(printer{&b, "en"}, result); err != nil {
		d.t.Fatal(err)
	}
	d.write(out, b.Bytes())
	return nil
}

func (d *desk) must(out, command string, o options, args ...string) {
	d.t.Helper()
	if err := d.run(out, command, o, args...); err != nil {
		d.t.Fatalf("%s: %v", command, err)
	}
}

// approvers writes the public keys of the desk's keys of these names.
func (d *desk) approvers(names ...string) {
	d.t.Helper()
	var list []byte
	for _, n := range names {
		der, err := x509.MarshalPKIXPublicKey(d.keys[n].Public())
		if err != nil {
			d.t.Fatal(err)
		}
		list = append(list, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})...)
	}
	d.write("approvers.pem", list)
}

func TestSealCommands(t *testing.T) {
	d := newDesk(t, "release")
	d.json("refs.json", logtest.Image{Kernel: "k", Initramfs: "i", Cmdline: "c"}.Reference("sekisho", "7"))
	key := sealOptions{key: d.path("release.key"), epoch: seal.FirstEpoch}
	d.must("release.json", "seal sign", options{sealOptions: key}, d.path("refs.json"))
	d.must("shown", "seal show", options{}, d.path("release.json"))
	shown, err := os.ReadFile(d.path("shown"))
	if err != nil || !strings.Contains(string(shown), "sekisho 7") {
		t.Errorf("%s, %v", shown, err)
	}
	key.epoch = 1
	if d.run("x", "seal sign", options{sealOptions: key}, d.path("refs.json")) == nil {
		t.Error("an epoch below the first was signed")
	}
	if err := d.run("x", "seal sign", options{}, d.path("refs.json")); !errors.Is(err, errUsage) {
		t.Errorf("no key: %v", err)
	}
}

func TestPermitCommands(t *testing.T) {
	d := newDesk(t, "a", "b")
	o := options{device: attest.Digest{1}.String(), sealOptions: sealOptions{reason: "board", replacement: attest.Digest{2}.String()}}
	d.must("p0", "permit new", o)
	d.must("p1", "approval sign", options{sealOptions: sealOptions{key: d.path("a.key")}}, d.path("p0"))
	d.must("p2", "approval sign", options{sealOptions: sealOptions{key: d.path("b.key")}}, d.path("p1"))
	data, err := os.ReadFile(d.path("p2"))
	if err != nil {
		t.Fatal(err)
	}
	s, err := approval.Parse(data)
	if err != nil || s.Type != fleet.ApprovePermit || len(s.Signatures) != 2 {
		t.Errorf("%+v, %v", s, err)
	}
	o.reason = ""
	if err := d.run("x", "permit new", o); !errors.Is(err, errUsage) {
		t.Errorf("no reason: %v", err)
	}
	if d.run("x", "permit new", options{sealOptions: sealOptions{reason: "r"}}) == nil {
		t.Error("a permit for no device was made")
	}
}

// TestRecoveryCommands: the recovery key is shown for two signatures, not for
// one, and not for one person twice.
func TestRecoveryCommands(t *testing.T) {
	d := newDesk(t, "a", "b", "escrow")
	d.approvers("a", "b")
	v, _, recoveryKey, err := seal.NewVolume(seal.PurposeDisk, attest.Digest{}, func(seal.Secret) (seal.Sealed, error) { return seal.Sealed{}, nil })
	if err != nil {
		t.Fatal(err)
	}
	e, err := seal.NewEscrow(&d.keys["escrow"].PublicKey, attest.Digest{1}, v.ID, recoveryKey, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	d.json("escrow.json", e)
	d.must("r0", "recovery request", options{sealOptions: sealOptions{escrow: d.path("escrow.json"), reason: "board dead"}})
	sign := func(who, from, to string) {
		d.must(to, "approval sign", options{sealOptions: sealOptions{key: d.path(who + ".key")}}, d.path(from))
	}
	sign("a", "r0", "r1")
	sign("a", "r1", "twice")
	sign("b", "r1", "r2")
	site := newOrganisation(t, setup{approvers: d.path("approvers.pem")})
	o := options{socket: site.socket, sealOptions: sealOptions{escrow: d.path("escrow.json"), key: d.path("escrow.key"), approvers: d.path("approvers.pem")}}
	for _, bad := range []string{"r0", "r1", "twice"} {
		if err := d.run("key", "recovery release", o, d.path(bad)); !errors.Is(err, approval.ErrNotApproved) {
			t.Errorf("%s: %v", bad, err)
		}
	}
	d.must("key", "recovery release", o, d.path("r2"))
	got, err := os.ReadFile(d.path("key"))
	if err != nil || strings.TrimSpace(string(got)) != recoveryKey.Reveal() {
		t.Errorf("%s, %v", got, err)
	}
	// Once, with any verifier of the organisation; and it is on record.
	if err := d.run("again", "recovery release", o, d.path("r2")); !errors.Is(err, fleet.ErrRefused) {
		t.Errorf("an approval was used twice: %v", err)
	}
	if _, err := os.Stat(d.path("again")); err == nil {
		t.Error("something was shown")
	}
	d.must("list", "recovery list", options{socket: site.socket})
	if list, err := os.ReadFile(d.path("list")); err != nil || strings.Count(string(list), "board dead") != 1 {
		t.Errorf("%s, %v", list, err)
	}
	// Without the verifier there is no record, and so no key.
	o.socket = d.path("nobody")
	if err := d.run("away", "recovery release", o, d.path("r2")); err == nil {
		t.Error("a key was released that nobody knows of")
	}
}
