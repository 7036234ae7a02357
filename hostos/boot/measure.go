package boot

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"sekisho/attest"
	"sekisho/attest/gate"
)

// EventsFile is the log of what is measured after the boot. attestd writes it,
// init makes it: without the file nothing is measured.
const EventsFile = RunDir + "/events"

// Waits between attempts to reach attestd, which may still be starting.
const (
	measureWait  = 500 * time.Millisecond
	measureLimit = 5 * time.Minute
)

// makeEvents makes the empty log for attestd alone.
func makeEvents(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("run-time events: %w", err)
	}
	uid, _ := lookup("attestd")
	return errors.Join(f.Chown(int(uid), int(uid)), f.Close())
}

// workEvent is the event of a work domain that starts with these arguments.
// JSON keeps the bounds between them, so no two vectors share a digest.
func workEvent(args []string) (attest.RunEvent, error) {
	b, err := json.Marshal(args)
	if err != nil {
		return attest.RunEvent{}, fmt.Errorf("run-time events: %w", err)
	}
	return attest.RunEvent{Kind: attest.EventWorkDomain, Detail: sha256.Sum256(b)}, nil
}

// recorder measures events; gate.Client has it.
type recorder interface {
	Record(context.Context, attest.RunEvent) error
}

// measure has e measured, trying again until attestd serves, ctx ends or
// measureLimit is over.
func measure(ctx context.Context, r recorder, e attest.RunEvent) error {
	ctx, cancel := context.WithTimeout(ctx, measureLimit)
	defer cancel()
	tick := time.NewTicker(measureWait)
	defer tick.Stop()
	for {
		err := r.Record(ctx, e)
		if err == nil || errors.Is(err, gate.ErrNoEvents) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-tick.C:
		}
	}
}

// maxStarts bounds the starts of the work domain that wait to be measured.
const maxStarts = 16

// measureWork measures each start of the work domain, also those after a crash
// of QEMU, until ctx ends. Without a TPM there is nothing that could measure,
// and the network stays closed for that reason.
func (h *host) measureWork(ctx context.Context, args []string, starts <-chan struct{}) {
	e, err := workEvent(args)
	if err != nil {
		h.console.line("init", "warning: not measured: %s: %v", attest.EventWorkDomain, err)
		return
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-starts:
		}
		if err := measure(ctx, gate.NewClient(AttestdSocket), e); err != nil && ctx.Err() == nil {
			h.console.line("init", "warning: not measured: %s: %v", e.Kind, err)
		}
	}
}
