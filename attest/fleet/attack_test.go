package fleet

import (
	"bufio"
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"sekisho/attest"
	"sekisho/attest/tpm"
	"sekisho/attest/tpm/faketpm"
)

// ask has a service appraise evidence.
func ask(t *testing.T, s *Service, e *attest.Evidence) attest.Result {
	t.Helper()
	data, err := e.Encode()
	if err != nil {
		t.Fatal(err)
	}
	r, err := s.Attest(t.Context(), data)
	if err != nil {
		t.Fatal(err)
	}
	if r.Result.Status != attest.StatusAffirming && (r.Chain != nil || r.Token != nil && r.Result.Status == attest.StatusNone) {
		t.Error("it entitled to something")
	}
	return r.Result
}

// second is another verifier of the bench's organisation, on the same store.
func (b *bench) second(name string) *Service {
	b.t.Helper()
	c := b.service.Config
	c.Verifier = name
	s, err := NewService(b.t.Context(), c)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(s.Close)
	return s
}

// TestAttackNonceOnSecondVerifier takes evidence, and a nonce, of one verifier
// to a second one of the same organisation, which has the same key and another
// name.
func TestAttackNonceOnSecondVerifier(t *testing.T) {
	b := newBench(t)
	second := b.second("second.test")
	d, id := b.enrolled()
	nonce := b.nonce(id)
	if !second.nonces.Authentic(nonce, name, id) || second.nonces.Authentic(nonce, "second.test", id) {
		t.Error("the second verifier cannot tell whose nonce it is")
	}
	e := b.evidence(d, id, nonce)
	if r := ask(t, second, e); r.Reason != attest.ReasonVerifierMismatch {
		t.Errorf("evidence for the first: %v", r.Reason)
	}
	renamed := *e
	renamed.Verifier = "second.test"
	if r := ask(t, second, &renamed); r.Reason != attest.ReasonVerifierMismatch {
		t.Errorf("renamed: %v", r.Reason)
	}
	// With a nonce of its own the second refuses what names the first.
	other := b.evidence(d, id, second.Challenge(attest.ChallengeRequest{Device: id}).Nonce)
	if r := ask(t, second, other); r.Reason != attest.ReasonVerifierMismatch {
		t.Errorf("its nonce, the first one's name: %v", r.Reason)
	}
	if r := b.attest(e).Result; r.Status != attest.StatusAffirming {
		t.Errorf("at the first: %v", r.Reason)
	}
	if r := b.attest(e).Result; r.Reason != attest.ReasonNonceReused {
		t.Errorf("at the first, again: %v", r.Reason)
	}
}

// TestAttackNonceReusedBehindBalancer: several verifiers answer to one name,
// as behind a balancer. A challenge of one may be answered to any, once: also
// if the answers come at the same moment, or after a restart.
func TestAttackNonceReusedBehindBalancer(t *testing.T) {
	b := newBench(t)
	verifiers := []*Service{b.service, b.second(name), b.second(name)}
	d, id := b.enrolled()
	e := b.evidence(d, id, b.nonce(id))
	if r := ask(t, verifiers[1], e); r.Status != attest.StatusAffirming {
		t.Errorf("at the second: %v", r.Reason)
	}
	for i, v := range verifiers {
		if r := ask(t, v, e); r.Reason != attest.ReasonNonceReused {
			t.Errorf("again at %d: %v %v", i, r.Status, r.Reason)
		}
	}
	e = b.evidence(d, id, b.nonce(id))
	results := make(chan attest.Result, 30)
	var wg sync.WaitGroup
	for i := range cap(results) {
		wg.Go(func() { results <- ask(t, verifiers[i%len(verifiers)], e) })
	}
	wg.Wait()
	affirmed := 0
	for range cap(results) {
		switch r := <-results; {
		case r.Status == attest.StatusAffirming:
			affirmed++
		case r.Reason != attest.ReasonNonceReused:
			t.Errorf("%v %s", r.Reason, r.Detail)
		}
	}
	if affirmed != 1 {
		t.Errorf("affirmed %d times", affirmed)
	}
	b.restart()
	if r := b.attest(e).Result; r.Reason != attest.ReasonNonceReused {
		t.Errorf("after a restart: %v", r.Reason)
	}
}

// TestAttackAttestsAllTheTime: a device that never stops attesting is told to
// wait, and no used nonce is forgotten for it.
func TestAttackAttestsAllTheTime(t *testing.T) {
	b := newBench(t)
	d, id := b.enrolled()
	first := b.evidence(d, id, b.nonce(id))
	for i := range maxUsed {
		e := first
		if i > 0 {
			e = b.evidence(d, id, b.nonce(id))
		}
		if r := b.attest(e).Result; r.Status != attest.StatusAffirming {
			t.Fatal(i, r.Reason)
		}
	}
	if r := b.attest(b.evidence(d, id, b.nonce(id))).Result; r.Reason != attest.ReasonBusy {
		t.Errorf("one too many: %v", r.Reason)
	}
	if r := b.attest(first).Result; r.Reason != attest.ReasonNonceReused {
		t.Errorf("the first again: %v", r.Reason)
	}
	b.now = b.now.Add(usedFor + time.Second)
	if r := b.attest(b.evidence(d, id, b.nonce(id))).Result; r.Status != attest.StatusAffirming {
		t.Errorf("later: %v", r.Reason)
	}
}

// TestEnrolmentOnSecondVerifier begins with one verifier and ends with
// another, and answers once.
func TestEnrolmentOnSecondVerifier(t *testing.T) {
	b := newBench(t)
	second := b.second(name)
	d := b.device()
	r := request(d, b.ticket(1))
	c, err := b.service.Begin(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := d.Activate(c.Credential, c.Secret)
	if err != nil {
		t.Fatal(err)
	}
	proof, err := attest.EnrolProof(secret, r, *c)
	if err != nil {
		t.Fatal(err)
	}
	a := attest.EnrolAnswer{Session: c.Session, Proof: proof}
	if _, err := second.Finish(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	if _, err := b.service.Finish(t.Context(), a); refusal(t, err) != attest.ReasonChallengeExpired {
		t.Errorf("answered twice: %v", err)
	}
}

// TestRetire ends a device while two verifiers serve it: neither affirms it
// from then on, not even evidence that was made before, and it comes back by
// a permit alone.
func TestRetire(t *testing.T) {
	b := newBench(t)
	second := b.second(name)
	k := b.approvers()
	d, id := b.enrolled()
	e := b.evidence(d, id, b.nonce(id))
	if _, err := b.service.Retire(t.Context(), id, ""); err == nil {
		t.Error("retired without a reason")
	}
	f, err := b.service.Retire(t.Context(), id, "lost on a train")
	if err != nil || f.ID != id || f.Reason != "lost on a train" {
		t.Fatal(f, err)
	}
	for i, v := range []*Service{b.service, second} {
		if r := ask(t, v, e); r.Reason != attest.ReasonDeviceUnknown {
			t.Errorf("verifier %d: %v", i, r.Reason)
		}
	}
	if _, err := b.service.Retire(t.Context(), id, "again"); !errors.Is(err, errUnknownDevice) {
		t.Errorf("retired twice: %v", err)
	}
	if _, err := b.enrol(d, b.ticket(1), nil); refusal(t, err) != attest.ReasonAlreadyEnrolled {
		t.Errorf("back by a ticket: %v", err)
	}
	if _, err := b.service.AddPermit(t.Context(), b.permit(PermitRequest{Device: id, Reason: "found"}, k...)); err != nil {
		t.Fatal(err)
	}
	if _, err := b.enrol(d, b.ticket(1), nil); err != nil {
		t.Errorf("back by a permit: %v", err)
	}
	if r := b.attest(b.evidence(d, id, b.nonce(id))).Result; r.Status != attest.StatusAffirming {
		t.Errorf("back: %v", r.Reason)
	}
}

// TestAttackThousandChallenges: no nonce comes twice (CVE-2026-6420).
func TestAttackThousandChallenges(t *testing.T) {
	b := newBench(t)
	seen := make(map[string]bool)
	for range 1000 {
		seen[string(b.nonce(attest.Digest{1}))] = true
	}
	if len(seen) != 1000 {
		t.Errorf("%d distinct challenges of 1000", len(seen))
	}
}

// TestAttackResultReplayedToAnotherDevice shows the certificate of one device
// to another: it is for a key in the first one's TPM, and another
// organisation's gateway does not know its issuer.
func TestAttackResultReplayedToAnotherDevice(t *testing.T) {
	b, other := newBench(t), newBench(t)
	d, id := b.enrolled()
	thief := b.device()
	r := b.boot(d, id, image)
	cert, err := x509.ParseCertificate(r.Chain[0])
	if err != nil {
		t.Fatal(err)
	}
	key, err := tpm.ParsePublic(thief.Identity().Key)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := key.SPKI()
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(cert.RawSubjectPublicKeyInfo, spki) {
		t.Error("the certificate is for the thief's key")
	}
	for _, x := range []struct {
		service *Service
		ok      bool
	}{{b.service, true}, {other.service, false}} {
		roots := x509.NewCertPool()
		roots.AddCert(x.service.Issuer.CA())
		_, err := cert.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: b.now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
		if (err == nil) != x.ok {
			t.Errorf("chain: %v", err)
		}
	}
	// The first device's evidence does not make the thief affirming either.
	e := b.evidence(d, id, b.nonce(id))
	stolen := deviceID(t, thief)
	e.Device = stolen[:]
	if r := b.attest(e); r.Result.Status == attest.StatusAffirming || r.Chain != nil {
		t.Errorf("%+v", r.Result)
	}
}

// TestAttackCertificateRequestSwapped exchanges the certificate's key after
// the quote was made.
func TestAttackCertificateRequestSwapped(t *testing.T) {
	b := newBench(t)
	d, id := b.enrolled()
	e := b.evidence(d, id, b.nonce(id))
	thief := faketpm.New()
	e.Key = thief.Identity().Key
	if r := b.attest(e); r.Result.Reason != attest.ReasonBindingMismatch || r.Chain != nil {
		t.Errorf("key alone: %v", r.Result.Reason)
	}
	e = b.evidence(d, id, b.nonce(id))
	theirs := b.evidence(thief, id, e.Nonce)
	e.Key, e.Certify, e.CertifySig = theirs.Key, theirs.Certify, theirs.CertifySig
	if r := b.attest(e); r.Result.Reason != attest.ReasonBindingMismatch || r.Chain != nil {
		t.Errorf("key and certification: %v", r.Result.Reason)
	}
}

// TestAttackVerifierRestarted: what a verifier said before it was restarted
// holds until the certificate's end and not a second longer.
func TestAttackVerifierRestarted(t *testing.T) {
	b := newBench(t)
	b.full(false)
	d, id := b.enrolled()
	r := b.boot(d, id, image)
	cert, err := x509.ParseCertificate(r.Chain[0])
	if err != nil {
		t.Fatal(err)
	}
	if life := cert.NotAfter.Sub(b.now); life > 10*time.Minute {
		t.Errorf("certificate for %v", life)
	}
	used := b.evidence(d, id, b.nonce(id))
	b.attest(used)
	unanswered := b.evidence(d, id, b.nonce(id))
	b.now = b.now.Add(time.Second)
	b.restart() // with the nonce key, as from its file
	if r := b.attest(used); r.Result.Reason != attest.ReasonNonceReused || r.Chain != nil {
		t.Errorf("evidence from before: %v", r.Result.Reason)
	}
	if r := b.attest(unanswered).Result; r.Status != attest.StatusAffirming {
		t.Errorf("answer to a challenge from before: %v", r.Reason)
	}
	// What admins are shown outlives the restart; it opens nothing.
	if list := b.service.Results(); len(list) != 4 || list[0].Report != r.Result.Report {
		t.Errorf("results after the restart: %+v", list)
	}
	after := cert.NotAfter.Add(time.Second)
	roots := x509.NewCertPool()
	roots.AddCert(b.service.Issuer.CA())
	if _, err := cert.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: after, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err == nil {
		t.Error("the certificate outlived its end")
	}
}

// TestAttackRoutesWithoutCredentials asks every route that there is, on the
// public side, without any right (CVE-2026-1709). It walks the tables from
// which the muxes are made, so a new route is asked too. What answers gives
// nothing and stores nothing; only the socket's owner reaches the others.
func TestAttackRoutesWithoutCredentials(t *testing.T) {
	b := newBench(t)
	b.full(true)
	log := slog.New(slog.DiscardHandler)
	h := Handler(b.service, log)
	ask := func(method, path, body string) *httptest.ResponseRecorder {
		b.now = b.now.Add(time.Second)
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(method, path, strings.NewReader(body)))
		return w
	}
	paths := []string{"/", "/v1", "/admin", "/metrics", "/debug/pprof/", "/v1/../admin/v1/tickets"}
	for _, r := range (&admin{b.service, log}).routes() {
		_, path, _ := strings.Cut(r.pattern, " ")
		paths = append(paths, strings.ReplaceAll(path, "{id}", attest.Digest{1}.String()))
	}
	if len(paths) < 20 {
		t.Fatalf("%d paths", len(paths))
	}
	before := b.stored()
	for _, path := range paths {
		for _, method := range []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE"} {
			if w := ask(method, path, "{}"); w.Code != http.StatusNotFound && w.Code/100 != 3 { // the mux cleans paths by a redirect
				t.Errorf("%s %s: %d", method, path, w.Code)
			}
		}
	}
	for _, r := range (&api{service: b.service}).routes() {
		method, path, _ := strings.Cut(r.pattern, " ")
		for _, body := range []string{"", "{}", "[]", "null", "\xff", `{"ticket":"ticket-guess"}`, `{"session":"AAAA","proof":"AAAA"}`, strings.Repeat("[", 1<<16)} {
			w := ask(method, path, body)
			entitled := strings.Contains(w.Body.String(), `"chain"`) || strings.Contains(w.Body.String(), `"credential"`) || strings.Contains(w.Body.String(), `"token"`)
			// A challenge is for all, and refused evidence is a result.
			open := path == attest.PathChallenge || path == attest.PathAttest && strings.Contains(w.Body.String(), `"contraindicated"`)
			if entitled || w.Code/100 == 2 && !open || w.Code/100 == 5 {
				t.Errorf("%s %.20q: %d %s", r.pattern, body, w.Code, w.Body)
			}
		}
	}
	if b.stored() != before {
		t.Error("something was stored")
	}
}

// pipes is a listener of connections within the process.
type pipes struct {
	conns chan net.Conn
	done  chan struct{}
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error {
	select {
	case <-p.done:
	default:
		close(p.done)
	}
	return nil
}

func (p *pipes) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 1} }

// TestAttackSlowClients sends a head and a body so slowly that they never end
// (CVE-2023-38200): the server closes both within its limits, and serves
// others meanwhile.
func TestAttackSlowClients(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &pipes{make(chan net.Conn), make(chan struct{})}
		ctx, stop := context.WithCancel(t.Context())
		served := make(chan error, 1)
		handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if _, err := io.ReadAll(r.Body); err != nil {
				w.WriteHeader(http.StatusBadRequest)
			}
		})
		go func() { served <- serve(ctx, l, handler, slog.New(slog.DiscardHandler)) }()
		for _, c := range []struct {
			name, head string
			limit      time.Duration
		}{
			{"head", "POST /v1/attest HTTP/1.1\r\nX: ", headerTime},
			{"body", "POST /v1/attest HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n", bodyTime},
		} {
			ours, theirs := net.Pipe()
			l.conns <- theirs
			begin := time.Now()
			closed := make(chan struct{})
			go func() {
				io.Copy(io.Discard, ours)
				close(closed)
			}()
			fmt.Fprint(ours, c.head)
			tick := time.NewTicker(time.Second)
			for open := true; open; {
				select {
				case <-closed:
					open = false
				case <-tick.C:
					ours.SetWriteDeadline(time.Now().Add(time.Second))
					ours.Write([]byte("a"))
				}
			}
			tick.Stop()
			if took := time.Since(begin); took > c.limit+2*time.Second {
				t.Errorf("slow %s: closed after %v, limit %v", c.name, took, c.limit)
			}
			ours.Close()
		}
		ours, theirs := net.Pipe()
		l.conns <- theirs
		fmt.Fprint(ours, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
		if resp, err := http.ReadResponse(bufio.NewReader(ours), nil); err != nil || resp.StatusCode != http.StatusOK {
			t.Errorf("another client: %v", err)
		}
		ours.Close()
		stop()
		if err := <-served; err != nil && !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
			t.Errorf("serve: %v", err)
		}
	})
}
