package auditlog

import (
	"bytes"
	"errors"
	"fmt"
	"time"

	"github.com/fxamacker/cbor/v2"

	"sekisho/attest"
	"sekisho/attest/archive"
)

// Leaf is what the log says of one report: it names it and fixes its bytes,
// and holds none of them, so that the archive may drop the report.
type Leaf struct {
	Report archive.ID       // its id
	Device attest.Digest    // id of the device that it is about
	Time   time.Time        // of the appraisal, to the millisecond
	Digest attest.Digest    // SHA-256 of the report
	At     archive.Position // in the archive of the verifier that keeps the log
}

// leafForm is how a leaf is encoded: deterministic CBOR (RFC 8949, section
// 4.2.1), one array.
type leafForm struct {
	_       struct{} `cbor:",toarray"`
	Version int      // 1
	Report  []byte
	Device  []byte
	Time    int64 // ms since 1970
	Digest  []byte
	Segment uint64
	Offset  int64
}

const (
	leafVersion = 1
	maxLeaf     = 256 // bytes
)

// leafOf is the leaf of a stored report.
func leafOf(e archive.Stored) Leaf {
	return Leaf{e.ID, e.Device, e.Time, e.Digest, e.At}
}

func (l Leaf) encode() ([]byte, error) {
	mode, err := cbor.CoreDetEncOptions().EncMode()
	if err != nil {
		return nil, err
	}
	return mode.Marshal(leafForm{
		Version: leafVersion, Report: l.Report[:], Device: l.Device[:], Time: l.Time.UnixMilli(), Digest: l.Digest[:],
		Segment: l.At.Segment, Offset: l.At.Offset,
	})
}

// parseLeaf reads a leaf; there is one encoding of each.
func parseLeaf(data []byte) (l Leaf, err error) {
	if len(data) > maxLeaf {
		return l, fmt.Errorf("leaf of %d bytes, at most %d", len(data), maxLeaf)
	}
	var f leafForm
	if err := cbor.Unmarshal(data, &f); err != nil {
		return l, fmt.Errorf("leaf: %w", err)
	}
	if f.Version != leafVersion {
		return l, fmt.Errorf("leaf of version %d, want %d", f.Version, leafVersion)
	}
	if len(f.Report) != len(l.Report) || len(f.Device) != len(l.Device) || len(f.Digest) != len(l.Digest) {
		return l, fmt.Errorf("leaf: id of %d, device of %d, digest of %d bytes", len(f.Report), len(f.Device), len(f.Digest))
	}
	l = Leaf{archive.ID(f.Report), attest.Digest(f.Device), time.UnixMilli(f.Time).UTC(), attest.Digest(f.Digest), archive.Position{Segment: f.Segment, Offset: f.Offset}}
	again, err := l.encode()
	if err != nil {
		return l, err
	}
	if !bytes.Equal(again, data) {
		return l, errors.New("leaf: not in deterministic encoding")
	}
	return l, nil
}
