package boot

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"sekisho/attest/gate"
	"sekisho/hostos/update"
)

// watchGood raises the rollback counter once this boot has proved that the
// image is good.
func (h *host) watchGood(ctx context.Context) {
	r, err := update.ReadRelease(policyFile)
	if err != nil {
		return // an image without policies: the disk says so
	}
	netd := unixClient(NetdSocket)
	g := update.Good{
		Release: r,
		InTunnel: func(ctx context.Context) bool {
			state, err := daemonState(ctx, netd)
			return err == nil && state == "Tunnel"
		},
		Raise: gate.NewClient(AttestdSocket).RaiseRollback,
		Say:   func(format string, a ...any) { h.console.line("init", format, a...) },
	}
	g.Watch(ctx)
}

// daemonState asks a daemon for the state in its status.
func daemonState(ctx context.Context, c *http.Client) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://daemon/v1/status", nil)
	if err != nil {
		return "", err
	}
	resp, err := c.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	var s struct {
		State string `json:"state"`
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxStatus)).Decode(&s); err != nil {
		return "", fmt.Errorf("status: %w", err)
	}
	return s.State, nil
}

// unixClient is an HTTP client of the socket at path.
func unixClient(path string) *http.Client {
	return &http.Client{
		Timeout: 10 * time.Second,
		Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", path)
		}},
	}
}
