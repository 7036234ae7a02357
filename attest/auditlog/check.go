package auditlog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/transparency-dev/formats/log"
	"github.com/transparency-dev/merkle/compact"
	"github.com/transparency-dev/merkle/rfc6962"
	"golang.org/x/mod/sumdb/note"
)

// Tampered says that a copy of a log is not what its key has signed.
type Tampered struct{ Why string }

func (e *Tampered) Error() string { return e.Why }

func tampered(format string, args ...any) error { return &Tampered{fmt.Sprintf(format, args...)} }

// State is what Check found the log to be.
type State struct {
	Origin string `json:"origin"` // name of the log
	Size   uint64 `json:"size"`   // leaves
	Root   []byte `json:"root"`   // hash of the tree
	Text   string `json:"checkpoint"`
}

// Check reads a whole log or copy of one. A nil error proves that:
//
//   - its checkpoint is signed by key;
//   - its leaves are exactly those that the checkpoint is of: the root hash is
//     computed from them, and no tile is believed;
//   - it has grown out of the log of the earlier checkpoint, if one is given:
//     nothing of that was changed or removed.
//
// Leaves are shown to each in their order; what it returns ends the check.
// What is not as it was signed is *Tampered; any other error means that it
// could not be found out.
func Check(ctx context.Context, from Source, key note.Verifier, earlier []byte, each func(index uint64, leaf Leaf) error) (*State, error) {
	t := tiles{from}
	data, err := from.Read(ctx, "checkpoint", maxCheckpoint)
	if err != nil {
		return nil, err
	}
	c, err := ParseCheckpoint(data, key)
	if err != nil {
		return nil, tampered("%v", err)
	}
	var old *log.Checkpoint
	if earlier != nil {
		if old, err = ParseCheckpoint(earlier, key); err != nil {
			return nil, tampered("the earlier checkpoint: %v", err)
		}
		if old.Size > c.Size {
			return nil, tampered("the log has %d leaves and had %d before: some were removed", c.Size, old.Size)
		}
	}
	factory := compact.RangeFactory{Hash: rfc6962.DefaultHasher.HashChildren}
	tree := factory.NewEmptyRange(0)
	compare := func(c *log.Checkpoint, what string) error {
		root := rfc6962.DefaultHasher.EmptyRoot()
		if tree.End() > 0 {
			if root, err = tree.GetRootHash(nil); err != nil {
				return err
			}
		}
		if !bytes.Equal(root, c.Hash) {
			return tampered("the first %d leaves are not those of the %s checkpoint: root hash %x, signed was %x", c.Size, what, root, c.Hash)
		}
		return nil
	}
	if old != nil && old.Size == 0 {
		if err := compare(old, "earlier"); err != nil {
			return nil, err
		}
	}
	err = t.each(ctx, 0, c.Size, func(i uint64, data []byte, leaf Leaf) error {
		if err := tree.Append(rfc6962.DefaultHasher.HashLeaf(data), nil); err != nil {
			return err
		}
		if old != nil && i+1 == old.Size {
			if err := compare(old, "earlier"); err != nil {
				return err
			}
		}
		return each(i, leaf)
	})
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, tampered("the log is not whole: %v", err)
	case err != nil:
		return nil, err
	}
	if err := compare(c, "newest"); err != nil {
		return nil, err
	}
	return &State{c.Origin, c.Size, c.Hash, string(data)}, nil
}
