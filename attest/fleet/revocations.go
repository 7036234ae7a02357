package fleet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"time"

	"go.etcd.io/etcd/client/v3/concurrency"

	"sekisho/attest"
)

// maxStreams bounds the gateways that one verifier serves.
const maxStreams = 256

// streamWrite bounds the writing of one message.
const streamWrite = 10 * time.Second

// revocations is what every verifier knows of retired devices, following the
// store.
type revocations struct {
	mu      sync.Mutex
	last    map[string]attest.Revocation // newest of each subject
	now     attest.RevocationSet
	log     []attest.Revocation // as they came
	changed chan struct{}
	streams int
}

func (r *revocations) apply(value []byte) error {
	if value == nil {
		return errors.New("a revocation was removed from the store: restore it from a backup")
	}
	var v attest.Revocation
	if err := json.Unmarshal(value, &v); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last[v.Subject()] = v
	r.now.Apply(v)
	r.log = append(r.log, v)
	close(r.changed)
	r.changed = make(chan struct{})
	return nil
}

// snapshot is all that there is, and how long the log is.
func (r *revocations) snapshot() (all []attest.Revocation, seen int, changed <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, v := range r.last {
		all = append(all, v)
	}
	slices.SortFunc(all, func(a, b attest.Revocation) int { return int(int64(a.Sequence) - int64(b.Sequence)) })
	return all, len(r.log), r.changed
}

// since is what came after the first seen entries of the log.
func (r *revocations) since(seen int) (list []attest.Revocation, n int, changed <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.log[seen:]), len(r.log), r.changed
}

// covers returns a revocation that ends what h holds.
func (r *revocations) covers(h attest.Holder) (attest.Revocation, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.now.Covers(h)
}

// revoke notes, in a transaction, that a device has ended or come back.
func (s *Service) revoke(t concurrency.STM, id attest.Digest, revoked bool) error {
	return s.noteRevocation(t, attest.Revocation{Device: id, Revoked: revoked})
}

// noteRevocation notes a revocation in a transaction. The number of the change is the
// next one of the organisation.
func (s *Service) noteRevocation(t concurrency.STM, v attest.Revocation) error {
	n, _, err := read[uint64](t, s.keys.revocationCount())
	if err != nil {
		return err
	}
	if err := write(t, s.keys.revocationCount(), n+1); err != nil {
		return err
	}
	v.Sequence = n + 1
	return write(t, s.keys.revocationOf(v), v)
}

// revocations streams to a gateway until it goes or the server ends.
func (a *api) revocations(w http.ResponseWriter, r *http.Request) {
	feed := &a.service.shared.revoked
	if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 || a.service.Reports == nil {
		reply(w, http.StatusForbidden, attest.Refuse(attest.ReasonRequestMalformed, "revocations are for gateways, which show a certificate of gateway_ca"))
		return
	}
	feed.mu.Lock()
	full := feed.streams >= maxStreams
	if !full {
		feed.streams++
	}
	feed.mu.Unlock()
	if full {
		reply(w, http.StatusServiceUnavailable, attest.Refuse(attest.ReasonBusy, "%d gateways are served; try another verifier", maxStreams))
		return
	}
	defer func() {
		feed.mu.Lock()
		feed.streams--
		feed.mu.Unlock()
	}()
	ending := ending(r.Context())
	c := http.NewResponseController(w)
	c.SetReadDeadline(time.Time{}) // it says nothing more
	beat := time.NewTicker(attest.RevocationBeat)
	defer beat.Stop()
	m := attest.Revocations{Organization: a.service.Organization, Full: true}
	if !a.current(r) {
		reply(w, http.StatusServiceUnavailable, attest.Refuse(attest.ReasonBusy, "this verifier is cut off from the store; try another one"))
		return
	}
	changes, seen, changed := feed.snapshot()
	for {
		m.Time, m.Changes = a.service.Now().UnixMilli(), changes
		for _, v := range changes {
			m.Sequence = max(m.Sequence, v.Sequence)
		}
		signed, err := attest.SignRevocations(m, a.service.Reports.key)
		if err != nil {
			a.log.Error("revocations", "error", err)
			return
		}
		c.SetWriteDeadline(time.Now().Add(streamWrite))
		if json.NewEncoder(w).Encode(signed) != nil || c.Flush() != nil {
			return
		}
		m.Full = false
		select {
		case <-changed:
		case <-beat.C:
		case <-ending.Done():
			return
		case <-r.Context().Done():
			return
		}
		if !a.current(r) {
			return
		}
		changes, seen, changed = feed.since(seen)
	}
}

// currentTime bounds the wait for the store, and for the watch behind it.
const currentTime = 3 * time.Second

// current reports whether this verifier knows of every revocation there is: a
// majority of the store says now which was the last one, and the watch has
// brought that. A verifier that is cut off says nothing to gateways, not even
// to one that has just begun to listen.
func (a *api) current(r *http.Request) bool {
	ctx, cancel := context.WithTimeout(r.Context(), currentTime)
	defer cancel()
	err := a.service.followsRevocations(ctx)
	if err != nil && r.Context().Err() == nil {
		a.log.Error("revocations: the store does not answer", "error", err)
	}
	return err == nil
}

func (s *Service) followsRevocations(ctx context.Context) error {
	last, err := s.Store.Client().Get(ctx, s.keys.revocationCount())
	if err != nil {
		return fmt.Errorf("store: %w", err)
	}
	if len(last.Kvs) == 0 {
		return nil
	}
	return s.shared.Wait(ctx, last.Kvs[0].ModRevision)
}

// endingKey is the key of the server's own context in a request's.
type endingKey struct{}

// ending returns a context that is done when the server begins to end.
func ending(ctx context.Context) context.Context {
	if e, ok := ctx.Value(endingKey{}).(context.Context); ok {
		return e
	}
	return ctx
}
