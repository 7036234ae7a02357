package auditlog

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"sort"
	"strconv"
	"strings"

	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"
	"github.com/transparency-dev/tessera/api/layout"
	"github.com/transparency-dev/tessera/client"
	"golang.org/x/mod/sumdb/note"

	"sekisho/attest/archive"
)

// ErrNotInLog says that the log, or this checkpoint of it, has no such report.
var ErrNotInLog = errors.New("report is not in the log; one of the last seconds soon is")

// proofHeader begins a proof (C2SP tlog-proof).
const proofHeader = "c2sp.org/tlog-proof@v1"

// maxProof bounds a proof in bytes; a tree of 2^63 leaves has 63 hashes.
const (
	maxProof  = maxCheckpoint + 8<<10
	maxHashes = 64
)

// Proof shows that a leaf is in the log that a checkpoint is of.
type Proof struct {
	Index      uint64   `json:"index"`
	Leaf       []byte   `json:"leaf"`
	Hashes     [][]byte `json:"hashes"` // RFC 6962, section 2.1.1
	Checkpoint string   `json:"checkpoint"`
}

// MarshalText writes the proof as a C2SP tlog-proof, with the leaf as its extra
// data.
func (p Proof) MarshalText() ([]byte, error) {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s\nextra %s\nindex %d\n", proofHeader, base64.StdEncoding.EncodeToString(p.Leaf), p.Index)
	for _, h := range p.Hashes {
		fmt.Fprintln(&b, base64.StdEncoding.EncodeToString(h))
	}
	fmt.Fprintf(&b, "\n%s", p.Checkpoint)
	return b.Bytes(), nil
}

// IsProof reports whether data begins like a proof.
func IsProof(data []byte) bool { return bytes.HasPrefix(data, []byte(proofHeader+"\n")) }

// ParseProof reads what MarshalText wrote.
func ParseProof(data []byte) (p Proof, err error) {
	if len(data) > maxProof {
		return p, fmt.Errorf("proof of %d bytes, at most %d", len(data), maxProof)
	}
	head, checkpoint, ok := strings.Cut(string(data), "\n\n")
	lines := strings.Split(head, "\n")
	if !ok || len(lines) < 3 || len(lines) > 3+maxHashes || lines[0] != proofHeader {
		return p, fmt.Errorf("proof: not a %s", proofHeader)
	}
	extra, ok1 := strings.CutPrefix(lines[1], "extra ")
	index, ok2 := strings.CutPrefix(lines[2], "index ")
	if !ok1 || !ok2 {
		return p, errors.New("proof: without its leaf or index")
	}
	if p.Leaf, err = base64.StdEncoding.DecodeString(extra); err != nil {
		return p, fmt.Errorf("proof: leaf: %w", err)
	}
	if p.Index, err = strconv.ParseUint(index, 10, 63); err != nil {
		return p, fmt.Errorf("proof: index: %w", err)
	}
	for _, line := range lines[3:] {
		h, err := base64.StdEncoding.DecodeString(line)
		if err != nil || len(h) != rfc6962.DefaultHasher.Size() {
			return p, fmt.Errorf("proof: hash %.64q", line)
		}
		p.Hashes = append(p.Hashes, h)
	}
	p.Checkpoint = checkpoint
	return p, nil
}

// Verify returns the leaf if it is in the log of key.
func (p Proof) Verify(key note.Verifier) (Leaf, error) {
	c, err := ParseCheckpoint([]byte(p.Checkpoint), key)
	if err != nil {
		return Leaf{}, err
	}
	leaf, err := parseLeaf(p.Leaf)
	if err != nil {
		return Leaf{}, err
	}
	if err := proof.VerifyInclusion(rfc6962.DefaultHasher, p.Index, c.Size, rfc6962.DefaultHasher.HashLeaf(p.Leaf), p.Hashes, c.Hash); err != nil {
		return Leaf{}, fmt.Errorf("proof: %w", err)
	}
	return leaf, nil
}

// Proof returns the proof for a report that is in the archive.
func (l *Log) Proof(ctx context.Context, report archive.ID) (p Proof, err error) {
	at, err := l.archive.Find(report)
	if err != nil {
		return p, fmt.Errorf("audit log: %w", err)
	}
	c, text, err := l.tiles.checkpoint(ctx, l.key)
	if err != nil {
		return p, fmt.Errorf("audit log: %w", err)
	}
	index, found, err := l.tiles.search(ctx, c.Size, place{report, at})
	if err != nil {
		return p, fmt.Errorf("audit log: %w", err)
	}
	if !found { // out of order, after a write that failed
		if index, found, err = l.tiles.find(ctx, c.Size, report); err != nil {
			return p, fmt.Errorf("audit log: %w", err)
		}
	}
	if !found {
		return p, ErrNotInLog
	}
	return l.tiles.prove(ctx, index, c.Size, string(text), l.key)
}

// ProofIn returns the proof for a report from a copy of a log.
func ProofIn(ctx context.Context, from Source, key note.Verifier, report archive.ID) (p Proof, err error) {
	t := tiles{from}
	c, text, err := t.checkpoint(ctx, key)
	if err != nil {
		return p, err
	}
	index, found, err := t.find(ctx, c.Size, report)
	if err != nil {
		return p, err
	}
	if !found {
		return p, ErrNotInLog
	}
	return t.prove(ctx, index, c.Size, string(text), key)
}

// prove makes a proof, and tries it.
func (t tiles) prove(ctx context.Context, index, size uint64, checkpoint string, key note.Verifier) (p Proof, err error) {
	list, err := t.bundle(ctx, index, size)
	if err != nil {
		return p, err
	}
	builder, err := client.NewProofBuilder(ctx, size, t.tile)
	if err != nil {
		return p, err
	}
	hashes, err := builder.InclusionProof(ctx, index)
	if err != nil {
		return p, err
	}
	p = Proof{index, list[index%layout.EntryBundleWidth], hashes, checkpoint}
	_, err = p.Verify(key)
	return p, err
}

// search finds the leaf of a report by its place: leaves stand in the order of
// the archive.
func (t tiles) search(ctx context.Context, size uint64, want place) (index uint64, found bool, err error) {
	var failed error
	leaf := func(i uint64) (l Leaf) {
		list, err := t.bundle(ctx, i, size)
		if err == nil {
			l, err = parseLeaf(list[i%layout.EntryBundleWidth])
		}
		if err != nil {
			failed = err
		}
		return l
	}
	i := uint64(sort.Search(int(size), func(i int) bool { return !leaf(uint64(i)).At.Before(want.at) }))
	if failed != nil || i == size {
		return 0, false, failed
	}
	return i, leaf(i).Report == want.id, failed
}

// errFound ends a search.
var errFound = errors.New("found")

// find finds the leaf of a report by looking at all of them.
func (t tiles) find(ctx context.Context, size uint64, report archive.ID) (index uint64, found bool, err error) {
	err = t.each(ctx, 0, size, func(i uint64, _ []byte, leaf Leaf) error {
		if leaf.Report == report {
			index, found = i, true
			return errFound
		}
		return nil
	})
	if err == errFound {
		err = nil
	}
	return index, found, err
}
