package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

func open(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(t.Context(), Config{Dir: dir, Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestOpen(t *testing.T) {
	dir := t.TempDir()
	begin := time.Now()
	s := open(t, dir)
	t.Log("open:", time.Since(begin))
	if _, err := Open(t.Context(), Config{Dir: dir}); err == nil {
		t.Error("opened twice")
	}
	if ok, err := s.Commit(t.Context(), Change{Key: "a", Then: []clientv3.Op{clientv3.OpPut("a", "1")}}); err != nil || !ok {
		t.Fatal(ok, err)
	}
	begin = time.Now()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	t.Log("close:", time.Since(begin))
	begin = time.Now()
	s = open(t, dir)
	t.Log("reopen:", time.Since(begin))
	if r, err := s.Client().Get(t.Context(), "a"); err != nil || len(r.Kvs) != 1 {
		t.Error(r, err)
	}
}

// TestCommit has many goroutines count one key up and create keys of their
// own, in common transactions.
func TestCommit(t *testing.T) {
	s := open(t, t.TempDir())
	var wg sync.WaitGroup
	const many, times = 50, 20
	for g := range many {
		wg.Go(func() {
			for i := range times {
				key := fmt.Sprintf("own/%d/%d", g, i)
				create := Change{Key: key, If: []clientv3.Cmp{clientv3.Compare(clientv3.CreateRevision(key), "=", 0)}, Then: []clientv3.Op{clientv3.OpPut(key, "x")}}
				if ok, err := s.Commit(t.Context(), create); err != nil || !ok {
					t.Error(ok, err)
				}
				if ok, err := s.Commit(t.Context(), create); err != nil || ok {
					t.Error("created twice", err)
				}
			}
			for done := false; !done; {
				r, err := s.Client().Get(t.Context(), "sum")
				if err != nil {
					t.Error(err)
					return
				}
				n, rev := 0, int64(0)
				if len(r.Kvs) > 0 {
					fmt.Sscan(string(r.Kvs[0].Value), &n)
					rev = r.Kvs[0].ModRevision
				}
				done, err = s.Commit(t.Context(), Change{Key: "sum",
					If:   []clientv3.Cmp{clientv3.Compare(clientv3.ModRevision("sum"), "=", rev)},
					Then: []clientv3.Op{clientv3.OpPut("sum", fmt.Sprint(n+1))}})
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	r, err := s.Client().Get(t.Context(), "sum")
	if err != nil || string(r.Kvs[0].Value) != fmt.Sprint(many) {
		t.Error(r, err)
	}
	if r, err := s.Client().Get(t.Context(), "own/", clientv3.WithPrefix(), clientv3.WithCountOnly()); err != nil || r.Count != many*times {
		t.Error(r, err)
	}
}

func TestMirror(t *testing.T) {
	s := open(t, t.TempDir())
	put := func(k, v string) int64 {
		r, err := s.Client().Put(t.Context(), k, v)
		if err != nil {
			t.Fatal(err)
		}
		return r.Header.Revision
	}
	for i := range page + 5 {
		put(fmt.Sprintf("m/%05d", i), "x")
	}
	got := make(map[string]string)
	m, err := s.Mirror(t.Context(), "m/", func(k string, v []byte) {
		if v == nil {
			delete(got, k)
			return
		}
		got[k] = string(v)
	}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	put("m/new", "y")
	put("other", "z")
	r, err := s.Client().Delete(t.Context(), "m/00000")
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Wait(t.Context(), r.Header.Revision); err != nil {
		t.Fatal(err)
	}
	m.Close()
	if len(got) != page+5 || got["new"] != "y" {
		t.Errorf("%d keys", len(got))
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if m.Wait(ctx, r.Header.Revision+1) == nil {
		t.Error("a change that is not there was applied")
	}
}

// TestMirrorBehind: a mirror whose watch broke learns what differs and is told
// of nothing else; never does it forget what is still there.
func TestMirrorBehind(t *testing.T) {
	s := open(t, t.TempDir())
	put := func(k, v string) {
		if _, err := s.Client().Put(t.Context(), k, v); err != nil {
			t.Fatal(err)
		}
	}
	put("m/same", "1")
	put("m/changed", "1")
	put("m/removed", "1")
	var told []string
	m, err := s.Mirror(t.Context(), "m/", func(k string, v []byte) { told = append(told, fmt.Sprintf("%s=%s", k, v)) }, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	m.Close()
	told = nil
	put("m/changed", "2")
	put("m/new", "1")
	if _, err := s.Client().Delete(t.Context(), "m/removed"); err != nil {
		t.Fatal(err)
	}
	if _, err := m.load(t.Context()); err != nil {
		t.Fatal(err)
	}
	if want := []string{"changed=2", "new=1", "removed="}; !slices.Equal(told, want) {
		t.Errorf("told %q, want %q", told, want)
	}
}

// TestUpdate: the revision is that of the change, and none if nothing changed.
func TestUpdate(t *testing.T) {
	s := open(t, t.TempDir())
	rev, err := s.Update(t.Context(), func(x concurrency.STM) error { x.Put("a", "1"); return nil })
	if err != nil || rev == 0 {
		t.Error(rev, err)
	}
	if rev, err := s.Update(t.Context(), func(x concurrency.STM) error { x.Get("a"); return nil }); err != nil || rev != 0 {
		t.Error(rev, err)
	}
	var a string
	if err := s.Read(t.Context(), func(x concurrency.STM) error { a = x.Get("a"); return nil }); err != nil || a != "1" {
		t.Error(a, err)
	}
}

// TestMoveInterrupted: a move that the power ended between its last two writes,
// when neither store may be used, is done again.
func TestMoveInterrupted(t *testing.T) {
	from, to := open(t, t.TempDir()), open(t, t.TempDir())
	put := func(s *Store, k string) {
		if _, err := s.Client().Put(t.Context(), k, "x"); err != nil {
			t.Fatal(err)
		}
	}
	move := func() (int, error) { return from.Move(t.Context(), to, "new", time.Unix(0, 0)) }
	put(from, Root+"a")
	if n, err := move(); err != nil || n != 1 {
		t.Fatal(n, err)
	}
	if _, err := move(); !errors.Is(err, errMoved) {
		t.Errorf("moved twice: %v", err)
	}
	put(to, restoringKey) // as before the last write
	put(to, Root+"b")     // of an attempt before
	if n, err := move(); err != nil || n != 1 {
		t.Fatal(n, err)
	}
	if err := to.Usable(t.Context()); err != nil {
		t.Error(err)
	}
	if r, err := to.Client().Get(t.Context(), Root, clientv3.WithPrefix()); err != nil || r.Count != 1 {
		t.Error(r, err)
	}
}
