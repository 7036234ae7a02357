// Package auditlog keeps a log of all reports that cannot be changed unseen: a
// Merkle tree (RFC 6962, in the tiles of C2SP tlog-tiles, by Tessera) with one
// leaf for each report of the archive, in the archive's order. Its head, the
// checkpoint, is signed by the log's own key as a note (C2SP tlog-checkpoint).
// Who has kept one checkpoint can tell whether anything before it was changed,
// removed or put in since.
//
// The log follows the archive, beside the requests: a report is in the archive,
// synced to disk, before the laptop hears its result, and in the log about a
// second later. After a crash the log goes on behind its last leaf, so each
// report of the archive is in it once. The archive removes no report that the
// log has not seen.
package auditlog

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/transparency-dev/tessera"
	"github.com/transparency-dev/tessera/api/layout"
	"github.com/transparency-dev/tessera/storage/posix"
	"golang.org/x/mod/sumdb/note"

	"sekisho/attest/archive"
)

const (
	batch       = 1024                   // reports that go into the log at once
	follow      = time.Second            // how often the archive is looked at
	gather      = 20 * time.Millisecond  // for less than a batch
	publish     = 200 * time.Millisecond // at least between two checkpoints
	clean       = 10 * time.Second       // how often tiles are removed that fuller ones have replaced
	closeWithin = 10 * time.Second

	// tail is how many leaves at the end of the log are compared with the
	// archive at a start: of a batch whose writing failed a part may be there.
	tail = 2*batch + layout.EntryBundleWidth
)

// Log is an open log. It is safe for concurrent use.
type Log struct {
	tiles    tiles
	key      note.Verifier
	text     string // of key
	archive  *archive.Archive
	log      *slog.Logger
	appender *tessera.Appender
	reader   tessera.LogReader
	shutdown func(context.Context) error
	work     context.Context // of Tessera's goroutines, until Close
	cancel   context.CancelFunc
	stop     chan struct{}
	wg       sync.WaitGroup
	size     atomic.Uint64 // leaves

	// Of the goroutine that follows the archive.
	resumed bool
	at      archive.Position
	seen    map[place]bool // leaves behind at
}

// place is a report in the archive.
type place struct {
	id archive.ID
	at archive.Position
}

// Open opens or creates the log of an archive in a directory, which no other
// process may have open; the archive's lock sees to that where both are in one
// store. The archive must stay open until Close.
func Open(ctx context.Context, dir string, key Key, a *archive.Archive, log *slog.Logger) (*Log, error) {
	l, err := open(ctx, dir, key, a, log)
	if err != nil {
		return nil, fmt.Errorf("audit log %s: %w", dir, err)
	}
	l.wg.Go(func() { l.follow(l.work) })
	return l, nil
}

// open is Open without the goroutine that follows the archive.
func open(ctx context.Context, dir string, key Key, a *archive.Archive, log *slog.Logger) (*Log, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	driver, err := posix.New(ctx, posix.Config{Path: dir})
	if err != nil {
		return nil, err
	}
	l := &Log{tiles: tiles{Dir(dir)}, key: key.verifier, text: key.public, archive: a, log: log, stop: make(chan struct{})}
	// Nobody is to find a log here that was begun by another key.
	if _, _, err := l.tiles.checkpoint(ctx, l.key); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("is this log of another key? %w", err)
	}
	options := tessera.NewAppendOptions().WithCheckpointSigner(key.signer).WithCheckpointRepublishInterval(0).
		WithBatching(batch, gather).WithCheckpointInterval(publish).WithGarbageCollectionInterval(clean).WithShutdownTimeout(closeWithin)
	l.work, l.cancel = context.WithCancel(context.WithoutCancel(ctx))
	if l.appender, l.shutdown, l.reader, err = tessera.NewAppender(l.work, driver, options); err != nil {
		l.cancel()
		return nil, err
	}
	a.Keep(archive.Position{})
	if err := l.resume(l.work); err != nil {
		l.cancel()
		return nil, err
	}
	return l, nil
}

// Close waits until all reports of the archive are in the log and under a
// checkpoint.
func (l *Log) Close() error {
	close(l.stop)
	l.wg.Wait()
	defer l.cancel()
	if err := l.shutdown(context.Background()); err != nil {
		return fmt.Errorf("audit log: %w", err)
	}
	return nil
}

// Key is the public key that checkpoints are verified by, as a note's key.
func (l *Log) Key() string { return l.text }

// Read implements Source: the files of the log, for copies of it.
func (l *Log) Read(ctx context.Context, name string, limit int64) ([]byte, error) {
	if name != layout.CheckpointPath && !strings.HasPrefix(name, "tile/") {
		return nil, fmt.Errorf("%.100q is no file of the log: %w", name, os.ErrNotExist)
	}
	return l.tiles.Read(ctx, name, limit)
}

// Size is how many leaves the log has.
func (l *Log) Size() uint64 { return l.size.Load() }

// follow takes in what is new in the archive until Close, and what is left
// then.
func (l *Log) follow(ctx context.Context) {
	tick := time.NewTicker(follow)
	defer tick.Stop()
	for closing := false; ; {
		if err := l.takeIn(ctx); err != nil {
			l.log.Error("the audit log cannot go on; reports stay in the archive meanwhile", "error", err)
		}
		if closing {
			return
		}
		select {
		case <-l.stop:
			closing = true
		case <-tick.C:
		}
	}
}

// takeIn puts leaves into the log for all reports that it lacks.
func (l *Log) takeIn(ctx context.Context) error {
	for {
		if !l.resumed {
			if err := l.resume(ctx); err != nil {
				return err
			}
		}
		n, err := l.takeBatch(ctx)
		if err != nil {
			// Some of the batch may be in: resume looks.
			l.resumed = false
			return err
		}
		l.archive.Keep(l.at)
		if n < batch {
			return nil
		}
	}
}

// takeBatch puts the next reports into the log and returns how many it looked
// at.
func (l *Log) takeBatch(ctx context.Context) (n int, err error) {
	var futures []tessera.IndexFuture
	at := l.at
	for ; n < batch && err == nil; n++ {
		var e archive.Stored
		if e, err = l.archive.Next(at); err != nil {
			break
		}
		if at = e.Next; l.seen[place{e.ID, e.At}] {
			delete(l.seen, place{e.ID, e.At})
			continue
		}
		var data []byte
		if data, err = leafOf(e).encode(); err == nil {
			futures = append(futures, l.appender.Add(ctx, tessera.NewEntry(data)))
		}
	}
	if err == io.EOF {
		err = nil
	}
	// All of them are waited for, so none is still under way at a next try.
	for _, f := range futures {
		index, e := f()
		if err = errors.Join(err, e); e == nil {
			l.size.Store(max(l.size.Load(), index.Index+1))
		}
	}
	if err == nil {
		l.at = at
	}
	return n, err
}

// resume finds where in the archive the log ends. It compares the last leaves
// one by one: what the archive has behind the first of them and the log has
// not comes next.
func (l *Log) resume(ctx context.Context) error {
	size, err := l.reader.IntegratedSize(ctx)
	if err != nil {
		return fmt.Errorf("audit log: %w", err)
	}
	l.size.Store(size)
	l.at, l.seen = archive.Position{}, make(map[place]bool)
	from := size - min(size, tail)
	found := false
	if err := l.tiles.each(ctx, from/layout.EntryBundleWidth*layout.EntryBundleWidth, size, func(_ uint64, _ []byte, leaf Leaf) error {
		e, err := l.archive.At(leaf.At)
		if errors.Is(err, archive.ErrNotFound) || err == nil && e.ID != leaf.Report {
			return nil // no longer there, or of an archive that was removed
		}
		if err != nil {
			return err
		}
		if !found || leaf.At.Before(l.at) {
			l.at, found = leaf.At, true
		}
		l.seen[place{leaf.Report, leaf.At}] = true
		return nil
	}); err != nil {
		return fmt.Errorf("audit log: %w", err)
	}
	l.resumed = true
	return nil
}
