package auditlog

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/transparency-dev/tessera/api/layout"
	"golang.org/x/mod/sumdb/note"
)

// Copy brings the copy of a log in a directory up to date, and makes it if
// there is none. Full tiles that are there already are not fetched again: they
// do not change, and Check finds out if they did. The checkpoint is written
// last, so a copy that broke off is still the old one. It returns how many
// leaves the copy has.
func Copy(ctx context.Context, from Source, key note.Verifier, dir string) (size uint64, err error) {
	t := tiles{from}
	c, text, err := t.checkpoint(ctx, key)
	if err != nil {
		return 0, fmt.Errorf("copy of the log: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return 0, fmt.Errorf("copy of the log: %w", err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return 0, fmt.Errorf("copy of the log: %w", err)
	}
	defer root.Close()
	fetch := func(partial, full string, limit int64) error {
		if partial == full {
			if _, err := root.Stat(filepath.FromSlash(full)); err == nil {
				return nil
			}
		}
		name := partial
		data, err := t.Read(ctx, name, limit)
		if errors.Is(err, os.ErrNotExist) && partial != full { // the log has grown meanwhile
			name = full
			data, err = t.Read(ctx, name, limit)
		}
		if err != nil {
			return err
		}
		return put(root, name, data)
	}
	// The leaves, then the tiles of each level above them.
	for n := range tilesOf(c.Size) {
		if err := fetch(layout.EntriesPath(n, layout.PartialTileSize(0, n, c.Size)), layout.EntriesPath(n, 0), maxBundle); err != nil {
			return 0, fmt.Errorf("copy of the log: %w", err)
		}
	}
	level := uint64(0)
	for nodes := c.Size; nodes > 0; nodes >>= layout.TileHeight {
		for n := range tilesOf(nodes) {
			if err := fetch(layout.TilePath(level, n, layout.PartialTileSize(level, n, c.Size)), layout.TilePath(level, n, 0), maxTile); err != nil {
				return 0, fmt.Errorf("copy of the log: %w", err)
			}
		}
		level++
	}
	if err := put(root, layout.CheckpointPath, text); err != nil {
		return 0, fmt.Errorf("copy of the log: %w", err)
	}
	return c.Size, nil
}

// tilesOf is how many tiles so many nodes fill, the last one perhaps in part.
func tilesOf(nodes uint64) uint64 { return (nodes + layout.TileWidth - 1) / layout.TileWidth }

// put writes a file so that it is there whole or not at all.
func put(root *os.Root, name string, data []byte) error {
	name = filepath.FromSlash(name)
	if err := root.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return err
	}
	if err := root.WriteFile(name+".new", data, 0o600); err != nil {
		return err
	}
	return root.Rename(name+".new", name)
}
