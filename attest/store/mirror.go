package store

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// again is how long a mirror waits before it reads anew.
const again = time.Second

// Mirror follows all keys with a prefix, in memory, through a watch. It lags
// behind the store by a moment; Wait is for those who have just written.
type Mirror struct {
	store  *Store
	prefix string
	apply  func(key string, value []byte)
	log    *slog.Logger
	has    map[string]int64 // keys that were applied, with the revision of their last change

	mu      sync.Mutex
	rev     int64         // that has been applied
	changed chan struct{} // closed when rev rises
	stop    context.CancelFunc
	wg      sync.WaitGroup
}

// Mirror reads the keys with a prefix and then follows them until Close. apply
// gets each, without the prefix, and its value, nil if it was removed, by one
// goroutine at a time. When a watch has broken, apply gets what differs and
// nothing else: at no time does it know less than the store once held.
func (s *Store) Mirror(ctx context.Context, prefix string, apply func(key string, value []byte), log *slog.Logger) (*Mirror, error) {
	m := &Mirror{store: s, prefix: prefix, apply: apply, log: log, has: make(map[string]int64), changed: make(chan struct{})}
	rev, err := m.load(ctx)
	if err != nil {
		return nil, err
	}
	run, stop := context.WithCancel(context.WithoutCancel(ctx))
	m.stop = stop
	m.wg.Go(func() { m.follow(run, rev) })
	return m, nil
}

// Close ends the mirror.
func (m *Mirror) Close() {
	m.stop()
	m.wg.Wait()
}

// page bounds the keys of one answer: that of a cluster may not be larger than
// 2 MB by default.
const page = 1000

// load reads everything and applies what is not known yet.
func (m *Mirror) load(ctx context.Context) (int64, error) {
	there := make(map[string]bool)
	rev, err := m.store.Scan(ctx, m.prefix, 0, func(kv *mvccpb.KeyValue) error {
		there[string(kv.Key)] = true
		if m.has[string(kv.Key)] != kv.ModRevision {
			m.take(kv, false)
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	for key := range m.has {
		if !there[key] {
			m.take(&mvccpb.KeyValue{Key: []byte(key)}, true)
		}
	}
	m.reached(rev)
	return rev, nil
}

// take applies one change.
func (m *Mirror) take(kv *mvccpb.KeyValue, removed bool) {
	key, value := strings.TrimPrefix(string(kv.Key), m.prefix), kv.Value
	if removed {
		delete(m.has, string(kv.Key))
		value = nil
	} else {
		m.has[string(kv.Key)] = kv.ModRevision
		if value == nil {
			value = []byte{}
		}
	}
	m.apply(key, value)
}

// Scan calls f with all keys of a prefix as of one revision, the newest if rev
// is 0, in order, and returns that revision.
func (s *Store) Scan(ctx context.Context, prefix string, rev int64, f func(*mvccpb.KeyValue) error) (int64, error) {
	from, end := prefix, clientv3.GetPrefixRangeEnd(prefix)
	for {
		resp, err := s.client.Get(ctx, from, clientv3.WithRange(end), clientv3.WithLimit(page), clientv3.WithRev(rev))
		if err != nil {
			return 0, fmt.Errorf("store: %w", err)
		}
		if rev == 0 {
			rev = resp.Header.Revision
		}
		for _, kv := range resp.Kvs {
			if err := f(kv); err != nil {
				return 0, err
			}
		}
		if !resp.More {
			return rev, nil
		}
		from = string(resp.Kvs[len(resp.Kvs)-1].Key) + "\x00"
	}
}

func (m *Mirror) follow(ctx context.Context, rev int64) {
	for ctx.Err() == nil {
		m.watch(ctx, rev)
		for ctx.Err() == nil {
			select {
			case <-ctx.Done():
			case <-time.After(again):
			}
			var err error
			if rev, err = m.load(ctx); err == nil {
				break
			}
			m.log.Warn("store cannot be read; trying again", "error", err)
		}
	}
}

// watch applies all changes after rev until the watch breaks.
func (m *Mirror) watch(ctx context.Context, rev int64) {
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer cancel()
	for r := range m.store.client.Watch(ctx, m.prefix, clientv3.WithPrefix(), clientv3.WithRev(rev+1)) {
		if r.Err() != nil {
			m.log.Debug("watch ended", "error", r.Err())
			return
		}
		for _, e := range r.Events {
			m.take(e.Kv, e.Type == mvccpb.DELETE)
		}
		m.reached(r.Header.Revision)
	}
}

func (m *Mirror) reached(rev int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if rev > m.rev {
		m.rev = rev
		close(m.changed)
		m.changed = make(chan struct{})
	}
}

// Wait returns when the change of revision rev, of a key with the prefix, has
// been applied.
func (m *Mirror) Wait(ctx context.Context, rev int64) error {
	for {
		m.mu.Lock()
		done, changed := m.rev >= rev, m.changed
		m.mu.Unlock()
		if done {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("store: change is written and not seen yet: %w", context.Cause(ctx))
		}
	}
}
