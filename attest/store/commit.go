package store

import (
	"context"
	"errors"
	"fmt"

	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	// maxBatch is how many changes go into one transaction: below half of
	// etcd's default of 128 operations (--max-txn-ops), which counts the
	// outer and the inner ones.
	maxBatch = 60

	// MaxOps bounds comparisons and operations of one change.
	MaxOps = 8

	maxRequest = 4 << 20 // bytes of one transaction, for the embedded member
)

// Change is one atomic change: Then happens if all of If hold.
type Change struct {
	Key  string // changes of one key follow each other
	If   []clientv3.Cmp
	Then []clientv3.Op
}

// commit is a change under way.
type commit struct {
	Change
	done chan outcome
}

type outcome struct {
	ok  bool
	err error
}

// Commit makes a change. It returns false, with nothing changed, if the
// conditions do not hold, and only after the change is durable. Changes that
// come at the same time go to etcd as one transaction, in which each is judged
// by itself: agreeing and writing to disk cost the same for one as for many.
func (s *Store) Commit(ctx context.Context, c Change) (bool, error) {
	if len(c.If) > MaxOps || len(c.Then) > MaxOps {
		return false, fmt.Errorf("store: change of %d operations on %d conditions, at most %d", len(c.Then), len(c.If), MaxOps)
	}
	w := &commit{c, make(chan outcome, 1)}
	select {
	case s.commits <- w:
	case <-ctx.Done():
		return false, fmt.Errorf("store: %w", context.Cause(ctx))
	}
	select {
	case o := <-w.done:
		return o.ok, o.err
	case <-ctx.Done(): // it may happen all the same
		return false, fmt.Errorf("store: %w", context.Cause(ctx))
	}
}

// commitLoop commits what has gathered while the last transaction was under
// way.
func (s *Store) commitLoop(ctx context.Context) {
	var late []*commit // second changes of a key, for the next transaction
	for {
		batch, keys := late, make(map[string]bool)
		late = nil
		if len(batch) == 0 {
			select {
			case c := <-s.commits:
				batch = append(batch, c)
			case <-ctx.Done():
				return
			}
		}
		now := batch[:0]
		add := func(c *commit) {
			if keys[c.Key] || len(now) == maxBatch {
				late = append(late, c)
				return
			}
			keys[c.Key] = true
			now = append(now, c)
		}
		for _, c := range batch {
			add(c)
		}
	gather:
		for len(now) < maxBatch && len(late) < maxBatch {
			select {
			case c := <-s.commits:
				add(c)
			default:
				break gather
			}
		}
		s.commitAll(ctx, now)
	}
}

func (s *Store) commitAll(ctx context.Context, batch []*commit) {
	err := s.room()
	var resp *clientv3.TxnResponse
	if err == nil {
		ops := make([]clientv3.Op, len(batch))
		for i, c := range batch {
			ops[i] = clientv3.OpTxn(c.If, c.Then, nil)
		}
		if resp, err = s.client.Txn(ctx).Then(ops...).Commit(); err != nil {
			err = fmt.Errorf("store: %w", err)
		} else if len(resp.Responses) != len(batch) {
			err = errors.New("store: etcd answered to another transaction")
		}
	}
	for i, c := range batch {
		if err != nil {
			c.done <- outcome{err: err}
			continue
		}
		c.done <- outcome{ok: resp.Responses[i].GetResponseTxn().GetSucceeded()}
	}
}
