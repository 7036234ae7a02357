package fleet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"

	"sekisho/attest"
	"sekisho/attest/store"
)

// shared is the part of an organisation's records that every verifier holds in
// memory, because each appraisal needs all of it: reference values, policies
// and counts of firmware. It follows the store's changes:
//
//	reference/ID                  attest.ReferenceValues
//	policy/version/N              a signed policy
//	policy/newest                 attest.PolicyID
//	policy/shadow                 a signed policy
//	policy/hold                   Hold
//	revoked/SUBJECT               attest.Revocation, the newest of device/ID, key/, policy/, user/, organization
//	revoked/count                 number of the newest
//	firmware/device/ID            attest.Digest
//	firmware/organization/NAME    counts by digest
type shared struct {
	*store.Mirror
	revoked revocations

	mu         sync.Mutex
	references map[string]attest.ReferenceValues // by ReferenceID
	broken     map[string]error                  // records that cannot be read, by key
}

// follow reads what is shared and keeps it up to date.
func (s *Service) follow(ctx context.Context) error {
	if err := s.Store.Usable(ctx); err != nil {
		return err
	}
	h := &shared{references: make(map[string]attest.ReferenceValues), broken: make(map[string]error)}
	h.revoked = revocations{last: make(map[string]attest.Revocation), changed: make(chan struct{})}
	var err error
	h.Mirror, err = s.Store.Mirror(ctx, s.keys.shared(), func(key string, value []byte) {
		err := s.applyShared(h, key, value)
		h.mu.Lock()
		defer h.mu.Unlock()
		if delete(h.broken, key); err != nil {
			h.broken[key] = err
			s.Log.Error("record in the store cannot be read", "key", key, "error", err)
		}
	}, s.Log)
	if err != nil {
		return err
	}
	s.shared = h
	if err := errors.Join(h.err(), s.Policies.complete()); err != nil {
		h.Close()
		return err
	}
	return nil
}

// err says which records cannot be read. While there are any, nothing is
// affirmed.
func (h *shared) err() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	var errs []error
	for _, key := range sortedKeys(h.broken) {
		errs = append(errs, fmt.Errorf("store: %s: %w", key, h.broken[key]))
	}
	return errors.Join(errs...)
}

func (s *Service) applyShared(h *shared, key string, value []byte) error {
	kind, rest, _ := strings.Cut(key, "/")
	switch kind {
	case "reference":
		var v attest.ReferenceValues
		if value != nil {
			if err := json.Unmarshal(value, &v); err != nil {
				return err
			}
		}
		h.mu.Lock()
		defer h.mu.Unlock()
		if delete(h.references, rest); value != nil {
			h.references[rest] = v
		}
		return nil
	case "policy":
		return s.Policies.apply(rest, value)
	case "revoked":
		if rest == "count" {
			return nil
		}
		return h.revoked.apply(value)
	case "firmware":
		return s.Commons.apply(rest, value)
	}
	return nil
}

// change makes a transaction in what is shared and returns when this verifier
// follows it.
func (s *Service) change(ctx context.Context, f func(concurrency.STM) error) error {
	rev, err := s.Store.Update(ctx, f)
	if err != nil {
		return err
	}
	return s.shared.Wait(ctx, rev)
}

// References lists the reference values that attestctl added, in the order of
// their ids.
func (s *Service) added() []attest.ReferenceValues {
	s.shared.mu.Lock()
	defer s.shared.mu.Unlock()
	list := make([]attest.ReferenceValues, 0, len(s.shared.references))
	for _, id := range sortedKeys(s.shared.references) {
		list = append(list, s.shared.references[id])
	}
	return list
}

// AddReference accepts an image by unsigned values.
func (s *Service) AddReference(ctx context.Context, v attest.ReferenceValues) error {
	return s.change(ctx, func(t concurrency.STM) error { return write(t, s.keys.reference(ReferenceID(v)), v) })
}

// RemoveReference removes what AddReference added, and reports whether there
// was any.
func (s *Service) RemoveReference(ctx context.Context, id string) (found bool, err error) {
	key := s.keys.reference(id)
	err = s.change(ctx, func(t concurrency.STM) error {
		if found = t.Get(key) != ""; found {
			t.Del(key)
		}
		return nil
	})
	return found, err
}

// unsigned are the reference values of the configuration and, where no policy
// keys are configured, those that attestctl added.
func (s *Service) unsigned() []attest.ReferenceValues {
	if s.Policies != nil {
		return s.References
	}
	return append(slices.Clone(s.References), s.added()...)
}

// countFor is how long a count of the enrolled devices is used.
const countFor = 10 * time.Second

// counter remembers how many devices are enrolled: etcd counts them one by one.
type counter struct {
	mu sync.Mutex
	n  int
	at time.Time
}

// enrolled is how many devices are enrolled, or were a moment ago.
func (s *Service) enrolled(ctx context.Context) (int, error) {
	s.count.mu.Lock()
	defer s.count.mu.Unlock()
	if now := s.Now(); s.count.at.IsZero() || now.Sub(s.count.at).Abs() >= countFor {
		r, err := s.Store.Client().Get(ctx, string(s.keys)+"device/", clientv3.WithPrefix(), clientv3.WithCountOnly())
		if err != nil {
			return 0, fmt.Errorf("store: %w", err)
		}
		s.count.n, s.count.at = int(r.Count), now
	}
	return s.count.n, nil
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
