package lab

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/hostos/login"
	"sekisho/hostos/login/fprint/fprinttest"
	"sekisho/images/lab/hook"
)

// What TestLogon signs in with.
const (
	logonRealm  = "LAB.TEST"
	logonUser   = "taro@" + logonRealm
	kdcName     = "kdc.lab.test"
	kdcAddress  = "10.254.0.80"
	cardPIN     = "123456"
	pkcs11      = "/usr/lib/x86_64-linux-gnu/opensc-pkcs11.so"
	readerPath  = "/run/sekisho/login/reader"
	rightFinger = fprinttest.Finger(1)
	wrongFinger = fprinttest.Finger(2)

	runTime = 8 * time.Minute // of one command; seen: 10 s
)

// desk is somebody at the laptop: its card's clients and its fingerprint
// reader.
type desk struct {
	*bench
	device string
	touch  uint64
	told   time.Time // of the last prompt that was answered
	runs   int
}

// TestLogon is one boot of a laptop whose card is issued by permits alone, and
// that signs in at a KDC behind the tunnel with Debian's pcscd, OpenSC and MIT
// Kerberos: with a finger, the PIN and an affirming result, and not otherwise.
func TestLogon(t *testing.T) {
	if os.Getenv("SEKISHO_LOGON") == "" {
		t.Skip("builds an image of its own and takes some ten minutes, so it is no part of make test: SEKISHO_LOGON=1 runs it")
	}
	b := realLab(t, func(l *Lab) { l.Link, l.Logon = attest.LinkSerial, true })
	// The page is read before anybody has signed in: a server of the city's for
	// biometrics is reached as early.
	_, err := b.Up(t.Context(), Boot{Life: 2 * certificateLife})
	must(t, err)
	d := &desk{bench: b}
	d.device, err = d.deviceID(t.Context())
	must(t, err)
	if s := d.status(t); s.State != string(login.NotSet) || s.Inserted {
		t.Errorf("before the card is issued: %+v", s)
	}
	ca := newLogonCA(t)
	d.kdc(t, ca)
	d.write(t, "/tmp/ca.pem", ca.pem())
	d.write(t, "/tmp/krb5.conf", krb5Conf("/tmp/ca.pem", "FILE:/tmp/ccache"))
	d.detach(t, "cardcheck pcscd > /tmp/pcscd.log 2>&1")

	b.bootStep(t, "the card is issued by permits", func(t *testing.T) { d.issue(t, ca) })
	b.bootStep(t, "kinit with finger and PIN", func(t *testing.T) {
		if out, rc := d.kinit(t, cardPIN, rightFinger); rc != "0" {
			t.Fatalf("exit %s: %s", rc, out)
		}
		if out, _ := d.run(t, "", "klist.mit"); !strings.Contains(out, "krbtgt/"+logonRealm) {
			t.Errorf("no ticket: %s", out)
		}
		d.event(t, login.Open, "finger+pin")
	})
	t.Run("pkcs11-tool --test", func(t *testing.T) {
		if out, rc := d.run(t, "", "pkcs11-tool --login --pin "+cardPIN+" --test", slices.Repeat([]fprinttest.Finger{rightFinger}, 64)...); rc != "0" || !strings.Contains(out, "No errors") {
			t.Errorf("exit %s: %s", rc, out)
		}
	})
	t.Run("no finger", func(t *testing.T) {
		d.refused(t, cardPIN)
		d.event(t, login.FingerWanted, "")
	})
	t.Run("wrong fingers", func(t *testing.T) {
		// A slow emulation may take longer than one prompt waits.
		for f := wrongFinger; d.last(t).Reason != login.FingerLocked; f += 3 {
			if f > 5*wrongFinger {
				t.Fatalf("no lock-out: %+v", d.last(t))
			}
			d.refused(t, cardPIN, f, f+1, f+2)
		}
	})
	t.Run("wrong PIN", func(t *testing.T) {
		d.refused(t, "999999")
		d.event(t, login.PINWrong, "")
	})
	t.Run("PIN blocked, and unblocked by a permit", func(t *testing.T) {
		for left := d.status(t).PINLeft; left > 0; left-- {
			d.run(t, "", "pkcs11-tool --login --pin 999999 --list-objects")
			if now := d.status(t).PINLeft; now != left-1 {
				t.Fatalf("%d tries left after a wrong PIN, %d before", now, left)
			}
		}
		d.event(t, login.PINBlocked, "")
		d.refused(t, cardPIN, rightFinger)
		must(t, d.cardPermit(t.Context(), "", d.device, logonUser, "unblock"))
		b.until(t, "the PIN's tries to be back", func(context.Context) bool { return d.status(t).PINLeft == 3 })
	})
	t.Run("lapsed: the card is out, and back with a new result", func(t *testing.T) {
		must(t, b.Kill(t.Context(), "verifier"))
		d.untilCard(t, false)
		if s := d.status(t); s.Reason != login.NotAttested || !strings.Contains(s.Detail, "not attested") {
			t.Errorf("status %+v", s)
		}
		d.refused(t, cardPIN, rightFinger)
		must(t, b.StartVerifier(t.Context()))
		d.untilCard(t, true)
	})
	t.Run("the audit", d.audit)
	t.Run("revoked while signed in: the card is out", func(t *testing.T) {
		_, err := b.attestctl(t.Context(), nil, "device", "retire", d.device, "-reason", "lost")
		must(t, err)
		d.untilCard(t, false)
		if s := d.status(t); s.Reason != login.NotAttested {
			t.Errorf("status %+v", s)
		}
		d.refused(t, cardPIN, rightFinger)
	})
	b.cleanUplink(t, true)
}

// issue makes the card what it is by permits of two approvers: key,
// certificate by the organisation's CA once attestctl found the key to be in
// this laptop's TPM, PIN, finger.
func (d *desk) issue(t *testing.T, ca *logonCA) {
	must(t, d.cardPermit(t.Context(), "", d.device, logonUser, "setup", "-name", "山田太郎"))
	request := d.lab("site", "request.json")
	d.until(t, "the certificate request", func(ctx context.Context) bool {
		out, err := d.attestctl(ctx, nil, "card", "request", "-json", d.device)
		return err == nil && writeFile(request, out, 0o600) == nil
	})
	out, err := d.attestctl(t.Context(), nil, "card", "check", request, "-release", d.out("release.json"), "-device", d.device, "-kind", attest.LogonRSA2048)
	must(t, err)
	t.Logf("%s", out)
	data, err := os.ReadFile(request)
	must(t, err)
	var r struct{ CSR []byte }
	must(t, json.Unmarshal(data, &r))
	block, _ := pem.Decode(r.CSR)
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	must(t, err)
	chain := d.lab("site", "card.pem")
	must(t, writeFile(chain, certPEM(ca.issue(t, &x509.Certificate{Subject: pkix.Name{CommonName: csr.Subject.CommonName}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, UnknownExtKeyUsage: []asn1.ObjectIdentifier{{1, 3, 6, 1, 4, 1, 311, 20, 2, 2}},
		ExtraExtensions: []pkix.Extension{upn(t, logonUser)}}, csr.PublicKey)), 0o600))
	must(t, d.cardPermit(t.Context(), "", d.device, logonUser, "import", "-chain", chain))
	must(t, d.cardPermit(t.Context(), cardPIN, d.device, logonUser, "pin"))
	must(t, d.cardPermit(t.Context(), "", d.device, logonUser, "enrol", "-finger", "right-index-finger"))
	d.until(t, "the finger to be enrolled", func(context.Context) bool {
		s := d.answer(t, rightFinger)
		return s.Fingers == 1 && s.PINLeft == 3
	})
	d.untilCard(t, true)
}

// status is logind's.
func (d *desk) status(t *testing.T) login.Status {
	t.Helper()
	a, err := d.Call(t.Context(), hook.Request{Target: hook.Host, Socket: login.Socket, Method: http.MethodGet, Path: "/v1/status"})
	must(t, err)
	var s login.Status
	must(t, json.Unmarshal(a.Stdout, &s))
	return s
}

// answer puts a finger on the reader if the person is asked to, once for each
// time. The zero Finger is nobody's.
func (d *desk) answer(t *testing.T, f fprinttest.Finger) login.Status {
	t.Helper()
	s := d.status(t)
	if s.State != "touch" || s.Since.Equal(d.told) || f == 0 {
		return s
	}
	d.touch++
	a, err := d.Call(t.Context(), hook.Request{Target: hook.Host, Argv: []string{"labhook", "send", readerPath}, Stdin: fprinttest.Message(f.Picture(d.touch))})
	must(t, err)
	if a.Exit != 0 { // nobody waits for a finger any more
		return s
	}
	d.told = s.Since
	return s
}

// run runs a command of the work domain's shell, putting one finger after the
// other on the reader when it asks for one, and returns what it said and its
// exit status.
func (d *desk) run(t *testing.T, stdin, command string, fingers ...fprinttest.Finger) (out, exit string) {
	t.Helper()
	d.runs++
	base := fmt.Sprintf("/tmp/run%d", d.runs)
	d.write(t, base+".in", stdin)
	began := time.Now()
	d.detach(t, fmt.Sprintf("export KRB5_CONFIG=/tmp/krb5.conf; %s < %s.in > %s.out 2>&1; echo $? > %s.exit", command, base, base, base))
	for looked := began; ; {
		if time.Since(began) > runTime {
			t.Fatalf("%s did not end: %s", command, d.read(t, base+".out"))
		}
		var next fprinttest.Finger
		if len(fingers) > 0 {
			next = fingers[0]
		}
		before := d.told
		if d.answer(t, next); !d.told.Equal(before) {
			fingers = fingers[1:]
		}
		// A look into the work domain costs it time, of which a prompt has little.
		if time.Since(looked) < 2*time.Second {
			continue
		}
		if exit = strings.TrimSpace(d.read(t, base+".exit")); exit != "" {
			break
		}
		looked = time.Now()
	}
	t.Logf("%s: exit %s after %.1f s", command, exit, time.Since(began).Seconds())
	return d.read(t, base+".out"), exit
}

// kinit asks the KDC for a ticket with the card.
func (d *desk) kinit(t *testing.T, pin string, fingers ...fprinttest.Finger) (out, exit string) {
	t.Helper()
	return d.run(t, pin+"\n", "kinit.mit -X X509_user_identity=PKCS11:module_name="+pkcs11+":certid=01 "+logonUser, fingers...)
}

// refused fails the test if a ticket is given.
func (d *desk) refused(t *testing.T, pin string, fingers ...fprinttest.Finger) {
	t.Helper()
	out, exit := d.kinit(t, pin, fingers...)
	if exit == "0" {
		t.Errorf("a ticket was given: %s", out)
	}
	lines := strings.Split(strings.TrimSpace(out), "\n")
	t.Logf("kinit: %s", lines[len(lines)-1])
}

func (d *desk) detach(t *testing.T, command string) {
	t.Helper()
	a, err := d.Call(t.Context(), hook.Request{Target: hook.Work, Detach: true, Argv: []string{"gosh", "-c", command}})
	if err != nil || a.Error != "" {
		t.Fatalf("%s: %v %s", command, err, a.Error)
	}
}

func (d *desk) write(t *testing.T, path, text string) {
	t.Helper()
	a, err := d.Call(t.Context(), hook.Request{Target: hook.Work, Argv: []string{"gosh", "-c", "cat > " + path}, Stdin: []byte(text)})
	if err != nil || a.Exit != 0 {
		t.Fatalf("%s: %v %s", path, err, a.Stderr)
	}
}

// read is the content of a file in the work domain, empty while there is none.
func (d *desk) read(t *testing.T, path string) string {
	t.Helper()
	a, err := d.Exec(t.Context(), hook.Work, "cat", path)
	must(t, err)
	return string(a.Stdout)
}

// last is the card's newest event.
func (d *desk) last(t *testing.T) login.Event {
	t.Helper()
	s := d.status(t)
	if len(s.Events) == 0 {
		t.Fatal("no events")
	}
	return s.Events[len(s.Events)-1]
}

// event fails the test unless the newest event is this one.
func (d *desk) event(t *testing.T, want login.Reason, factor string) {
	t.Helper()
	if e := d.last(t); e.Reason != want || e.Factor != factor {
		t.Errorf("want %s %s; the newest event is %+v", want, factor, e)
	}
}

// untilCard waits until pcscd sees the card come or go.
func (d *desk) untilCard(t *testing.T, in bool) {
	t.Helper()
	want := map[bool]string{true: "Yes", false: "No "}[in]
	d.until(t, fmt.Sprintf("the card to be in the reader: %v", in), func(ctx context.Context) bool {
		if d.status(t).Inserted != in {
			return false
		}
		a, err := d.Exec(ctx, hook.Work, "opensc-tool", "--list-readers")
		return err == nil && strings.Contains(string(a.Stdout), want)
	})
}

// audit finds every logon and permit at the verifier.
func (d *desk) audit(t *testing.T) {
	var list []attest.LogonEvent
	d.until(t, "the events at the verifier", func(ctx context.Context) bool {
		out, err := d.attestctl(ctx, nil, "card", "logons", "-json", d.device)
		events := d.status(t).Events
		return err == nil && json.Unmarshal(out, &list) == nil && len(list) > 0 && list[len(list)-1].Number >= events[len(events)-1].Number
	})
	seen := map[string]bool{}
	for i, e := range list {
		seen[e.Reason] = true
		if e.Permit != "" {
			seen[e.What] = true
		}
		if e.Number != uint64(i+1) || e.User != logonUser || !strings.Contains(e.Result, d.device) {
			t.Errorf("event %d: %+v", i+1, e)
		}
	}
	for _, want := range []string{"open", "finger-wanted", "finger-locked", "pin-wrong", "pin-blocked", "setup", "import", "pin", "enrol right-index-finger", "unblock"} {
		if !seen[want] {
			t.Errorf("the audit has no %q: %+v", want, list)
		}
	}
}

// logonCA issues certificates for cards and KDCs, as Active Directory's would.
type logonCA struct {
	cert *x509.Certificate
	key  *rsa.PrivateKey
}

func newLogonCA(t *testing.T) *logonCA {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	ca := &logonCA{key: key}
	ca.cert = &x509.Certificate{Subject: pkix.Name{CommonName: "Lab logon CA"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign}
	der := ca.issue(t, ca.cert, key.Public())
	ca.cert, err = x509.ParseCertificate(der)
	must(t, err)
	return ca
}

func (ca *logonCA) issue(t *testing.T, c *x509.Certificate, public any) []byte {
	t.Helper()
	c.SerialNumber, c.NotBefore, c.NotAfter = big.NewInt(time.Now().UnixNano()), time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, c, ca.cert, public, ca.key)
	must(t, err)
	return der
}

func (ca *logonCA) pem() string { return string(certPEM(ca.cert.Raw)) }

func certPEM(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// upn is the subjectAltName of a smart card logon certificate: the user
// principal name (Microsoft, "Smart card certificate requirements").
func upn(t *testing.T, name string) pkix.Extension {
	t.Helper()
	type otherName struct {
		ID    asn1.ObjectIdentifier
		Value asn1.RawValue
	}
	text, err := asn1.MarshalWithParams(name, "utf8")
	must(t, err)
	inner, err := asn1.MarshalWithParams(otherName{asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 311, 20, 2, 3},
		asn1.RawValue{Class: asn1.ClassContextSpecific, IsCompound: true, Bytes: text}}, "tag:0")
	must(t, err)
	san, err := asn1.Marshal([]asn1.RawValue{{FullBytes: inner}})
	must(t, err)
	return pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Value: san}
}

// krb5Conf is MIT Kerberos' for the KDC behind the tunnel.
func krb5Conf(anchors, cache string) string {
	return fmt.Sprintf(`[libdefaults]
 default_realm = %[1]s
 dns_lookup_kdc = false
 dns_lookup_realm = false
 rdns = false
 udp_preference_limit = 1
 default_ccache_name = %[5]s
[realms]
 %[1]s = {
  kdc = %[2]s:88
  pkinit_anchors = FILE:%[3]s
  pkinit_kdc_hostname = %[4]s
  pkinit_eku_checking = kpServerAuth
 }
`, logonRealm, kdcAddress, anchors, kdcName, cache)
}

// kdc starts MIT Kerberos with PKINIT in LGWAN, which only the tunnel reaches.
func (d *desk) kdc(t *testing.T, ca *logonCA) {
	t.Helper()
	dir := d.lab("kdc")
	must(t, os.RemoveAll(dir))
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	der := ca.issue(t, &x509.Certificate{Subject: pkix.Name{CommonName: kdcName}, DNSNames: []string{kdcName}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}, key.Public())
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	anchors := filepath.Join(dir, "ca.pem")
	for name, data := range map[string][]byte{
		"ca.pem": []byte(ca.pem()), "kdc.pem": certPEM(der), "kdc.key": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}),
		"krb5.conf": []byte(krb5Conf(anchors, "FILE:"+dir+"/ccache")),
		"kdc.conf": fmt.Appendf(nil, `[kdcdefaults]
 kdc_listen = %[3]s:88
 kdc_tcp_listen = %[3]s:88
[realms]
 %[1]s = {
  database_name = %[2]s/principal
  key_stash_file = %[2]s/stash
  acl_file = %[2]s/acl
  pkinit_identity = FILE:%[2]s/kdc.pem,%[2]s/kdc.key
  pkinit_anchors = FILE:%[4]s
  pkinit_allow_upn = true
  pkinit_eku_checking = scLogin
  pkinit_require_freshness = true
 }
[logging]
 kdc = FILE:%[2]s/kdc.log
`, logonRealm, dir, kdcAddress, anchors),
	} {
		must(t, writeFile(filepath.Join(dir, name), data, 0o600))
	}
	with := []string{"env", "KRB5_CONFIG=" + dir + "/krb5.conf", "KRB5_KDC_PROFILE=" + dir + "/kdc.conf"}
	must(t, command(t.Context(), "", append(slices.Clone(with), "kdb5_util", "create", "-s", "-P", "master", "-r", logonRealm)...))
	must(t, command(t.Context(), "", append(slices.Clone(with), "kadmin.local", "-r", logonRealm, "-q", "addprinc -randkey +requires_preauth taro")...))
	_, err = d.start(spec{name: "kdc", namespace: "sekisho-lgwan", argv: append(slices.Clone(with), "krb5kdc", "-n", "-r", logonRealm)})
	must(t, err)
	must(t, d.listening(t.Context(), "kdc", "sekisho-lgwan", kdcAddress+":88"))
	t.Cleanup(func() {
		if log, err := os.ReadFile(filepath.Join(dir, "kdc.log")); err == nil && t.Failed() {
			t.Logf("the KDC:\n%s", bytes.TrimSpace(log))
		}
	})
}

// cardPermit makes a permit for the laptop's card by attestctl's words, has it
// signed by both approvers and presents it.
func (d *desk) cardPermit(ctx context.Context, stdin, device, user, do string, more ...string) error {
	file := d.lab("site", "permit.json")
	signed, err := d.attestctl(ctx, []byte(stdin), append([]string{"card", "permit", "-json", "-device", device, "-user", user, "-do", do, "-reason", "lab"}, more...)...)
	if err != nil {
		return err
	}
	for _, name := range approvers {
		if err := writeFile(file, signed, 0o600); err != nil {
			return err
		}
		if signed, err = d.attestctl(ctx, nil, "approval", "sign", "-json", "-key", d.lab("pki", name+".key"), file); err != nil {
			return err
		}
	}
	if err := writeFile(file, signed, 0o600); err != nil {
		return err
	}
	_, err = d.attestctl(ctx, nil, "card", "add", file)
	return err
}

// deviceID is the one laptop's id.
func (b *bench) deviceID(ctx context.Context) (string, error) {
	out, err := b.attestctl(ctx, nil, "device", "list", "-json")
	if err != nil {
		return "", err
	}
	var list []struct {
		ID string `json:"device_id"`
	}
	if err := json.Unmarshal(out, &list); err != nil || len(list) != 1 {
		return "", fmt.Errorf("%d devices, want one: %v", len(list), err)
	}
	return list[0].ID, nil
}
