package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
	"time"

	"sekisho/attest"
)

const (
	// maxRevoked bounds the file of revoked devices in bytes.
	maxRevoked = 16 << 20
	// revokedEvery is how often it is looked at.
	revokedEvery = time.Second
)

// RevokedFile is a Revocations that follows a file, {"devices": [ID, ...]} with
// device ids in hexadecimal. Its absence is an error: a gateway that
// does not know who is revoked admits nobody.
type RevokedFile struct {
	path string

	mu      sync.Mutex
	err     error
	devices map[attest.Digest]struct{}
	seen    fs.FileInfo
	changed chan struct{}
}

// NewRevokedFile returns a RevokedFile that has read its file once. Run follows it.
func NewRevokedFile(path string) *RevokedFile {
	r := &RevokedFile{path: path, changed: make(chan struct{})}
	r.look()
	return r
}

// Run follows the file until ctx is done.
func (r *RevokedFile) Run(ctx context.Context) {
	tick := time.NewTicker(revokedEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			r.look()
		}
	}
}

// look reads the file if it has changed. After an error the devices read last
// stay revoked.
func (r *RevokedFile) look() {
	info, err := os.Stat(r.path)
	r.mu.Lock()
	same := err == nil && r.err == nil && r.seen != nil && os.SameFile(info, r.seen) && info.ModTime().Equal(r.seen.ModTime()) && info.Size() == r.seen.Size()
	r.mu.Unlock()
	if same {
		return
	}
	var devices map[attest.Digest]struct{}
	if err == nil {
		devices, err = readRevoked(r.path)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.err, r.seen = err, info
	if err == nil {
		r.devices = devices
		close(r.changed)
		r.changed = make(chan struct{})
	}
}

func readRevoked(path string) (map[attest.Digest]struct{}, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxRevoked+1))
	if err != nil {
		return nil, err
	}
	return parseRevoked(data)
}

func parseRevoked(data []byte) (map[attest.Digest]struct{}, error) {
	if len(data) > maxRevoked {
		return nil, fmt.Errorf("revoked devices: over %d bytes", maxRevoked)
	}
	var doc struct {
		Devices []attest.Digest `json:"devices"`
	}
	if err := json.Unmarshal(data, &doc); err != nil {
		return nil, fmt.Errorf("revoked devices: %w", err)
	}
	if doc.Devices == nil {
		return nil, errors.New(`revoked devices: want {"devices": [...]}, with an empty list for none`)
	}
	set := make(map[attest.Digest]struct{}, len(doc.Devices))
	for _, d := range doc.Devices {
		set[d] = struct{}{}
	}
	return set, nil
}

// Heard implements Revocations.
func (r *RevokedFile) Heard() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.err
}

// Revoked implements Revocations.
func (r *RevokedFile) Revoked(d attest.Digest) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, ok := r.devices[d]
	return ok
}

// Changed implements Revocations.
func (r *RevokedFile) Changed() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.changed
}
