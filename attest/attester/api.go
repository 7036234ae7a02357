package attester

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strconv"
	"time"

	"golang.org/x/net/netutil"
	"golang.org/x/sys/unix"

	"sekisho/attest/gate"
	"sekisho/attest/internal/service"
)

// Limits of attestd's socket.
const (
	maxClients = 64
	maxRequest = 4 << 10          // bytes of a request's body
	pollTime   = 25 * time.Second // of one long poll (docs/host-domain.md)
	writeTime  = 40 * time.Second // more than pollTime
)

// Serve answers gate.Client on l, a unix socket, until ctx ends. Only root, our
// own user and the users of allow are heard.
func (a *Attester) Serve(ctx context.Context, l net.Listener, allow []uint32) error {
	srv := &http.Server{
		Handler:           a.handler(),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      writeTime,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    maxRequest,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ConnContext:       withPeer,
		ErrorLog:          slog.NewLogLogger(a.Log.Handler(), slog.LevelDebug),
	}
	allow = append([]uint32{0, uint32(unix.Getuid())}, allow...)
	done := make(chan error, 1)
	go func() { done <- srv.Serve(netutil.LimitListener(&peers{l, allow, a.Log}, maxClients)) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	err := srv.Close()
	<-done
	return err
}

func (a *Attester) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", a.serveStatus)
	mux.HandleFunc("GET /v1/credential", func(w http.ResponseWriter, _ *http.Request) {
		chain, err := a.Credential()
		if err != nil {
			http.Error(w, err.Error(), http.StatusNotFound)
			return
		}
		w.Header().Set("Content-Type", "application/pem-certificate-chain") // RFC 8555, section 9.1
		w.Write(chain)
	})
	mux.HandleFunc("POST /v1/sign", a.serveSign)
	mux.HandleFunc("POST /v1/events", a.serveEvent)
	if a.Logon != nil {
		a.logonRoutes(mux)
	}
	if a.Network != nil {
		a.networkRoutes(mux)
	}
	a.volumeRoutes(mux)
	return mux
}

func (a *Attester) serveStatus(w http.ResponseWriter, r *http.Request) {
	s := a.Status()
	if text := r.URL.Query().Get("after"); text != "" {
		after, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			http.Error(w, fmt.Sprintf("after=%.32q: want a version", text), http.StatusBadRequest)
			return
		}
		ctx, cancel := context.WithTimeout(r.Context(), pollTime)
		defer cancel()
		s = a.Wait(ctx, after)
	}
	writeJSON(w, s)
}

func (a *Attester) serveSign(w http.ResponseWriter, r *http.Request) {
	if a.Logon != nil && a.isLogind(r) && !isRoot(r) {
		http.Error(w, "logind has keys of its own", http.StatusForbidden)
		return
	}
	var req gate.SignRequest
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxRequest)).Decode(&req); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if len(req.Digest) != 32 {
		http.Error(w, fmt.Sprintf("digest of %d bytes, want 32", len(req.Digest)), http.StatusBadRequest)
		return
	}
	sig, err := a.Sign(req.Digest)
	switch {
	case errors.Is(err, errShut):
		http.Error(w, err.Error(), http.StatusForbidden)
	case err != nil:
		a.Log.Error("sign", "error", err)
		http.Error(w, "the TPM did not sign", http.StatusInternalServerError)
	default:
		writeJSON(w, gate.SignResponse{Signature: sig})
	}
}

// patient gives an answer more time than writeTime: a TPM that is opened for it,
// or makes an RSA key, may need most of a minute.
func (a *Attester) patient(w http.ResponseWriter, limit time.Duration) {
	if err := http.NewResponseController(w).SetWriteDeadline(time.Now().Add(limit)); err != nil {
		a.Log.Warn("longer answer", "error", err)
	}
}

func writeJSON(w http.ResponseWriter, v any) {
	data, err := json.Marshal(v)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Write(append(data, '\n'))
}

// peers is a listener that hears only some users (unix(7), SO_PEERCRED).
type peers struct {
	net.Listener
	allow []uint32
	log   *slog.Logger
}

func (p *peers) Accept() (net.Conn, error) {
	for {
		c, err := p.Listener.Accept()
		if err != nil {
			return nil, err
		}
		uid, err := service.PeerUID(c)
		if err == nil && slices.Contains(p.allow, uid) {
			return peerConn{c, uid}, nil
		}
		p.log.Warn("client refused", "uid", uid, "error", err)
		c.Close()
	}
}
