package attester_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
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
	"sekisho/attest/ek"
	"sekisho/attest/eventlog/logtest"
	"sekisho/attest/fleet"
	"sekisho/attest/gate"
	"sekisho/attest/store"
	"sekisho/attest/tpm"
	"sekisho/attest/tpm/faketpm"
	"sekisho/attest/tpm/tpmtest"
	"sekisho/attest/verifier"
)

const name = "verifier.test"

var image = logtest.Image{Kernel: "kernel 1", Initramfs: "initramfs 1", Cmdline: "quiet"}

// ca is a certificate authority of a test.
type ca struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newCA(t *testing.T, cn string) ca {
	t.Helper()
	key := newKey(t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: cn}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return ca{cert, key}
}

func (c ca) pem() string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.cert.Raw}))
}

func (c ca) server(t *testing.T) tls.Certificate {
	t.Helper()
	key := newKey(t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, c.cert, key.Public(), c.key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// site is a verifier in the test's process.
type site struct {
	escrowKey string // PEM; may be empty
	t         *testing.T
	servers   ca
	devices   ca
	service   *fleet.Service
	store     *store.Store
	storeDir  string
	address   string
	proxy     netip.AddrPort // before it; may be zero
	stop      func()
}

func newSite(t *testing.T, roots string, lifetime time.Duration, refs ...attest.ReferenceValues) *site {
	t.Helper()
	s := &site{t: t, servers: newCA(t, "servers"), devices: newCA(t, "devices"), storeDir: t.TempDir()}
	pool := ek.NewRoots()
	data, err := os.ReadFile(roots)
	if err != nil {
		t.Fatal(err)
	}
	if err := pool.AddPEM(data); err != nil {
		t.Fatal(err)
	}
	issuer, err := verifier.NewIssuer(s.devices.cert, s.devices.key, "Test City", lifetime)
	if err != nil {
		t.Fatal(err)
	}
	if s.store, err = store.Open(t.Context(), store.Config{Dir: s.storeDir}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.store.Close() })
	s.service, err = fleet.NewService(t.Context(), fleet.Config{Verifier: name, Organization: "Test City", Lifetime: lifetime, Store: s.store, Issuer: issuer, EKRoots: pool, References: refs, Now: time.Now, Escrows: true,
		NetworkIssuer: newNetworkIssuer(t, s.devices.cert)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.service.Close)
	s.start("127.0.0.1:0")
	t.Cleanup(func() { s.stop() })
	return s
}

func newNetworkIssuer(t *testing.T, devices *x509.Certificate) *verifier.NetworkIssuer {
	t.Helper()
	c := newCA(t, "networks")
	i, err := verifier.NewNetworkIssuer(c.cert, c.key, devices, "Test City", verifier.MinNetworkLifetime)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// start serves on address; s.stop ends that.
func (s *site) start(address string) {
	s.t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		s.t.Fatal(err)
	}
	s.address = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	cert := s.servers.server(s.t)
	wg.Go(func() { fleet.Serve(ctx, l, cert, s.service, slog.New(slog.DiscardHandler)) })
	s.stop = func() {
		cancel()
		wg.Wait()
	}
}

func (s *site) enrolled() []fleet.Device {
	s.t.Helper()
	list, err := s.service.Devices(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	return list
}

func (s *site) ticket() attest.Ticket {
	s.t.Helper()
	ticket, _, err := s.service.CreateTicket(s.t.Context(), 1, time.Hour)
	if err != nil {
		s.t.Fatal(err)
	}
	return ticket
}

func (s *site) organization() *attest.Organization {
	return &attest.Organization{
		Name: "Test City", CA: s.servers.pem(),
		Verifiers: []attest.Endpoint{{Address: netip.MustParseAddrPort(s.address), ServerName: name}},
		EscrowKey: s.escrowKey, Proxy: s.proxy,
	}
}

// laptop is an attester in the test's process.
type laptop struct {
	t      *testing.T
	state  attester.StateFile
	client *gate.Client
	stop   func()
}

// newLaptop starts an attester on m.
func newLaptop(t *testing.T, s *site, m machine, state attester.StateFile) *laptop {
	t.Helper()
	a, err := attester.New(attester.Config{
		Organization: s.organization(), OpenTPM: m.open,
		EventLog: func() ([]byte, error) { return m.boot.Bytes(), nil },
		RunLog:   attester.OpenRunLog(m.events),
		Logon:    &attester.Logon{UID: uint32(os.Getuid())},
		State:    state, Now: time.Now, Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
		Network: attester.NewNetwork([]uint32{uint32(os.Getuid())}, m.release, state.Path),
	})
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "attestd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	l, err := net.Listen("unix", filepath.Join(dir, "sock"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { a.Run(ctx) })
	wg.Go(func() { a.Serve(ctx, l, nil) })
	p := &laptop{t: t, state: state, client: gate.NewClient(filepath.Join(dir, "sock"))}
	var once sync.Once
	p.stop = func() {
		once.Do(func() {
			cancel()
			wg.Wait()
		})
	}
	t.Cleanup(p.stop)
	return p
}

// until waits for a status that ok accepts and returns all states on the way.
func (p *laptop) until(ok func(gate.Status) bool) (gate.Status, []string) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.t.Context(), 40*time.Second)
	defer cancel()
	var states []string
	for version := uint64(0); ; {
		s, err := p.client.Wait(ctx, version)
		if err != nil {
			p.t.Fatalf("%v; states so far: %v", err, states)
		}
		states = append(states, s.State)
		if ok(s) {
			return s, states
		}
		version = s.Version
	}
}

func (p *laptop) untilState(state string) (gate.Status, []string) {
	p.t.Helper()
	return p.until(func(s gate.Status) bool { return s.State == state })
}

func newState(t *testing.T, ticket attest.Ticket) attester.StateFile {
	t.Helper()
	f := attester.StateFile{Path: filepath.Join(t.TempDir(), "state")}
	if err := os.WriteFile(f.Path, make([]byte, attester.PartitionSize), 0o600); err != nil {
		t.Fatal(err)
	}
	if !ticket.IsZero() {
		if err := attester.WriteTicket(f, ticket); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

// machine is a TPM that has measured boot.
type machine struct {
	boot   *logtest.Log
	roots  string // PEM file
	open   func() (attester.Hardware, error)
	fake   bool   // one credential key for all starts
	events string // run-time event log
	// release is the file of the image's signed policies; empty: no networks
	// are kept.
	release string
}

// machines runs f with a TPM in software, which needs no privilege, and with
// swtpm, which does.
func machines(t *testing.T, boot *logtest.Log, f func(*testing.T, machine)) {
	t.Run("software", func(t *testing.T) { f(t, software(t, boot)) })
	t.Run("swtpm", func(t *testing.T) {
		e := tpmtest.Start(t)
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
		f(t, machine{boot: boot, roots: e.Roots, open: func() (attester.Hardware, error) { return tpm.Open(e.Socket) }, events: writeFile(t, "")})
	})
}

func software(t *testing.T, boot *logtest.Log) machine {
	t.Helper()
	maker := newCA(t, "maker of TPMs")
	dev := faketpm.New()
	dev.PCRs = boot.PCRs()
	if err := dev.Certify(maker.cert, maker.key, nil); err != nil {
		t.Fatal(err)
	}
	return machine{boot: boot, roots: writeFile(t, maker.pem()), open: func() (attester.Hardware, error) { return dev, nil }, fake: true, events: writeFile(t, "")}
}

func writeFile(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestLife enrols, attests, uses the credential, renews it, loses the verifier
// until it lapses, and finds it again.
func TestLife(t *testing.T) { machines(t, image.Boot(), life) }

func life(t *testing.T, m machine) {
	s := newSite(t, m.roots, 6*time.Second, image.Reference("sekisho", "1"))
	ticket := s.ticket()
	p := newLaptop(t, s, m, newState(t, ticket))
	first, states := p.untilState(gate.StateAffirming)
	t.Logf("states: %v", states)

	// The ticket is used up and gone from the laptop.
	r, err := p.state.Load()
	if err != nil || !r.Ticket.IsZero() || r.Enrolment == nil || r.Enrolment.Device.String() != first.DeviceID {
		t.Errorf("record %+v, %v", r, err)
	}
	if raw, err := os.ReadFile(p.state.Path); err != nil || strings.Contains(string(raw), ticket.Reveal()) {
		t.Errorf("the ticket is still on the state partition (%v)", err)
	}

	// The credential is what it should be, and its key signs.
	ctx := t.Context()
	cert, err := p.client.Credential(ctx)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(s.devices.cert)
	if _, err := cert.Leaf.Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		t.Error(err)
	}
	if cert.Leaf.Subject.CommonName != first.DeviceID || len(cert.Leaf.URIs) != 1 || cert.Leaf.URIs[0].String() != "urn:sekisho:device:"+first.DeviceID {
		t.Errorf("certificate of %v, %v", cert.Leaf.Subject, cert.Leaf.URIs)
	}
	handshake(t, s, cert)

	// It is renewed before it ends.
	second, states := p.until(func(st gate.Status) bool { return st.NotAfter.After(first.NotAfter) })
	if second.State != gate.StateAffirming || !time.Now().Before(first.NotAfter) {
		t.Errorf("renewed late: %v at %v, states %v", second, time.Now(), states)
	}

	// Without a verifier it lapses on time, and everything is shut.
	cert, err = p.client.Credential(ctx)
	if err != nil {
		t.Fatal(err)
	}
	s.stop()
	down, _ := p.untilState(gate.StateUnreachable)
	if late := time.Since(cert.Leaf.NotAfter); late < 0 || late > 2*time.Second {
		t.Errorf("closed %v after the end", late)
	}
	if down.Reason != attest.ReasonUnreachable.String() || !strings.Contains(down.Detail, s.address) || !strings.Contains(attester.Line(down), "unreachable since ") {
		t.Errorf("status: %+v", down)
	}
	if _, err := p.client.Credential(ctx); !errors.Is(err, gate.ErrNoCredential) {
		t.Errorf("credential after the end: %v", err)
	}
	digest := sha256.Sum256(nil)
	if _, err := cert.PrivateKey.(crypto.Signer).Sign(rand.Reader, digest[:], crypto.SHA256); err == nil {
		t.Error("the key signs after the end")
	}

	// It comes back by itself.
	s.start(s.address)
	p.untilState(gate.StateAffirming)
}

// handshake makes a mutual TLS connection with the credential.
func handshake(t *testing.T, s *site, cert *tls.Certificate) {
	t.Helper()
	roots, clients := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(s.servers.cert)
	clients.AddCert(s.devices.cert)
	server := &tls.Config{Certificates: []tls.Certificate{s.servers.server(t)}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: clients, MinVersion: tls.VersionTLS13}
	client := &tls.Config{Certificates: []tls.Certificate{*cert}, RootCAs: roots, ServerName: name, MinVersion: tls.VersionTLS13}
	l, err := tls.Listen("tcp", "127.0.0.1:0", server)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	done := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err == nil {
			err = c.(*tls.Conn).Handshake()
			c.Close()
		}
		done <- err
	}()
	c, err := tls.Dial("tcp", l.Addr().String(), client)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := <-done; err != nil {
		t.Errorf("the server refused the credential: %v", err)
	}
}

// TestTamperedImageIsRefused boots an image that is not in the reference
// values: refused with the component's name, nothing granted, nothing stored;
// then the values are added, and the laptop finds out by itself.
func TestTamperedImageIsRefused(t *testing.T) {
	evil := image
	evil.Kernel = "evil"
	machines(t, evil.Boot(), func(t *testing.T, m machine) { tampered(t, m, evil) })
}

func tampered(t *testing.T, m machine, evil logtest.Image) {
	s := newSite(t, m.roots, time.Minute, image.Reference("sekisho", "1"))
	p := newLaptop(t, s, m, newState(t, s.ticket()))
	st, _ := p.untilState(gate.StateRefused)
	if st.Reason != attest.ReasonImageMismatch.String() || !strings.HasPrefix(st.Detail, "kernel (.linux, PCR 11): expected ") {
		t.Errorf("status: %+v", st)
	}
	if !strings.HasPrefix(attester.Line(st), "refused image-mismatch: kernel ") {
		t.Errorf("line: %s", attester.Line(st))
	}
	if _, err := p.client.Credential(t.Context()); !errors.Is(err, gate.ErrNoCredential) {
		t.Errorf("credential: %v", err)
	}
	for _, d := range s.enrolled() {
		if d.Clock != nil || !d.Affirmed.IsZero() || d.Reason != attest.ReasonImageMismatch {
			t.Errorf("device after a refusal: %+v", d)
		}
	}
	if err := s.service.AddReference(t.Context(), evil.Reference("sekisho", "2")); err != nil {
		t.Fatal(err)
	}
	p.untilState(gate.StateAffirming)
}

// TestRestart restarts the attester: no ticket is needed again, and another
// credential key is certified.
func TestRestart(t *testing.T) { machines(t, image.Boot(), restart) }

func restart(t *testing.T, m machine) {
	s := newSite(t, m.roots, time.Minute, image.Reference("sekisho", "1"))
	state := newState(t, s.ticket())
	p := newLaptop(t, s, m, state)
	p.untilState(gate.StateAffirming)
	before, err := p.client.Credential(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	p.stop()
	p = newLaptop(t, s, m, state)
	p.untilState(gate.StateAffirming)
	after, err := p.client.Credential(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if before.Leaf.PublicKey.(*ecdsa.PublicKey).Equal(after.Leaf.PublicKey) != m.fake {
		t.Error("the credential key outlived the restart")
	}
}

// TestEnrolmentIsRefused covers what a device without right to enrol sees.
func TestEnrolmentIsRefused(t *testing.T) { machines(t, image.Boot(), enrolmentRefused) }

func enrolmentRefused(t *testing.T, m machine) {
	foreign := writeFile(t, newCA(t, "some vendor").pem())
	for _, c := range []struct {
		name   string
		roots  string
		ticket func(*site) attest.Ticket
		want   attest.Reason
	}{
		{"unknown ticket", m.roots, func(*site) attest.Ticket { return attest.NewTicket("ticket-guess") }, attest.ReasonTicketUnknown},
		{"TPM of a CA that is not trusted", foreign, (*site).ticket, attest.ReasonEKUntrusted},
	} {
		s := newSite(t, c.roots, time.Minute, image.Reference("sekisho", "1"))
		p := newLaptop(t, s, m, newState(t, c.ticket(s)))
		st, _ := p.untilState(gate.StateRefused)
		if st.Reason != c.want.String() {
			t.Errorf("%s: %+v, want %v", c.name, st, c.want)
		}
		p.stop()
		if len(s.enrolled()) != 0 {
			t.Errorf("%s: a device was enrolled", c.name)
		}
	}
}

// TestNoTPM has no TPM at all.
func TestNoTPM(t *testing.T) {
	s := newSite(t, writeFile(t, newCA(t, "some vendor").pem()), time.Minute)
	open := func() (attester.Hardware, error) { return tpm.Open(filepath.Join(t.TempDir(), "tpm")) }
	p := newLaptop(t, s, machine{boot: image.Boot(), open: open}, newState(t, attest.Ticket{}))
	st, _ := p.until(func(st gate.Status) bool { return st.Reason != "" })
	if st.State != gate.StateNoTPM || st.Reason != attest.ReasonNoTPM.String() || !strings.HasPrefix(st.Detail, "No TPM found") || !strings.Contains(st.Detail, "TPM が見つかりません") {
		t.Errorf("status: %+v", st)
	}
}

// TestNoTicket has a TPM, and nothing on its state partition.
func TestNoTicket(t *testing.T) {
	m := software(t, image.Boot())
	s := newSite(t, m.roots, time.Minute)
	p := newLaptop(t, s, m, newState(t, attest.Ticket{}))
	st, _ := p.untilState(gate.StateUnenrolled)
	if st.DeviceID == "" {
		t.Errorf("status: %+v", st)
	}
}

// TestPowerFailsAfterEnrolment loses the laptop's record of an enrolment that
// the verifier has stored: the same ticket brings it back, at no further use.
func TestPowerFailsAfterEnrolment(t *testing.T) {
	m := software(t, image.Boot())
	s := newSite(t, m.roots, time.Minute, image.Reference("sekisho", "1"))
	ticket := s.ticket()
	p := newLaptop(t, s, m, newState(t, ticket))
	p.untilState(gate.StateAffirming)
	p.stop()
	p = newLaptop(t, s, m, newState(t, ticket))
	p.untilState(gate.StateAffirming)
}

// TestStateOfAnotherLaptop has a state partition that was moved here.
func TestStateOfAnotherLaptop(t *testing.T) {
	m := software(t, image.Boot())
	s := newSite(t, m.roots, time.Minute, image.Reference("sekisho", "1"))
	state := newState(t, attest.Ticket{})
	if err := state.Store(attester.Record{Enrolment: &attest.Enrolment{Device: attest.Digest{1}}}); err != nil {
		t.Fatal(err)
	}
	p := newLaptop(t, s, m, state)
	st, _ := p.until(func(st gate.Status) bool { return st.Reason != "" })
	if st.State != gate.StateUnenrolled || st.Reason != attest.ReasonState.String() {
		t.Errorf("status: %+v", st)
	}
}
