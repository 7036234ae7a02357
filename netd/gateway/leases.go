package gateway

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"sync"

	"sekisho/attest"
)

// maxLeases bounds the lease file in bytes: room for some 150,000 devices.
const maxLeases = 16 << 20

// ErrPoolExhausted is returned when no inner address is left.
var ErrPoolExhausted = errors.New("pool of inner addresses is exhausted")

// Leases gives each device its inner address, for good: the work domain's
// address does not change with uplinks, restarts or time.
type Leases struct {
	file string
	pool netip.Prefix

	mu     sync.Mutex
	device map[attest.Digest]netip.Addr
	used   map[netip.Addr]bool
	next   netip.Addr
}

type leaseFile struct {
	Leases map[string]netip.Addr `json:"leases"` // by device id in hexadecimal
}

// OpenLeases reads the file, which need not exist yet. Addresses outside pool
// and addresses given twice are errors: somebody must decide.
func OpenLeases(file string, pool netip.Prefix) (*Leases, error) {
	l := &Leases{file: file, pool: pool, device: map[attest.Digest]netip.Addr{}, used: map[netip.Addr]bool{}}
	l.next = pool.Addr().Next().Next() // the first is the gateway's own
	f, err := os.Open(file)
	if errors.Is(err, fs.ErrNotExist) {
		return l, nil
	}
	if err != nil {
		return nil, fmt.Errorf("leases: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxLeases+1))
	if err != nil {
		return nil, fmt.Errorf("leases: %w", err)
	}
	return l, l.parse(data)
}

func (l *Leases) parse(data []byte) error {
	if len(data) > maxLeases {
		return fmt.Errorf("leases: over %d bytes", maxLeases)
	}
	var doc leaseFile
	if err := json.Unmarshal(data, &doc); err != nil {
		return fmt.Errorf("leases %s: %w", l.file, err)
	}
	for id, a := range doc.Leases {
		var d attest.Digest
		if err := d.UnmarshalText([]byte(id)); err != nil {
			return fmt.Errorf("leases %s: device id: %w", l.file, err)
		}
		if !l.free(a) {
			return fmt.Errorf("leases %s: %s of device %s is outside the pool %s, reserved or given twice", l.file, a, id, l.pool)
		}
		l.device[d], l.used[a] = a, true
	}
	return nil
}

// free reports whether a may be given to a device: not the network's, the
// gateway's or the broadcast address.
func (l *Leases) free(a netip.Addr) bool {
	return l.pool.Contains(a) && a != l.pool.Addr() && a != l.pool.Addr().Next() && l.pool.Contains(a.Next()) && !l.used[a]
}

// Get returns the device's inner address, and gives it one if it has none: it
// is on the disk before Get returns.
func (l *Leases) Get(d attest.Digest) (netip.Addr, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if a, ok := l.device[d]; ok {
		return a, nil
	}
	for l.pool.Contains(l.next) && !l.free(l.next) {
		l.next = l.next.Next()
	}
	if !l.free(l.next) {
		return netip.Addr{}, fmt.Errorf("%w: %s holds %d devices", ErrPoolExhausted, l.pool, len(l.device))
	}
	a := l.next
	l.device[d], l.used[a] = a, true
	if err := l.save(); err != nil {
		delete(l.device, d)
		delete(l.used, a)
		return netip.Addr{}, err
	}
	return a, nil
}

// Len returns how many devices have an address.
func (l *Leases) Len() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.device)
}

// save replaces the file as a whole or leaves it as it was.
func (l *Leases) save() error {
	doc := leaseFile{Leases: make(map[string]netip.Addr, len(l.device))}
	for d, a := range l.device {
		doc.Leases[d.String()] = a
	}
	data, err := json.MarshalIndent(doc, "", " ")
	if err != nil {
		return fmt.Errorf("leases: %w", err)
	}
	if len(data) > maxLeases { // a gateway could not start with it again
		return fmt.Errorf("leases: %d devices, no room for more in %d bytes", len(l.device)-1, maxLeases)
	}
	f, err := os.CreateTemp(filepath.Dir(l.file), ".leases-*")
	if err != nil {
		return fmt.Errorf("leases: %w", err)
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), l.file)
	}
	if err != nil {
		os.Remove(f.Name())
		return fmt.Errorf("leases: %w", err)
	}
	dir, err := os.Open(filepath.Dir(l.file))
	if err != nil {
		return fmt.Errorf("leases: %w", err)
	}
	defer dir.Close()
	return dir.Sync()
}
