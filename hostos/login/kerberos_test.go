package login

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/attest/gate"
	"sekisho/hostos/login/fprint"
	"sekisho/hostos/login/fprint/fprinttest"
	"sekisho/hostos/login/piv"
	"sekisho/hostos/login/piv/pivtest"
)

const (
	realm   = "EXAMPLE.TEST"
	user    = "taro@" + realm
	kdcName = "kdc.example.test"
	module  = "/usr/lib/x86_64-linux-gnu/opensc-pkcs11.so"
)

// rsaWorld is a world whose key is RSA, as MIT Kerberos wants of a token.
type rsaWorld struct {
	*world
	rsa *rsa.PrivateKey
}

func (w rsaWorld) CreateLogonKey(context.Context, gate.CreateLogonKey) (gate.LogonKey, error) {
	spki, err := x509.MarshalPKIXPublicKey(w.rsa.Public())
	return gate.LogonKey{Key: []byte(`{}`), Public: spki}, err
}

func (w rsaWorld) UseLogonKey(_ context.Context, r gate.UseLogonKey) ([]byte, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.status.State != gate.StateAffirming || r.Operation != attest.LogonRSA {
		return nil, gate.ErrShut
	}
	w.uses++
	return new(big.Int).Exp(new(big.Int).SetBytes(r.Input), w.rsa.D, w.rsa.N).FillBytes(make([]byte, 256)), nil
}

// office is an organisation's CA, KDC and SSH server, and a laptop's card in a
// real reader with a real fprintd.
type office struct {
	t      *testing.T
	w      rsaWorld
	e      *Engine
	r      *pivtest.Reader
	ca     *rsa.PrivateKey
	root   *x509.Certificate
	reader string // socket of libfprint's virtual reader
}

func newKey(t *testing.T) *rsa.PrivateKey {
	t.Helper()
	k, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func (o *office) file(name string, data []byte) string {
	o.t.Helper()
	path := filepath.Join(o.r.Dir, name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		o.t.Fatal(err)
	}
	return path
}

func (o *office) issue(c x509.Certificate, public any) []byte {
	o.t.Helper()
	c.SerialNumber, c.NotBefore, c.NotAfter = big.NewInt(time.Now().UnixNano()), time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour)
	parent := o.root
	if parent == nil {
		parent = &c
	}
	der, err := x509.CreateCertificate(rand.Reader, &c, parent, public, o.ca)
	if err != nil {
		o.t.Fatal(err)
	}
	return der
}

func certPEM(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// upn is the subjectAltName of a smart card logon certificate: the user
// principal name (Microsoft, "Smart card certificate requirements").
func upn(t *testing.T, name string) pkix.Extension {
	t.Helper()
	value, err := asn1.MarshalWithParams(name, "utf8")
	if err != nil {
		t.Fatal(err)
	}
	oid, err := asn1.Marshal(asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 311, 20, 2, 3})
	if err != nil {
		t.Fatal(err)
	}
	raw := func(tag int, b []byte) asn1.RawValue {
		return asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: tag, IsCompound: true, Bytes: b}
	}
	inner, err := asn1.Marshal(raw(0, value))
	if err != nil {
		t.Fatal(err)
	}
	san, err := asn1.Marshal([]asn1.RawValue{raw(0, append(oid, inner...))})
	if err != nil {
		t.Fatal(err)
	}
	return pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Value: san}
}

const rightFinger, wrongFinger fprinttest.Finger = 1, 2

func newOffice(t *testing.T) *office {
	t.Helper()
	o := &office{t: t, w: rsaWorld{newWorld(), newKey(t)}, ca: newKey(t)}
	p := attest.DefaultLogon()
	p.PINTries, p.FingerTries, p.LockSeconds = 3, 3, 30
	e, err := New(t.Context(), Config{Policy: p, Agency: "Example City", Attestd: o.w, Disk: o.w, Touch: 6 * time.Second, Now: time.Now, Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	o.e = e
	o.affirm(time.Hour)
	dir := t.TempDir()
	o.reader = filepath.Join(dir, "reader")
	reader, err := fprint.Start(t.Context(), fprint.Config{Dir: filepath.Join(dir, "run"), Env: []string{"FP_VIRTUAL_IMAGE=" + o.reader}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { reader.Close() })
	e.SetReader(reader)
	if _, err := e.Setup(t.Context(), user, "山田太郎"); err != nil {
		t.Fatal(err)
	}
	req, err := e.Request(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(req.CSR)
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil || csr.CheckSignature() != nil {
		t.Fatalf("request: %v", err)
	}
	root := o.issue(x509.Certificate{Subject: pkix.Name{CommonName: "Example City CA"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign}, o.ca.Public())
	if o.root, err = x509.ParseCertificate(root); err != nil {
		t.Fatal(err)
	}
	leaf := o.issue(x509.Certificate{
		Subject: pkix.Name{CommonName: "taro"}, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		UnknownExtKeyUsage: []asn1.ObjectIdentifier{oidSmartCardLogon}, ExtraExtensions: []pkix.Extension{upn(t, user)},
	}, csr.PublicKey)
	if err := e.Import(t.Context(), certPEM(leaf)); err != nil {
		t.Fatal(err)
	}
	if err := e.SetPIN(pinText); err != nil {
		t.Fatal(err)
	}
	o.enrol()
	o.r = pivtest.Start(t, e.card, piv.ATR())
	return o
}

// affirm makes the laptop attested for a while.
func (o *office) affirm(life time.Duration) {
	o.w.set(gate.StateAffirming, time.Now().Add(life))
	o.e.attest(o.w.status)
}

// put puts a finger on the reader.
func (o *office) put(f fprinttest.Finger, touch uint64) error {
	conn, err := net.Dial("unix", o.reader)
	if err != nil {
		return err
	}
	defer conn.Close()
	return fprinttest.Put(conn, f.Picture(touch))
}

// enrol takes the right finger as an administrator would have it taken.
func (o *office) enrol() {
	o.t.Helper()
	done := make(chan error, 1)
	go func() { done <- o.e.Enrol(o.t.Context(), "right-index-finger") }()
	for touch := uint64(1); ; touch++ {
		asked := o.touches(done, touch == 1)
		if asked == nil {
			if err := o.put(rightFinger, touch); err != nil {
				o.t.Fatal(err)
			}
			continue
		}
		if err := <-done; err != nil {
			o.t.Fatal(err)
		}
		return
	}
}

// touches waits until the person is asked for a touch; an error means that
// done is ready first.
func (o *office) touches(done chan error, first bool) error {
	o.t.Helper()
	for {
		changed := o.e.Changed()
		o.e.mu.Lock()
		f, since := o.e.say.Feedback, o.e.say.Since
		o.e.mu.Unlock()
		if f == fprint.Touch && first || (f == fprint.Stage || f == fprint.Again) && time.Since(since) < 10*time.Second {
			o.e.tell(0)
			return nil
		}
		select {
		case err := <-done:
			done <- err
			return fmt.Errorf("ended: %w", err)
		case <-changed:
		case <-o.t.Context().Done():
			return o.t.Context().Err()
		}
	}
}

// with runs a program while fingers lie ready: each time the person is asked,
// the next one is put on the reader.
func (o *office) with(fingers []fprinttest.Finger, run func() (string, error)) (string, error) {
	o.t.Helper()
	o.e.tell(0)
	done := make(chan error, 1)
	var out string
	go func() {
		var err error
		out, err = run()
		done <- err
	}()
	for i, f := range fingers {
		if o.touches(done, true) != nil {
			break
		}
		if err := o.put(f, uint64(100+i)); err != nil {
			o.t.Fatal(err)
		}
	}
	err := <-done
	return out, err
}

// freePort returns a port of loopback that nobody used a moment ago.
func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// daemon runs a server until the test ends.
func (o *office) daemon(program string, args ...string) {
	o.t.Helper()
	cmd := exec.Command(program, args...)
	cmd.Env = o.r.Env
	cmd.Stdout, cmd.Stderr = o.t.Output(), o.t.Output()
	if err := cmd.Start(); err != nil {
		o.t.Fatal(err)
	}
	o.t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
}

// kdc starts MIT Kerberos with PKINIT.
func (o *office) kdc() {
	o.t.Helper()
	port, key := freePort(o.t), newKey(o.t)
	der := o.issue(x509.Certificate{Subject: pkix.Name{CommonName: kdcName}, DNSNames: []string{kdcName}, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}, key.Public())
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		o.t.Fatal(err)
	}
	cert, priv := o.file("kdc.pem", certPEM(der)), o.file("kdc.key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}))
	anchors := o.file("ca.pem", certPEM(o.root.Raw))
	dir := o.r.Dir
	o.file("krb5.conf", fmt.Appendf(nil, `[libdefaults]
 default_realm = %[1]s
 dns_lookup_kdc = false
 dns_lookup_realm = false
 rdns = false
 default_ccache_name = FILE:%[2]s/ccache
[realms]
 %[1]s = {
  kdc = 127.0.0.1:%[3]d
  pkinit_anchors = FILE:%[4]s
  pkinit_kdc_hostname = %[5]s
  pkinit_eku_checking = kpServerAuth
 }
`, realm, dir, port, anchors, kdcName))
	o.file("kdc.conf", fmt.Appendf(nil, `[kdcdefaults]
 kdc_listen = 127.0.0.1:%[3]d
 kdc_tcp_listen = 127.0.0.1:%[3]d
[realms]
 %[1]s = {
  database_name = %[2]s/principal
  key_stash_file = %[2]s/stash
  acl_file = %[2]s/acl
  pkinit_identity = FILE:%[6]s,%[7]s
  pkinit_anchors = FILE:%[4]s
  pkinit_allow_upn = true
  pkinit_eku_checking = scLogin
  pkinit_require_freshness = true
 }
[logging]
 kdc = FILE:%[2]s/kdc.log
`, realm, dir, port, anchors, kdcName, cert, priv))
	o.r.Env = append(o.r.Env, "KRB5_CONFIG="+dir+"/krb5.conf", "KRB5_KDC_PROFILE="+dir+"/kdc.conf")
	o.r.Must("kdb5_util", "create", "-s", "-P", "master", "-r", realm)
	o.r.Must("kadmin.local", "-r", realm, "-q", "addprinc -randkey +requires_preauth taro")
	o.daemon("krb5kdc", "-n", "-r", realm)
	o.listening(port)
}

// listening waits until a server of ours has opened its port.
func (o *office) listening(port int) {
	o.t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err == nil {
			c.Close()
			return
		}
		if time.Now().After(deadline) {
			o.t.Fatal(err)
		}
		<-time.After(20 * time.Millisecond)
	}
}

// kinit asks for a ticket with the card and a PIN.
func (o *office) kinit(pin string) func() (string, error) {
	return func() (string, error) {
		o.r.Run("kdestroy")
		script := fmt.Sprintf("printf '%s\\n' | KRB5_TRACE=/dev/stdout kinit -X X509_user_identity=PKCS11:module_name=%s:certid=01 %s", pin, module, user)
		return o.r.Run("sh", "-c", script)
	}
}

// TestKerberos: MIT Kerberos with PKINIT over pcscd and OpenSC, a real fprintd,
// and the gate. It succeeds with finger, PIN and an affirming result, and fails
// for each that lacks.
func TestKerberos(t *testing.T) {
	pivtest.Need(t, "krb5kdc", "kdb5_util", "kadmin.local", "kinit", "klist", "fprintd-list", "pcscd")
	o := newOffice(t)
	o.kdc()
	out, err := o.with([]fprinttest.Finger{rightFinger}, o.kinit(pinText))
	if err != nil {
		t.Fatalf("kinit with finger and PIN: %v\n%s", err, out)
	}
	if list := o.r.Must("klist"); !strings.Contains(list, "krbtgt/"+realm) {
		t.Errorf("no ticket:\n%s", list)
	}
	if ev := o.e.lastEvent(); ev.Reason != Open || ev.Factor != "finger+pin" {
		t.Errorf("event %+v", ev)
	}
	uses := o.w.uses
	for _, c := range []struct {
		name    string
		before  func()
		fingers []fprinttest.Finger
		pin     string
		want    Reason
	}{
		{"no finger", nil, nil, pinText, FingerWanted},
		{"wrong fingers", nil, []fprinttest.Finger{wrongFinger, 3, 4}, pinText, FingerLocked},
		{"refused", func() { o.w.set(gate.StateRefused, time.Time{}); o.e.attest(o.w.status) }, nil, pinText, NotAttested},
		{"lapsed", func() { o.w.set(gate.StateAffirming, time.Now().Add(-time.Second)); o.e.attest(o.w.status) }, nil, pinText, NotAttested},
	} {
		o.affirm(time.Hour)
		if c.before != nil {
			c.before()
		}
		out, err := o.with(c.fingers, o.kinit(c.pin))
		if err == nil || o.w.uses != uses {
			t.Errorf("%s: a ticket was given, the key used %d times\n%s", c.name, o.w.uses-uses, out)
		}
		if ev := o.e.lastEvent(); ev.Reason != c.want {
			t.Errorf("%s: %s, want %s\n%s", c.name, ev.Reason, c.want, out)
		}
	}
	o.affirm(time.Hour)
	o.ssh()
	o.affirm(time.Hour)
	for i, want := range []int{2, 1, 0} {
		if out, err := o.with(nil, o.kinit("999999")); err == nil || o.e.Status().PINLeft != want {
			t.Errorf("wrong PIN %d: %v, %d tries left, want %d\n%s", i+1, err, o.e.Status().PINLeft, want, out)
		}
	}
	if out, err := o.with([]fprinttest.Finger{rightFinger}, o.kinit(pinText)); err == nil {
		t.Errorf("a blocked PIN: a ticket was given\n%s", out)
	}
}

// ssh logs in at an OpenSSH server with the card, and not while revoked.
func (o *office) ssh() {
	o.t.Helper()
	for _, p := range []string{"ssh", "ssh-keygen", "/usr/sbin/sshd"} {
		if _, err := exec.LookPath(p); err != nil {
			o.t.Fatal(err)
		}
	}
	dir, port := o.r.Dir, freePort(o.t)
	public := o.r.Must("ssh-keygen", "-D", module)
	line, _, _ := strings.Cut(public[strings.Index(public, "ssh-rsa"):], "\n")
	authorized := o.file("authorized_keys", []byte(line+"\n"))
	o.r.Must("ssh-keygen", "-q", "-t", "ecdsa", "-N", "", "-f", filepath.Join(dir, "host"))
	if err := os.MkdirAll("/run/sshd", 0o755); err != nil {
		o.t.Fatal(err)
	}
	config := o.file("sshd_config", fmt.Appendf(nil, "Port %d\nListenAddress 127.0.0.1\nHostKey %s/host\nAuthorizedKeysFile %s\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\nPidFile none\n", port, dir, authorized))
	o.daemon("/usr/sbin/sshd", "-D", "-e", "-f", config)
	ask := o.file("ask", []byte("#!/bin/sh\necho "+pinText+"\n"))
	if err := os.Chmod(ask, 0o700); err != nil {
		o.t.Fatal(err)
	}
	o.r.Env = append(o.r.Env, "SSH_ASKPASS="+ask, "SSH_ASKPASS_REQUIRE=force")
	o.listening(port)
	login := func() (string, error) {
		return o.r.Run("ssh", "-F", "none", "-I", module, "-o", "IdentitiesOnly=no", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
			"-o", "PreferredAuthentications=publickey", "-o", "IdentityFile=none", "-p", fmt.Sprint(port), "root@127.0.0.1", "echo", "in")
	}
	// The fingers are locked out since the Kerberos test.
	if err := o.e.store.change(o.t.Context(), func(s *State) { s.Locked = time.Time{} }); err != nil {
		o.t.Fatal(err)
	}
	if out, err := o.with([]fprinttest.Finger{rightFinger}, login); err != nil || !strings.Contains(out, "in\n") {
		o.t.Errorf("ssh with the card: %v\n%s", err, out)
	}
	o.w.set(gate.StateRefused, time.Time{})
	o.e.attest(o.w.status)
	if out, err := o.with([]fprinttest.Finger{rightFinger}, login); err == nil {
		o.t.Errorf("ssh while revoked:\n%s", out)
	}
}
