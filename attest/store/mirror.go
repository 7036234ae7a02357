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
	reset  func()
	apply  func(key string, value []byte)
	log    *slog.Logger

	mu      sync.Mutex
	rev     int64         // that has been applied
	changed chan struct{} // closed when rev rises
	stop    context.CancelFunc
	wg      sync.WaitGroup
}

// Mirror reads the keys with a prefix and then follows them until Close. apply
// gets each, without the prefix, and its value, nil if it was removed; before
// everything is read anew, reset is called. Both are called by one goroutine
// at a time.
func (s *Store) Mirror(ctx context.Context, prefix string, reset func(), apply func(key string, value []byte), log *slog.Logger) (*Mirror, error) {
	m := &Mirror{store: s, prefix: prefix, reset: reset, apply: apply, log: log, changed: make(chan struct{})}
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

func (m *Mirror) load(ctx context.Context) (int64, error) {
	m.reset()
	rev, err := m.store.Scan(ctx, m.prefix, 0, func(kv *mvccpb.KeyValue) error {
		m.apply(strings.TrimPrefix(string(kv.Key), m.prefix), kv.Value)
		return nil
	})
	if err != nil {
		return 0, err
	}
	m.reached(rev)
	return rev, nil
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
			key, value := strings.TrimPrefix(string(e.Kv.Key), m.prefix), e.Kv.Value
			if e.Type == mvccpb.DELETE {
				value = nil
			} else if value == nil {
				value = []byte{}
			}
			m.apply(key, value)
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
