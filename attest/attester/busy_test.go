package attester_test

import (
	"bytes"
	"crypto/tls"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/attest/cryptrec"
	"sekisho/attest/fleet"
	"sekisho/attest/gate"
)

// TestBusyVerifier has a verifier send a laptop away twice: it comes back when
// its turn is and not before, with its ticket, and asks no other verifier.
func TestBusyVerifier(t *testing.T) {
	const wait = 700 * time.Millisecond
	m := software(t, image.Boot())
	s := newSite(t, m.roots, time.Hour, image.Reference("sekisho", "1"))
	real := fleet.Handler(s.service, slog.New(slog.DiscardHandler))
	type visit struct {
		at     time.Time
		ticket string
	}
	var mu sync.Mutex
	var visits []visit
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != attest.PathChallenge {
			real.ServeHTTP(w, r)
			return
		}
		body, err := io.ReadAll(r.Body)
		var req attest.ChallengeRequest
		if err != nil || json.Unmarshal(body, &req) != nil {
			t.Error("no challenge request")
		}
		mu.Lock()
		defer mu.Unlock()
		visits = append(visits, visit{time.Now(), string(req.Ticket)})
		switch len(visits) {
		case 1: // ours
			w.WriteHeader(http.StatusServiceUnavailable)
			json.NewEncoder(w).Encode(attest.Busy{Reason: attest.ReasonBusy, RetryAfter: wait.Milliseconds(), Ticket: []byte("first")})
		case 2: // a proxy's
			w.Header().Set("Retry-After", "1")
			w.WriteHeader(http.StatusTooManyRequests)
		default:
			r.Body = io.NopCloser(bytes.NewReader(body))
			real.ServeHTTP(w, r)
		}
	})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	config := cryptrec.Config()
	config.Certificates = []tls.Certificate{s.servers.server(t)}
	front := &http.Server{Handler: handler}
	var serving sync.WaitGroup
	serving.Go(func() { front.Serve(tls.NewListener(l, config)) })
	defer serving.Wait()
	defer front.Close()
	s.address = l.Addr().String()
	p := newLaptop(t, s, m, newState(t, s.ticket()))
	_, states := p.untilState(gate.StateAffirming)
	mu.Lock()
	defer mu.Unlock()
	if len(visits) != 3 || visits[0].ticket != "" || visits[1].ticket != "first" || visits[2].ticket != "" {
		t.Fatalf("visits %v, states %v", visits, states)
	}
	if a, b := visits[1].at.Sub(visits[0].at), visits[2].at.Sub(visits[1].at); a < wait || b < time.Second {
		t.Errorf("came back after %v, told %v; then after %v, told 1s", a, wait, b)
	}
}
