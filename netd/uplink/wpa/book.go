//go:build linux

package wpa

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
)

// Store keeps the saved networks, whose passphrases are in the clear in them:
// it is for the store to keep them from others.
type Store interface {
	Load() ([]byte, error) // nil if nothing was saved yet
	Save([]byte) error
}

// File is a Store in a file for its owner alone.
type File string

// Load implements Store.
func (f File) Load() ([]byte, error) {
	st, err := os.Stat(string(f))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("saved networks: %w", err)
	}
	if st.Size() > MaxEncoded || st.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("saved networks: %s has %d bytes and mode %v, want at most %d, for its owner alone", f, st.Size(), st.Mode().Perm(), MaxEncoded)
	}
	b, err := os.ReadFile(string(f))
	if err != nil {
		return nil, fmt.Errorf("saved networks: %w", err)
	}
	return b, nil
}

// Save implements Store. The file is replaced as a whole.
func (f File) Save(b []byte) error {
	next, err := os.CreateTemp(filepath.Dir(string(f)), ".networks-") // mode 0600
	if err != nil {
		return fmt.Errorf("saved networks: %w", err)
	}
	_, err = next.Write(b)
	err = errors.Join(err, next.Sync(), next.Close())
	if err == nil {
		err = os.Rename(next.Name(), string(f))
	}
	if err != nil {
		os.Remove(next.Name())
		return fmt.Errorf("saved networks: %w", err)
	}
	return nil
}

// Book is the list of saved networks, with those of the organisation before
// them. Make one with OpenBook.
type Book struct {
	store      Store
	supplicant *Supplicant
	fixed      []Network // the organisation's; they cannot be forgotten

	mu   sync.Mutex
	list []Network
}

// OpenBook reads the saved networks and hands them to supplicant. After an error
// the book is empty and usable.
func OpenBook(store Store, supplicant *Supplicant, fixed []Network) (*Book, error) {
	b := &Book{store: store, supplicant: supplicant, fixed: fixed}
	data, err := store.Load()
	if err == nil && data != nil {
		b.list, err = Decode(data)
	}
	b.tell()
	return b, err
}

func (b *Book) tell() { b.supplicant.SetNetworks(slices.Concat(b.fixed, b.list)) }

// change replaces the list when it could be saved.
func (b *Book) change(list []Network) error {
	data, err := Encode(list)
	if err == nil {
		err = b.store.Save(data)
	}
	if err != nil {
		return err
	}
	b.list = list
	b.tell()
	return nil
}

// Join saves n, before all others, in place of one of the same name.
func (b *Book) Join(n Network) error {
	if err := n.Validate(); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	list := slices.DeleteFunc(slices.Clone(b.list), func(o Network) bool { return bytes.Equal(o.SSID, n.SSID) })
	slices.SortStableFunc(list, func(a, b Network) int { return cmp.Compare(a.Priority, b.Priority) })
	list = append(list, n)
	for i := range list {
		list[i].Priority = i + 1 // maxSaved is below the highest priority
	}
	return b.change(list)
}

// ErrUnknown is returned by Forget for a network that is not saved.
var ErrUnknown = errors.New("no saved network of this name")

// Forget removes a network.
func (b *Book) Forget(ssid SSID) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	list := slices.DeleteFunc(slices.Clone(b.list), func(o Network) bool { return bytes.Equal(o.SSID, ssid) })
	if len(list) == len(b.list) {
		return fmt.Errorf("%w: %s", ErrUnknown, ssid)
	}
	return b.change(list)
}

// Entry is a network that is saved, in reach, or both.
type Entry struct {
	SSID     SSID     `json:"ssid"` // base64
	Name     string   `json:"name"` // the SSID as text
	Security Security `json:"security"`
	Signal   int      `json:"signal,omitempty"` // dBm; 0: not in reach
	Saved    bool     `json:"saved"`
	Fixed    bool     `json:"fixed,omitempty"` // the organisation's
	Hidden   bool     `json:"hidden,omitempty"`
}

// List returns all networks: those in reach by signal, then the others.
func (b *Book) List(ctx context.Context) ([]Entry, error) {
	seen, err := b.supplicant.Scan(ctx)
	b.mu.Lock()
	known := slices.Concat(b.fixed, b.list)
	fixed := len(b.fixed)
	b.mu.Unlock()
	list := []Entry{}
	find := func(ssid []byte, s Security) int {
		return slices.IndexFunc(list, func(e Entry) bool { return bytes.Equal(e.SSID, ssid) && e.Security == s })
	}
	for i, n := range known {
		list = append(list, Entry{SSID: n.SSID, Name: n.SSID.String(), Security: n.Security, Saved: true, Fixed: i < fixed, Hidden: n.Hidden})
	}
	for _, s := range seen {
		i := find(s.SSID, s.Security)
		if i < 0 {
			i = len(list)
			list = append(list, Entry{SSID: s.SSID, Name: SSID(s.SSID).String(), Security: s.Security})
		}
		if list[i].Signal == 0 || s.Signal > list[i].Signal {
			list[i].Signal = s.Signal
		}
	}
	slices.SortStableFunc(list, func(a, b Entry) int {
		if (a.Signal == 0) != (b.Signal == 0) {
			return cmp.Compare(a.Signal, b.Signal) // 0 is above every dBm, and not in reach
		}
		return cmp.Compare(b.Signal, a.Signal)
	})
	return list, err
}
