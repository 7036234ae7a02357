// Package api is the small HTTP server and client over unix sockets that
// netd's daemons show their status with.
package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/net/netutil"
)

const (
	maxAnswer = 16 << 20 // bytes of an answer that the client reads
	timeout   = 10 * time.Second
	maxConns  = 32
)

// Listen returns the listening socket that the service manager passed
// (LISTEN_FDS, sd_listen_fds(3)), or else a new one at path with mode 0660.
func Listen(path string) (net.Listener, error) {
	passed, err := activation.Listeners()
	if err != nil {
		return nil, fmt.Errorf("passed sockets: %w", err)
	}
	switch {
	case len(passed) == 1 && passed[0] != nil: // nil: a descriptor that does not listen
		return passed[0], nil
	case len(passed) > 0:
		return nil, fmt.Errorf("%d sockets passed by LISTEN_FDS, want one that listens", len(passed))
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("socket left over: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o660); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// JSON shows what get returns at GET path.
func JSON(path string, get func() any) func(*http.ServeMux) {
	return func(mux *http.ServeMux) {
		mux.HandleFunc("GET "+path, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			json.NewEncoder(w).Encode(get())
		})
	}
}

// Serve answers GET /v1/status with what status returns, in JSON, until ctx is
// done, and what more adds. allow decides about each connection. It closes l.
func Serve(ctx context.Context, l net.Listener, allow func(net.Conn) error, status func() any, more ...func(*http.ServeMux)) error {
	mux := http.NewServeMux()
	for _, add := range append(more, JSON("/v1/status", status)) {
		add(mux)
	}
	srv := &http.Server{
		Handler: mux, ReadTimeout: timeout, WriteTimeout: timeout, IdleTimeout: timeout, MaxHeaderBytes: 8 << 10,
	}
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	if err := srv.Serve(netutil.LimitListener(&guard{l, allow}, maxConns)); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("status socket: %w", err)
	}
	return ctx.Err()
}

// guard is a listener that closes the connections of peers not allowed.
type guard struct {
	net.Listener
	allow func(net.Conn) error
}

func (g *guard) Accept() (net.Conn, error) {
	for {
		c, err := g.Listener.Accept()
		if err != nil || g.allow(c) == nil {
			return c, err
		}
		c.Close()
	}
}

// Do sends one request to the daemon at the unix socket and decodes its JSON
// answer into out unless that is nil.
func Do(ctx context.Context, socket, method, path string, body io.Reader, out any) error {
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "http://daemon"+path, body)
	if err != nil {
		return err
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return err
	}
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("%s %s: http status %d: %.200s", method, path, resp.StatusCode, data)
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(data, out)
}
