package store

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// A backup is text: a line with its format, revision and time; one line for
// each record; a last line with their number and the SHA-256 of all lines
// before. Records with a lease are left out: they are gone in minutes anyway.
const (
	backupFormat = "sekisho/backup/1"
	maxLine      = 8 << 20 // bytes

	// Root is the prefix of all records, of all organisations.
	Root = "/sekisho/1/"

	// A store with one of these keys is not to be used: its records are not
	// all there yet, or have moved to another store.
	restoringKey = "/sekisho/restoring"
	movedKey     = "/sekisho/moved"

	restoreBatch = 50 // records of one transaction
)

// Backup describes a backup.
type Backup struct {
	Format   string    `json:"format"`
	Revision int64     `json:"revision"`
	Time     time.Time `json:"time"`
	Records  int       `json:"-"`
}

type backupRecord struct {
	Key   string `json:"k"`
	Value []byte `json:"v"`
}

type backupEnd struct {
	Records int    `json:"records"`
	SHA256  string `json:"sha256"`
}

// Why a store is not to be used.
var (
	errFilling = errors.New("a restore or move into this store did not end: run it again")
	errMoved   = errors.New("its records have moved to another store: name that in the configuration")
)

// Usable fails if the store's records are not all there, or have moved.
func (s *Store) Usable(ctx context.Context) error {
	r, err := s.client.Txn(ctx).Then(clientv3.OpGet(restoringKey), clientv3.OpGet(movedKey)).Commit()
	if err != nil {
		return fmt.Errorf("store: %w", err)
	}
	for i, why := range []error{errFilling, errMoved} {
		if kvs := r.Responses[i].GetResponseRange().Kvs; len(kvs) > 0 {
			return fmt.Errorf("store: %w (%s)", why, kvs[0].Value)
		}
	}
	return nil
}

// Backup writes all records as of one moment, while others go on.
func (s *Store) Backup(ctx context.Context, to io.Writer, now time.Time) (Backup, error) {
	head, err := s.client.Get(ctx, "/", clientv3.WithCountOnly())
	if err != nil {
		return Backup{}, fmt.Errorf("backup: %w", err)
	}
	b := Backup{Format: backupFormat, Revision: head.Header.Revision, Time: now.UTC().Truncate(time.Second)}
	sum := sha256.New()
	w := bufio.NewWriter(io.MultiWriter(to, sum))
	line := json.NewEncoder(w)
	if err := line.Encode(b); err != nil {
		return b, fmt.Errorf("backup: %w", err)
	}
	if _, err := s.Scan(ctx, Root, b.Revision, func(kv *mvccpb.KeyValue) error {
		if kv.Lease != 0 {
			return nil
		}
		b.Records++
		return line.Encode(backupRecord{string(kv.Key), kv.Value})
	}); err != nil {
		return b, fmt.Errorf("backup: %w", err)
	}
	if err := w.Flush(); err != nil {
		return b, fmt.Errorf("backup: %w", err)
	}
	if err := json.NewEncoder(to).Encode(backupEnd{b.Records, hex.EncodeToString(sum.Sum(nil))}); err != nil {
		return b, fmt.Errorf("backup: %w", err)
	}
	return b, nil
}

// ReadBackup reads a backup and calls f with each record. Only when it returns
// without an error is the backup whole.
func ReadBackup(from io.Reader, f func(key string, value []byte) error) (Backup, error) {
	var b Backup
	in := bufio.NewScanner(from)
	in.Buffer(nil, maxLine)
	sum := sha256.New()
	for in.Scan() {
		text := in.Bytes()
		if b.Format == "" {
			if err := strict(text, &b); err != nil || b.Format != backupFormat {
				return b, fmt.Errorf("backup: not one of ours: format %.64q", b.Format)
			}
			add(sum, text)
			continue
		}
		var end backupEnd
		if strict(text, &end) == nil {
			if end.Records != b.Records || end.SHA256 != hex.EncodeToString(sum.Sum(nil)) {
				return b, errors.New("backup: damaged: its checksum is another one")
			}
			if in.Scan() {
				return b, errors.New("backup: damaged: text behind its end")
			}
			return b, in.Err()
		}
		var r backupRecord
		if err := strict(text, &r); err != nil || len(r.Key) <= len(Root) || r.Key[:len(Root)] != Root {
			return b, fmt.Errorf("backup: damaged: record %d is none of ours", b.Records+1)
		}
		if err := f(r.Key, r.Value); err != nil {
			return b, err
		}
		b.Records++
		add(sum, text)
	}
	if err := in.Err(); err != nil {
		return b, fmt.Errorf("backup: %w", err)
	}
	return b, errors.New("backup: damaged: it has no end")
}

func add(h hash.Hash, line []byte) {
	h.Write(line)
	h.Write([]byte{'\n'})
}

func strict(text []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	return d.Decode(v)
}

// Restore writes the records of a backup into a store that has none. The
// backup is read twice: nothing is written unless it is whole. A restore that
// was interrupted is done again, and until then nobody uses the store.
func (s *Store) Restore(ctx context.Context, from io.ReadSeeker) (Backup, error) {
	b, err := ReadBackup(from, func(string, []byte) error { return nil })
	if err != nil {
		return b, err
	}
	if _, err := from.Seek(0, io.SeekStart); err != nil {
		return b, fmt.Errorf("backup: %w", err)
	}
	w, err := s.fill(ctx, fmt.Sprintf("backup of %s", b.Time.Format(time.RFC3339)))
	if err != nil {
		return b, err
	}
	if _, err := ReadBackup(from, func(key string, value []byte) error { return w.put(key, value) }); err != nil {
		return b, err
	}
	return b, w.end()
}

// Move copies all records into another store that has none, compares both, and
// marks this one as moved: no verifier starts with it any more. Nothing may use
// this store meanwhile. A move that was interrupted is done again, also one
// that had come to the mark: the other store is not used before it ends.
func (s *Store) Move(ctx context.Context, to *Store, name string, now time.Time) (int, error) {
	if err := s.Usable(ctx); err != nil && !(errors.Is(err, errMoved) && errors.Is(to.Usable(ctx), errFilling)) {
		return 0, err
	}
	w, err := to.fill(ctx, "move")
	if err != nil {
		return 0, err
	}
	copied := func(kv *mvccpb.KeyValue) error {
		if kv.Lease != 0 {
			return nil
		}
		return w.put(string(kv.Key), kv.Value)
	}
	if _, err := s.Scan(ctx, Root, 0, copied); err != nil {
		return 0, err
	}
	if err := w.flush(); err != nil {
		return 0, err
	}
	ours, err := s.sum(ctx)
	if err != nil {
		return 0, err
	}
	theirs, err := to.sum(ctx)
	if err != nil {
		return 0, err
	}
	if ours != theirs {
		return 0, errors.New("store: the records differ after the move: did a verifier run meanwhile? Stop it, move again")
	}
	if _, err := s.client.Put(ctx, movedKey, fmt.Sprintf("to %s at %s", name, now.UTC().Format(time.RFC3339))); err != nil {
		return 0, fmt.Errorf("store: %w", err)
	}
	return w.n, w.end()
}

// sum is the SHA-256 of all records.
func (s *Store) sum(ctx context.Context) (string, error) {
	h := sha256.New()
	_, err := s.Scan(ctx, Root, 0, func(kv *mvccpb.KeyValue) error {
		if kv.Lease == 0 {
			fmt.Fprintf(h, "%d %s %d ", len(kv.Key), kv.Key, len(kv.Value))
			h.Write(kv.Value)
		}
		return nil
	})
	return hex.EncodeToString(h.Sum(nil)), err
}

// filler fills a store that had no records.
type filler struct {
	s   *Store
	ctx context.Context
	ops []clientv3.Op
	n   int
	len int
}

// fill marks the store as one that is being filled. It must have no records;
// those of a filling that was interrupted go.
func (s *Store) fill(ctx context.Context, why string) (*filler, error) {
	begin := []clientv3.Op{clientv3.OpPut(restoringKey, why)}
	if err := s.Usable(ctx); errors.Is(err, errFilling) {
		begin = append(begin, clientv3.OpDelete(Root, clientv3.WithPrefix()))
	} else if err != nil {
		return nil, err
	} else if r, err := s.client.Get(ctx, Root, clientv3.WithPrefix(), clientv3.WithCountOnly()); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	} else if r.Count > 0 {
		return nil, fmt.Errorf("store: it has %d records already, and only an empty one is filled", r.Count)
	}
	if _, err := s.client.Txn(ctx).Then(begin...).Commit(); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	return &filler{s: s, ctx: ctx}, nil
}

func (f *filler) put(key string, value []byte) error {
	f.ops = append(f.ops, clientv3.OpPut(key, string(value)))
	f.n++
	if f.len += len(value); len(f.ops) < restoreBatch && f.len < maxRequest/16 {
		return nil
	}
	return f.flush()
}

func (f *filler) flush() error {
	if len(f.ops) == 0 {
		return nil
	}
	if err := f.s.room(); err != nil {
		return err
	}
	if _, err := f.s.client.Txn(f.ctx).Then(f.ops...).Commit(); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	f.ops, f.len = nil, 0
	return nil
}

// end writes the rest and lets the store be used.
func (f *filler) end() error {
	if err := f.flush(); err != nil {
		return err
	}
	if _, err := f.s.client.Delete(f.ctx, restoringKey); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	return nil
}
