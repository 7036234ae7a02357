package attester

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"sekisho/attest"
	"sekisho/attest/gate"
	"sekisho/attest/runlog"
)

// Measurer extends and reads PCRs; *tpm.TPM has it.
type Measurer interface {
	Extend(pcr int, digest attest.Digest) error
	ReadPCRs(want []int) (map[int]attest.Digest, error)
}

// errNoRunLog is returned where no log of run-time events is kept.
var errNoRunLog = errors.New("no log of run-time events on this machine")

// RunLog is the log of run-time events in a file that lasts as long as the
// boot does (/run). It is safe for concurrent use; a nil RunLog records
// nothing.
//
// An event is written first and measured after it. Should the daemon die in
// between, the log has one event more than the PCRs; the next use finds that
// out by replay and measures it then, so log and PCRs agree at every quote.
type RunLog struct {
	path string

	mu    sync.Mutex
	level bool // log and PCRs are known to agree
}

// OpenRunLog returns the log at path, and nil for no path: an image that keeps
// no log measures nothing at run time.
func OpenRunLog(path string) *RunLog {
	if path == "" {
		return nil
	}
	return &RunLog{path: path}
}

// hold returns the log as it must go with a quote by m, and keeps events out
// until done is called.
func (l *RunLog) hold(m Measurer) (log []byte, done func(), err error) {
	if l == nil {
		return nil, func() {}, nil
	}
	l.mu.Lock()
	log, err = l.settled(m)
	if errors.Is(err, os.ErrNotExist) {
		log, err = nil, nil // no events were ever recorded
	}
	if err != nil {
		l.mu.Unlock()
		return nil, nil, err
	}
	return log, l.mu.Unlock, nil
}

// record writes and measures an event.
func (l *RunLog) record(m Measurer, e attest.RunEvent) error {
	if l == nil {
		return errNoRunLog
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	log, err := l.settled(m)
	if errors.Is(err, os.ErrNotExist) {
		return errNoRunLog
	}
	if err != nil {
		return err
	}
	next, err := runlog.Append(log, e)
	if err != nil {
		return err
	}
	l.level = false
	f, err := os.OpenFile(l.path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return fmt.Errorf("run-time event log: %w", err)
	}
	_, err = f.Write(next[len(log):])
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("run-time event log: %w", err)
	}
	return l.extend(m, e)
}

// settled reads the log and measures its last event if that was not done.
// l.mu is held.
func (l *RunLog) settled(m Measurer) ([]byte, error) {
	f, err := os.Open(l.path)
	if err != nil {
		return nil, fmt.Errorf("run-time event log: %w", err)
	}
	defer f.Close()
	log, err := io.ReadAll(io.LimitReader(f, attest.MaxRunLog+1))
	if err != nil {
		return nil, fmt.Errorf("run-time event log: %w", err)
	}
	events, err := runlog.Parse(log)
	if err != nil {
		return nil, err
	}
	if l.level || len(events) == 0 {
		return log, nil
	}
	last := events[len(events)-1]
	pcr, _ := last.Kind.PCR() // Parse knows the kind
	now, err := m.ReadPCRs([]int{pcr})
	if err != nil {
		return nil, err
	}
	// A PCR that fits neither is for the verifier to judge: nothing here can
	// mend it.
	if now[pcr] == runlog.Replay(events[:len(events)-1])[pcr] {
		return log, l.extend(m, last)
	}
	l.level = true
	return log, nil
}

func (l *RunLog) extend(m Measurer, e attest.RunEvent) error {
	pcr, _ := e.Kind.PCR()
	if err := m.Extend(pcr, runlog.Digest(e)); err != nil {
		return err
	}
	l.level = true
	return nil
}

// Record measures an event of the host domain's run time, and asks for a new
// quote that shows it.
func (a *Attester) Record(e attest.RunEvent) error {
	if a.RunLog == nil {
		return errNoRunLog
	}
	if err := a.openTPM(); err != nil {
		return err
	}
	a.mu.Lock()
	hw := a.hw
	a.mu.Unlock()
	if hw == nil {
		return errors.New("the TPM was closed; try again")
	}
	if err := a.RunLog.record(hw, e); err != nil {
		return err
	}
	a.Log.Info("measured", "event", e.Kind, "detail", e.Detail)
	select {
	case a.again <- struct{}{}:
	default: // one is asked for already
	}
	return nil
}

// serveEvent answers POST /v1/events, for root and our own user alone: who may
// use the credential may not say what happened on this machine.
func (a *Attester) serveEvent(w http.ResponseWriter, r *http.Request) {
	if !isRoot(r) {
		http.Error(w, "only root may record events", http.StatusForbidden)
		return
	}
	var e attest.RunEvent
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxRequest))
	d.DisallowUnknownFields()
	if err := d.Decode(&e); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	a.patient(w, gate.MeasureTime)
	err := a.Record(e)
	switch {
	case errors.Is(err, errNoRunLog):
		http.Error(w, err.Error(), http.StatusNotFound)
	case err != nil:
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
	default:
		writeJSON(w, struct{}{})
	}
}

// isRoot reports whether a request comes from root or from our own user.
func isRoot(r *http.Request) bool {
	uid, ok := r.Context().Value(peerKey{}).(uint32)
	return ok && (uid == 0 || uid == uint32(unix.Getuid()))
}

type peerKey struct{}

// withPeer notes the user at the other end, as peers found it.
func withPeer(ctx context.Context, c net.Conn) context.Context {
	if a, ok := c.RemoteAddr().(peerAddr); ok {
		return context.WithValue(ctx, peerKey{}, a.uid)
	}
	return ctx
}

// peerConn is a connection whose remote address is the user at the other end:
// that survives the listeners that wrap it.
type peerConn struct {
	net.Conn
	uid uint32
}

func (c peerConn) RemoteAddr() net.Addr { return peerAddr{c.uid} }

type peerAddr struct{ uid uint32 }

func (peerAddr) Network() string  { return "unix" }
func (a peerAddr) String() string { return fmt.Sprintf("uid %d", a.uid) }
