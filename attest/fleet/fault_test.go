package fleet

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sekisho/attest"
	"sekisho/attest/auditlog"
	"sekisho/attest/cryptrec"
	"sekisho/attest/store"
	"sekisho/attest/tpm/faketpm"
)

// asVerifier names the configuration with which the test's own program serves
// as verifier does.
const asVerifier = "SEKISHO_TEST_VERIFIER"

func TestMain(m *testing.M) {
	if member := os.Getenv(asMember); member != "" {
		fmt.Fprintln(os.Stderr, serveMember(member))
		os.Exit(1)
	}
	if path := os.Getenv(asVerifier); path != "" {
		fmt.Fprintln(os.Stderr, serveFrom(path))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func serveFrom(path string) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	c, err := ParseServerConfig(data)
	if err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	s, err := c.Open(context.Background(), time.Now, log)
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", c.Listen)
	if err != nil {
		return err
	}
	failed := make(chan error, 2)
	go func() { failed <- Serve(context.Background(), l, s.Certificate, s.Service, log) }()
	go func() { failed <- ServeAdmin(context.Background(), c.AdminSocket, s.Service, log) }()
	return <-failed
}

// process is a verifier as a process of its own.
type process struct {
	t       *testing.T
	dir     string
	config  ServerConfig
	maker   *x509.Certificate
	makeKey *ecdsa.PrivateKey
	tls     *tls.Config
	cmd     *exec.Cmd
	stderr  bytes.Buffer
}

func writePEM(t *testing.T, path string, cert []byte, key *ecdsa.PrivateKey) {
	t.Helper()
	if err := os.WriteFile(path+".pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}), 0o600); err != nil {
		t.Fatal(err)
	}
	if key == nil {
		return
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path+".key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
}

// newProcess starts a verifier whose store is in a directory.
func newProcess(t *testing.T, storeAt string) *process {
	t.Helper()
	p := &process{t: t, dir: t.TempDir()}
	p.maker, p.makeKey = authority(t, "maker of TPMs")
	writePEM(t, filepath.Join(p.dir, "maker"), p.maker.Raw, nil)
	ca, caKey := authority(t, "devices")
	writePEM(t, filepath.Join(p.dir, "ca"), ca.Raw, caKey)
	cert, roots := testServer(t, ca)
	writePEM(t, filepath.Join(p.dir, "server"), cert.Certificate[0], cert.PrivateKey.(*ecdsa.PrivateKey))
	p.tls = cryptrec.Config()
	p.tls.RootCAs, p.tls.ServerName = roots, name
	values, err := json.Marshal(image.Reference("sekisho", "1"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(p.dir, "values.json"), values, 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	in := func(name string) string { return filepath.Join(p.dir, name) }
	p.config = ServerConfig{
		Listen: l.Addr().String(), ID: name, Organization: org, Certificate: in("server.pem"), Key: in("server.key"),
		CACertificate: in("ca.pem"), CAKey: in("ca.key"), Store: storeAt, EKRoots: []string{in("maker.pem")},
		ReferenceValues: []string{in("values.json")}, AdminSocket: in("admin"),
	}
	l.Close()
	p.start()
	t.Cleanup(p.kill)
	return p
}

func (p *process) start() {
	p.t.Helper()
	data, err := json.Marshal(p.config)
	if err != nil {
		p.t.Fatal(err)
	}
	path := filepath.Join(p.dir, "verifier.json")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		p.t.Fatal(err)
	}
	p.stderr.Reset()
	p.cmd = exec.Command(os.Args[0])
	p.cmd.Env = append(os.Environ(), asVerifier+"="+path)
	p.cmd.Stderr = &p.stderr
	if err := p.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	awaitAdmin(p.t, p.admin())
}

func (p *process) admin() *Admin { return NewAdmin(p.config.AdminSocket) }

// kill ends the process without warning.
func (p *process) kill() {
	if p.cmd.ProcessState == nil {
		p.cmd.Process.Kill()
		p.cmd.Wait()
	}
}

// restart kills it and starts it again.
func (p *process) restart() {
	p.t.Helper()
	p.kill()
	p.start()
}

// dial connects as a device does.
func (p *process) dial() (*client, error) {
	conn, err := net.DialTimeout("tcp", p.config.Listen, 10*time.Second)
	if err != nil {
		return nil, err
	}
	t := tls.Client(conn, p.tls)
	return &client{Conn: t, r: bufio.NewReader(t)}, t.SetDeadline(time.Now().Add(time.Minute))
}

func (p *process) post(path, kind string, body []byte, answer any) error {
	c, err := p.dial()
	if err != nil {
		return err
	}
	defer c.Close()
	data, err := c.post(httpRequest(path, kind, body))
	if err != nil {
		return err
	}
	return json.Unmarshal(data, answer)
}

func (p *process) postJSON(path string, question, answer any) error {
	body, err := json.Marshal(question)
	if err != nil {
		return err
	}
	return p.post(path, "application/json", body, answer)
}

// enrol enrols a new device over the wire.
func (p *process) enrol() (*faketpm.TPM, attest.Digest) {
	p.t.Helper()
	d := faketpm.New()
	d.PCRs = image.Boot().PCRs()
	if err := d.Certify(p.maker, p.makeKey, nil); err != nil {
		p.t.Fatal(err)
	}
	ticket, err := p.admin().CreateTicket(p.t.Context(), 1, time.Hour)
	if err != nil {
		p.t.Fatal(err)
	}
	r := request(d, ticket.Ticket)
	var c attest.EnrolChallenge
	if err := p.postJSON(attest.PathEnrolBegin, r, &c); err != nil {
		p.t.Fatal(err)
	}
	secret, err := d.Activate(c.Credential, c.Secret)
	if err != nil {
		p.t.Fatal(err)
	}
	proof, err := attest.EnrolProof(secret, r, c)
	if err != nil {
		p.t.Fatal(err)
	}
	var e attest.Enrolment
	if err := p.postJSON(attest.PathEnrolFinish, attest.EnrolAnswer{Session: c.Session, Proof: proof}, &e); err != nil {
		p.t.Fatal(err)
	}
	return d, e.Device
}

// evidence answers a new challenge.
func (p *process) evidence(d *faketpm.TPM, id attest.Digest) ([]byte, error) {
	var c attest.Challenge
	if err := p.postJSON(attest.PathChallenge, attest.ChallengeRequest{Device: id}, &c); err != nil {
		return nil, err
	}
	_, key := identify(p.t, d)
	e, err := evidenceFor(d, id, key, c.Nonce, image.Boot().Bytes())
	if err != nil {
		return nil, err
	}
	return e.Encode()
}

func (p *process) attest(evidence []byte) (r attest.AttestResponse, err error) {
	return r, p.post(attest.PathAttest, attest.ContentType, evidence, &r)
}

// verify attests once.
func (p *process) verify(d *faketpm.TPM, id attest.Digest) (attest.AttestResponse, error) {
	e, err := p.evidence(d, id)
	if err != nil {
		return attest.AttestResponse{}, err
	}
	return p.attest(e)
}

// TestFaultKilledAfterRevocation kills the verifier (SIGKILL) at the moment
// when a revocation was acknowledged: after the start it holds, and so does
// every other promise that it made before.
func TestFaultKilledAfterRevocation(t *testing.T) {
	p := newProcess(t, filepath.Join(t.TempDir(), "store"))
	for range 3 {
		d, id := p.enrol()
		used, err := p.evidence(d, id)
		if err != nil {
			t.Fatal(err)
		}
		good, err := p.attest(used)
		if err != nil || good.Result.Status != attest.StatusAffirming {
			t.Fatal(good.Result, err)
		}
		p.restart()
		if r, err := p.attest(used); err != nil || r.Result.Reason != attest.ReasonNonceReused {
			t.Errorf("evidence from before the kill: %v %v", r.Result.Reason, err)
		}
		if f, err := p.admin().Report(t.Context(), good.Result.Report); err != nil || len(f.Data) == 0 {
			t.Errorf("report from before the kill: %v", err)
		}
		if list, err := p.admin().Results(t.Context()); err != nil || !slices.ContainsFunc(list, func(r attest.Result) bool { return reflect.DeepEqual(r, good.Result) }) {
			t.Errorf("the result from before the kill is not among %+v, %v", list, err)
		}
		before, err := p.evidence(d, id)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.admin().Retire(t.Context(), id.String(), "lost"); err != nil {
			t.Fatal(err)
		}
		p.restart()
		if r, err := p.attest(before); err != nil || r.Result.Reason != attest.ReasonDeviceUnknown || r.Chain != nil {
			t.Errorf("after the revocation: %v %v", r.Result.Reason, err)
		}
		if list, err := p.admin().Former(t.Context(), id.String()); err != nil || len(list) != 1 || list[0].Reason != "lost" {
			t.Errorf("former: %+v %v", list, err)
		}
		ticket, err := p.admin().CreateTicket(t.Context(), 9, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.admin().RevokeTicket(t.Context(), ticket.ID); err != nil {
			t.Fatal(err)
		}
		p.restart()
		var c attest.EnrolChallenge
		if err := p.postJSON(attest.PathEnrolBegin, request(d, ticket.Ticket), &c); err == nil || !strings.Contains(err.Error(), attest.ReasonTicketUnknown.String()) {
			t.Errorf("revoked ticket: %v", err)
		}
	}
}

// TestFaultKilledAtWork kills the verifier while laptops attest: each result
// that one of them has heard is there afterwards, with its report, which is in
// the log once, and none of their nonces is good again.
func TestFaultKilledAtWork(t *testing.T) {
	p := newProcess(t, filepath.Join(t.TempDir(), "store"))
	type heard struct {
		evidence []byte
		report   string
	}
	var mu sync.Mutex
	var all []heard
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for range 4 {
		d, id := p.enrol()
		wg.Go(func() {
			for range maxUsed - 1 { // then it would have to wait
				e, err := p.evidence(d, id)
				if err != nil {
					return
				}
				r, err := p.attest(e)
				if err != nil {
					return
				}
				if r.Result.Status != attest.StatusAffirming {
					t.Errorf("%v %s", r.Result.Reason, r.Result.Detail)
					return
				}
				mu.Lock()
				all = append(all, heard{e, r.Result.Report})
				if len(all) == 20 {
					close(stop)
				}
				mu.Unlock()
			}
		})
	}
	<-stop
	p.kill()
	wg.Wait()
	p.start()
	for _, h := range all {
		if f, err := p.admin().Report(t.Context(), h.report); err != nil || len(f.Data) == 0 {
			t.Errorf("report %s: %v", h.report, err)
		}
		if r, err := p.attest(h.evidence); err != nil || r.Result.Reason != attest.ReasonNonceReused {
			t.Errorf("evidence again: %v %v", r.Result.Reason, err)
		}
	}
	reports := make(map[string]int)
	for _, h := range all {
		reports[h.report] = 0
	}
	p.logged(reports)
	p.restart()
	p.logged(reports)
}

// logged waits until all these reports are in the log and demands that each of
// the log is there once.
func (p *process) logged(reports map[string]int) {
	p.t.Helper()
	k, err := p.admin().AuditKey(p.t.Context())
	if err != nil {
		p.t.Fatal(err)
	}
	key, err := auditlog.ParsePublicKey([]byte(k.Key))
	if err != nil {
		p.t.Fatal(err)
	}
	for until, missing := time.Now().Add(time.Minute), 1; missing > 0; {
		if time.Now().After(until) {
			p.t.Fatalf("%d of %d reports are not in the log", missing, len(reports))
		}
		seen := make(map[string]int)
		dir := p.t.TempDir()
		if _, err := auditlog.Copy(p.t.Context(), AuditLog{p.admin()}, key, dir); err != nil {
			p.t.Fatal(err)
		}
		if _, err := auditlog.Check(p.t.Context(), auditlog.Dir(dir), key, nil, func(_ uint64, l auditlog.Leaf) error {
			id := hex.EncodeToString(l.Report[:])
			if seen[id]++; seen[id] > 1 {
				return fmt.Errorf("report %s is in the log twice", id)
			}
			return nil
		}); err != nil {
			p.t.Fatal(err)
		}
		missing = 0
		for id := range reports {
			missing += 1 - seen[id]
		}
	}
}

// TestFaultDiskFull fills the disk of a verifier: it admits nobody, says why,
// loses nothing, and goes on when there is room again.
func TestFaultDiskFull(t *testing.T) {
	if os.Getuid() != 0 || os.Getenv("SEKISHO_TEST") != "all" {
		t.Skip("needs root for a small file system of its own, and SEKISHO_TEST=all")
	}
	disk := t.TempDir()
	if err := unix.Mount("sekisho-test", disk, "tmpfs", 0, "size=512m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(disk, unix.MNT_DETACH) })
	p := newProcess(t, filepath.Join(disk, "store"))
	d, id := p.enrol()
	good, err := p.verify(d, id)
	if err != nil || good.Result.Status != attest.StatusAffirming {
		t.Fatal(good.Result, err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(disk, &st); err != nil {
		t.Fatal(err)
	}
	filler := filepath.Join(disk, "filler")
	f, err := os.Create(filler)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Fallocate(int(f.Fd()), 0, 0, int64(st.Bavail)*st.Bsize-store.Reserve+(1<<20)); err != nil {
		t.Fatal(err)
	}
	f.Close()
	for range 3 {
		r, err := p.verify(d, id)
		if err == nil || !strings.Contains(err.Error(), fmt.Sprint(http.StatusInternalServerError)) || r.Chain != nil {
			t.Errorf("with a full disk: %v %v", r.Result, err)
		}
	}
	if _, err := p.admin().CreateTicket(t.Context(), 1, time.Hour); err == nil || !strings.Contains(err.Error(), "free some space") {
		t.Errorf("a ticket with a full disk: %v", err)
	}
	if got, err := p.admin().Device(t.Context(), id.String()); err != nil || got.ID != id {
		t.Errorf("reading with a full disk: %v", err)
	}
	p.kill()
	if !strings.Contains(p.stderr.String(), "free some space") {
		t.Errorf("log: %s", p.stderr.String())
	}
	p.cmd = exec.Command(os.Args[0])
	p.cmd.Env = append(os.Environ(), asVerifier+"="+filepath.Join(p.dir, "verifier.json"))
	out, err := p.cmd.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || !bytes.Contains(out, []byte("free some space")) {
		t.Errorf("start with a full disk: %v %s", err, out)
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	p.start()
	if f, err := p.admin().Report(t.Context(), good.Result.Report); err != nil || len(f.Data) == 0 {
		t.Errorf("report from before: %v", err)
	}
	if r, err := p.verify(d, id); err != nil || r.Result.Status != attest.StatusAffirming {
		t.Errorf("with room again: %v %v", r.Result, err)
	}
}
