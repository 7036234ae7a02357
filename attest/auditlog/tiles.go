package auditlog

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"time"

	"github.com/transparency-dev/formats/log"
	"github.com/transparency-dev/merkle/rfc6962"
	"github.com/transparency-dev/tessera/api"
	"github.com/transparency-dev/tessera/api/layout"
	"golang.org/x/mod/sumdb/note"
)

// Limits of what is read of a log.
const (
	maxCheckpoint = 16 << 10
	maxBundle     = layout.EntryBundleWidth * (2 + maxLeaf)
	maxTile       = layout.TileWidth * 32
	fetchTime     = 30 * time.Second
)

// Source is where the files of a log, or of a copy of it, come from. A file
// that is not there is os.ErrNotExist, one longer than limit an error.
type Source interface {
	Read(ctx context.Context, name string, limit int64) ([]byte, error)
}

// Dir is the log in a directory.
type Dir string

// Read implements Source.
func (d Dir) Read(_ context.Context, name string, limit int64) ([]byte, error) {
	f, err := os.OpenInRoot(string(d), filepath.FromSlash(name))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readAtMost(f, name, limit)
}

// Mirror is the log below a URL.
type Mirror struct{ url *url.URL }

// NewMirror returns the log below a URL of HTTP or HTTPS. What it sends is
// judged by the log's signature, not by who sends it.
func NewMirror(text string) (*Mirror, error) {
	u, err := url.Parse(text)
	if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" {
		return nil, fmt.Errorf("mirror %.200q: want http:// or https:// and a host", text)
	}
	return &Mirror{u}, nil
}

// Read implements Source.
func (m *Mirror) Read(ctx context.Context, name string, limit int64) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, fetchTime)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, m.url.JoinPath(name).String(), nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusOK:
		return readAtMost(resp.Body, name, limit)
	case http.StatusNotFound:
		return nil, fmt.Errorf("%s: %w", req.URL, os.ErrNotExist)
	}
	return nil, fmt.Errorf("%s: http status %d", req.URL, resp.StatusCode)
}

func readAtMost(r io.Reader, name string, limit int64) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path.Base(name), err)
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("%s: over %d bytes", path.Base(name), limit)
	}
	return data, nil
}

// tiles reads a log in the layout of C2SP tlog-tiles.
type tiles struct{ Source }

// checkpoint reads the head of the log, which must be signed by key.
func (t tiles) checkpoint(ctx context.Context, key note.Verifier) (*log.Checkpoint, []byte, error) {
	data, err := t.Read(ctx, layout.CheckpointPath, maxCheckpoint)
	if err != nil {
		return nil, nil, err
	}
	c, err := ParseCheckpoint(data, key)
	return c, data, err
}

// ParseCheckpoint reads a checkpoint, which must be signed by key.
func ParseCheckpoint(data []byte, key note.Verifier) (*log.Checkpoint, error) {
	if len(data) > maxCheckpoint {
		return nil, fmt.Errorf("checkpoint of %d bytes, at most %d", len(data), maxCheckpoint)
	}
	c, _, _, err := log.ParseCheckpoint(data, key.Name(), key)
	if err != nil {
		return nil, fmt.Errorf("checkpoint: %w", err)
	}
	if len(c.Hash) != rfc6962.DefaultHasher.Size() {
		return nil, fmt.Errorf("checkpoint: root hash of %d bytes", len(c.Hash))
	}
	return c, nil
}

// read reads a tile, or the full one that has replaced it.
func (t tiles) read(ctx context.Context, partial, full string, limit int64) ([]byte, error) {
	data, err := t.Read(ctx, partial, limit)
	if errors.Is(err, os.ErrNotExist) && partial != full {
		return t.Read(ctx, full, limit)
	}
	return data, err
}

// tile is a client.TileFetcherFunc.
func (t tiles) tile(ctx context.Context, level, index uint64, p uint8) ([]byte, error) {
	return t.read(ctx, layout.TilePath(level, index, p), layout.TilePath(level, index, 0), maxTile)
}

// bundle returns the leaves of the bundle that has the leaf at index, in a log
// of size leaves.
func (t tiles) bundle(ctx context.Context, index, size uint64) ([][]byte, error) {
	n := index / layout.EntryBundleWidth
	p := layout.PartialTileSize(0, n, size)
	data, err := t.read(ctx, layout.EntriesPath(n, p), layout.EntriesPath(n, 0), maxBundle)
	if err != nil {
		return nil, err
	}
	var b api.EntryBundle
	if err := b.UnmarshalText(data); err != nil {
		return nil, tampered("leaves from %d on: %v", n*layout.EntryBundleWidth, err)
	}
	want := int(min(size-n*layout.EntryBundleWidth, layout.EntryBundleWidth))
	if len(b.Entries) < want {
		return nil, tampered("leaves from %d on: %d of %d", n*layout.EntryBundleWidth, len(b.Entries), want)
	}
	return b.Entries[:want], nil
}

// each calls f with all leaves from the first one of a bundle up to size.
func (t tiles) each(ctx context.Context, from, size uint64, f func(index uint64, data []byte, leaf Leaf) error) error {
	for i := from; i < size; {
		list, err := t.bundle(ctx, i, size)
		if err != nil {
			return err
		}
		for _, data := range list {
			leaf, err := parseLeaf(data)
			if err != nil {
				return tampered("leaf %d: %v", i, err)
			}
			if err := f(i, data, leaf); err != nil {
				return err
			}
			i++
		}
	}
	return nil
}
