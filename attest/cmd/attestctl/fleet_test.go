package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/attest/attester"
	"sekisho/attest/eventlog/logtest"
	"sekisho/attest/fleet"
	"sekisho/attest/tpm"
	"sekisho/attest/tpm/faketpm"
	"sekisho/attest/tpm/tpmtest"
)

// organisation is a verifier by its configuration file, its laptops, and the
// command line of its security team.
type organisation struct {
	t      *testing.T
	dir    string
	socket string
	server string // CA of the verifier's certificate, PEM
	maker  *x509.Certificate
	key    crypto.Signer // of maker
	at     netip.AddrPort
}

const verifierName = "verifier.test"

func (o *organisation) file(name string) string { return filepath.Join(o.dir, name) }

// certificate writes name.pem and name.key; parent nil makes a CA.
func (o *organisation) certificate(name string, parent *x509.Certificate, signer crypto.Signer) (*x509.Certificate, crypto.Signer) {
	o.t.Helper()
	must := func(err error) {
		o.t.Helper()
		if err != nil {
			o.t.Fatal(err)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: name}, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	if parent == nil {
		template.IsCA, template.KeyUsage, parent, signer = true, x509.KeyUsageCertSign, template, key
	} else {
		template.DNSNames, template.ExtKeyUsage = []string{name}, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	must(err)
	private, err := x509.MarshalPKCS8PrivateKey(key)
	must(err)
	must(os.WriteFile(o.file(name+".pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	must(os.WriteFile(o.file(name+".key"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), 0o600))
	cert, err := x509.ParseCertificate(der)
	must(err)
	return cert, key
}

// ctl runs attestctl and demands its exit status.
func (o *organisation) ctl(want int, words ...string) string {
	o.t.Helper()
	var out, errs bytes.Buffer
	words = append([]string{"-socket", o.socket}, words...)
	if got := administer(o.t.Context(), words, &out, &errs); got != want {
		o.t.Fatalf("%v: exit %d, want %d\n%s%s", words, got, want, &out, &errs)
	}
	return out.String() + errs.String()
}

// setup is what a test adds to an organisation.
type setup struct {
	makers    []string // files: TPM makers beside its own
	approvers string   // file
}

// newOrganisation starts a verifier that accepts policies of two of three keys.
func newOrganisation(t *testing.T, with setup) *organisation {
	t.Helper()
	dir, err := os.MkdirTemp("", "attestctl") // a unix socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	o := &organisation{t: t, dir: dir, socket: filepath.Join(dir, "admin.sock")}
	servers, serverKey := o.certificate("servers", nil, nil)
	o.certificate("devices", nil, nil)
	o.certificate(verifierName, servers, serverKey)
	o.maker, o.key = o.certificate("maker", nil, nil)
	pemOf, err := os.ReadFile(o.file("servers.pem"))
	if err != nil {
		t.Fatal(err)
	}
	o.server = string(pemOf)
	for _, k := range []string{"a", "b", "c"} {
		o.ctl(0, "policy", "keygen", o.file(k))
	}
	config, err := json.Marshal(map[string]any{
		"id": verifierName, "organization": "Test City", "listen": "127.0.0.1:0", "certificate": o.file(verifierName + ".pem"), "key": o.file(verifierName + ".key"),
		"ca_certificate": o.file("devices.pem"), "ca_key": o.file("devices.key"), "store": o.file("store"), "ek_roots": append(with.makers, o.file("maker.pem")), "approvers": with.approvers,
		"certificate_lifetime": "8s", "policy_keys": []string{o.file("a.pub"), o.file("b.pub"), o.file("c.pub")}, "policy_threshold": 2, "mass_refusal_percent": 50,
	})
	if err != nil {
		t.Fatal(err)
	}
	c, err := fleet.ParseServerConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	ctx, cancel := context.WithCancel(context.Background())
	server, err := c.Open(ctx, time.Now, log)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", c.Listen)
	if err != nil {
		t.Fatal(err)
	}
	o.at = l.Addr().(*net.TCPAddr).AddrPort()
	var wg sync.WaitGroup
	wg.Go(func() { fleet.Serve(ctx, l, server.Certificate, server.Service, log) })
	wg.Go(func() { fleet.ServeAdmin(ctx, o.socket, server.Service, log) })
	t.Cleanup(func() {
		cancel()
		wg.Wait()
		server.Close()
	})
	o.until("the verifier", func(s string) bool { return !strings.Contains(s, "attestctl:") }, "ticket", "list")
	return o
}

// laptop starts attestd's part with a TPM that has measured boot.
func (o *organisation) laptop(boot *logtest.Log, ticket string, open func() (attester.Hardware, error)) *attester.Attester {
	o.t.Helper()
	updates := &attest.Updates{Threshold: 2}
	for _, k := range []string{"a", "b", "c"} {
		data, err := os.ReadFile(o.file(k + ".pub"))
		if err != nil {
			o.t.Fatal(err)
		}
		updates.Keys = append(updates.Keys, string(data))
	}
	state := attester.StateFile{Path: filepath.Join(o.t.TempDir(), "state")}
	if err := os.WriteFile(state.Path, make([]byte, attester.PartitionSize), 0o600); err != nil {
		o.t.Fatal(err)
	}
	if err := attester.WriteTicket(state, attest.NewTicket(ticket)); err != nil {
		o.t.Fatal(err)
	}
	a, err := attester.New(attester.Config{
		Organization: &attest.Organization{Name: "Test City", CA: o.server, Verifiers: []attest.Endpoint{{Address: o.at, ServerName: verifierName}}, Updates: updates},
		OpenTPM:      open, EventLog: func() ([]byte, error) { return boot.Bytes(), nil }, Model: "Test Laptop",
		State: state, Now: time.Now, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		o.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { a.Run(ctx) })
	o.t.Cleanup(func() {
		cancel()
		wg.Wait()
	})
	return a
}

// until runs attestctl until its output satisfies ok.
func (o *organisation) until(what string, ok func(string) bool, words ...string) {
	o.t.Helper()
	ctx, cancel := context.WithTimeout(o.t.Context(), 90*time.Second)
	defer cancel()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		var out bytes.Buffer
		administer(ctx, append([]string{"-socket", o.socket}, words...), &out, &out)
		if ok(out.String()) {
			return
		}
		select {
		case <-ctx.Done():
			o.t.Fatalf("%s did not come: %v says\n%s", what, words, &out)
		case <-tick.C:
		}
	}
}

// reference writes the reference values of an image.
func (o *organisation) reference(image logtest.Image, version string) string {
	o.t.Helper()
	data, err := json.Marshal(image.Reference("sekisho", version))
	if err == nil {
		err = os.WriteFile(o.file("ref-"+version), data, 0o600)
	}
	if err != nil {
		o.t.Fatal(err)
	}
	return o.file("ref-" + version)
}

// TestPolicyLife is the life of an organisation's policies as its security team
// sees it: attestd's part on twelve laptops, one of them on a real TPM in
// software (swtpm) where that may run, and nothing but attestctl.
func TestPolicyLife(t *testing.T) {
	const laptops = 12
	var with setup
	var real *tpmtest.Emulator
	if os.Geteuid() == 0 && os.Getenv("SEKISHO_TEST") == "all" {
		real = tpmtest.Start(t)
		with.makers = append(with.makers, real.Roots)
	}
	o := newOrganisation(t, with)
	now, next := logtest.Image{Kernel: "1", Initramfs: "1", Cmdline: "quiet"}, logtest.Image{Kernel: "2", Initramfs: "2", Cmdline: "quiet"}
	ticket := strings.Fields(o.ctl(0, "enroll", "create", "-uses", fmt.Sprint(laptops)))[0]

	boot := now.Boot()
	for i := range laptops {
		dev := faketpm.New()
		dev.PCRs = boot.PCRs()
		if err := dev.Certify(o.maker, o.key, nil); err != nil {
			t.Fatal(err)
		}
		open := func() (attester.Hardware, error) { return dev, nil }
		if i == 0 && real != nil {
			open = measured(t, real, boot)
		}
		o.laptop(boot, ticket, open)
	}

	// Without a policy nobody is affirmed, and the exit status says so.
	o.until("a refusal", func(s string) bool { return strings.Contains(s, "no-policy") }, "result", "last")
	if s := o.ctl(1, "result", "last", "-lang", "ja"); !strings.Contains(s, "有効な署名済みポリシーがありません") {
		t.Error(s)
	}
	// One signature is not enough; two are.
	o.ctl(0, "policy", "draft", o.file("p1.json"), "-organization", "Test City", "-references", o.reference(now, "1"))
	keys := o.file("a.pub") + "," + o.file("b.pub") + "," + o.file("c.pub")
	sign := func(draft, signed string) {
		o.ctl(0, "policy", "sign", o.file(draft), "-key", o.file("a.key"), "-out", o.file(signed))
		o.ctl(1, "policy", "verify", o.file(signed), "-keys", keys, "-threshold", "2")
		o.ctl(1, "policy", "publish", o.file(signed))
		o.ctl(0, "policy", "sign", o.file(signed), "-key", o.file("c.key"))
		o.ctl(0, "policy", "verify", o.file(signed), "-keys", keys, "-threshold", "2")
	}
	sign("p1.json", "p1.cose")
	o.ctl(0, "policy", "publish", o.file("p1.cose"))
	all := func(s string) bool { return strings.Count(s, " sekisho 1\n") == laptops }
	o.until("every laptop affirmed", all, "device", "list")
	o.ctl(0, "result", "last")
	device := strings.Fields(strings.Split(o.ctl(0, "device", "list"), "\n")[1])[0]
	o.ctl(0, "device", "show", device)

	// Firmware is counted by model, here and elsewhere, and only reported.
	summary := o.file("elsewhere.json")
	other := strings.Replace(o.ctl(0, "firmware", "export"), "Test City", "Other City", 1)
	if err := os.WriteFile(summary, []byte(other), 0o600); err != nil {
		t.Fatal(err)
	}
	o.ctl(0, "firmware", "import", summary)
	o.until("the other city's laptops counted", func(string) bool {
		list := strings.Split(strings.TrimSpace(o.ctl(0, "report", "list", device)), "\n")
		get := []string{"-socket", o.socket, "report", "get", strings.Fields(list[len(list)-1])[0], "-out", o.file("report")}
		if administer(t.Context(), get, io.Discard, io.Discard) != exitPass {
			return false // a report is named a moment before it is in the archive
		}
		return strings.Contains(o.offline(0, "explain", o.file("report"), "-lang", "en"), fmt.Sprintf("seen on %d other devices of 2 organisations, of the same model (\"Test Laptop\")", 2*laptops-1))
	}, "policy", "status")
	if err := os.WriteFile(o.file("report.pub"), []byte(o.ctl(0, "report", "key")), 0o600); err != nil {
		t.Fatal(err)
	}
	if s := o.offline(0, "verify", o.file("report"), "-key", o.file("report.pub"), "-policy-keys", keys, "-threshold", "2", "-ek-roots", o.file("maker.pem")); !strings.Contains(s, "the same bytes") || strings.Count(s, "verified") != 3 {
		t.Error(s)
	}
	o.offline(2, "verify", o.file("report"), "-ek-roots", o.file("servers.pem"))

	// A policy for the next image alone: simulated, refused, then in the shadow.
	o.ctl(0, "policy", "draft", o.file("p2.json"), "-supersedes", o.file("p1.cose"))
	bundle, err := os.ReadFile(o.file("p2.json"))
	if err != nil {
		t.Fatal(err)
	}
	var b map[string]any
	if err := json.Unmarshal(bundle, &b); err != nil {
		t.Fatal(err)
	}
	b["references"] = []map[string]any{{"values": next.Reference("sekisho", "2")}}
	if bundle, err = json.Marshal(b); err == nil {
		err = os.WriteFile(o.file("p2.json"), bundle, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	// A laptop counts as affirmed a moment before its report is in the archive.
	o.until("every laptop's report", func(s string) bool {
		return strings.Contains(s, fmt.Sprintf("拒否されるもの %d 台", laptops)) && strings.Contains(s, "承認された値と異なります")
	}, "policy", "simulate", o.file("p2.json"), "-lang", "ja")
	sign("p2.json", "p2.cose")
	if s := o.ctl(1, "policy", "publish", o.file("p2.cose")); !strings.Contains(s, "refuse") {
		t.Error(s)
	}
	o.ctl(0, "policy", "publish", o.file("p2.cose"), "-shadow")
	o.until("the shadow's difference", func(s string) bool {
		return strings.Contains(s, `"sekisho.shadow"`) && strings.Contains(s, `"image-mismatch"`)
	}, "result", "last", "-json")
	o.ctl(0, "result", "last") // not enforced
	o.ctl(0, "policy", "unshadow")

	// Suspended, and back: the whole organisation, then the policy in force.
	for _, what := range [][]string{{"organization"}, {"policy", "1"}} {
		o.ctl(2, append([]string{"suspend"}, what...)...) // without a reason
		o.ctl(0, append([]string{"suspend", "-reason", "drill"}, what...)...)
		o.until("the suspension of "+what[0], func(s string) bool {
			return strings.Contains(s, `"suspended"`) || strings.Contains(s, `"no-policy"`)
		}, "result", "last", "-json")
		if s := o.ctl(0, "suspend", "list"); !strings.Contains(s, "drill") {
			t.Error(s)
		}
		o.ctl(0, append([]string{"resume"}, what...)...)
		o.until("the end of the suspension of "+what[0], func(s string) bool { return strings.Contains(s, `"affirming"`) }, "result", "last", "-json")
	}
	o.ctl(2, "suspend", "policy", "99", "-reason", "none such")
	o.ctl(2, "suspend", "device", "x", "-reason", "none such")
	o.ctl(0, "suspend", "user", "sato", "-reason", "lost card")
	o.ctl(0, "resume", "user", "sato")

	// Forced all the same: the mass refusal holds and alarms.
	o.ctl(0, "policy", "publish", o.file("p2.cose"), "-force")
	o.until("the hold", func(s string) bool { return strings.Contains(s, "HELD") }, "policy", "status")
	o.ctl(1, "policy", "status")
	o.ctl(1, "result", "last")
	o.until("its refusal", func(s string) bool { return strings.Contains(s, `"status": "contraindicated"`) }, "device", "show", device, "-json")
	o.ctl(1, "device", "show", device)
	o.ctl(2, "policy", "publish", o.file("p1.cose"))
	o.ctl(0, "policy", "release")
}

// offline runs a command that needs no verifier.
func (o *organisation) offline(want int, words ...string) string {
	o.t.Helper()
	var out bytes.Buffer
	if exit, ok := reports(words, &out, &out); !ok || exit != want {
		o.t.Fatalf("%v: exit %d, want %d\n%s", words, exit, want, &out)
	}
	return out.String()
}

// measured has a TPM measure boot and returns how to open it.
func measured(t *testing.T, e *tpmtest.Emulator, boot *logtest.Log) func() (attester.Hardware, error) {
	t.Helper()
	dev, err := tpm.Open(e.Socket)
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range boot.Extensions {
		if err := dev.Extend(x.PCR, x.Digest); err != nil {
			t.Fatal(err)
		}
	}
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
	return func() (attester.Hardware, error) { return tpm.Open(e.Socket) }
}
