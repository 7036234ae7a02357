package attester

import (
	"context"
	"log/slog"
	"net/http"
	"testing"
	"time"

	"sekisho/attest"
)

// RecordForTest is record.
func (l *RunLog) RecordForTest(m Measurer, e attest.RunEvent) error { return l.record(m, e) }

// PeerForTest is what a connection by uid carries.
func PeerForTest(ctx context.Context, uid uint32) context.Context {
	return context.WithValue(ctx, peerKey{}, uid)
}

// ForTest is an Attester that does not run.
func ForTest(t *testing.T, org *attest.Organization, open func() (Hardware, error), log *RunLog, state Storage) *Attester {
	a, err := New(Config{Organization: org, OpenTPM: open, RunLog: log, State: state, Now: time.Now, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// HandlerForTest is the socket's API without the socket.
func HandlerForTest(t *testing.T, org *attest.Organization, open func() (Hardware, error), log *RunLog, state Storage) http.Handler {
	return ForTest(t, org, open, log, state).handler()
}
