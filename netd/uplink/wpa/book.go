//go:build linux

package wpa

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
)

// Store keeps the saved networks, whose passphrases are in the clear in them:
// it is for the store to keep them from others. access.Keeper is one.
type Store interface {
	Load() ([]byte, error) // nil if nothing was saved yet
	Save([]byte) error
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
	return b.change(last(list, n))
}

// Prefer puts a saved network before all others.
func (b *Book) Prefer(ssid SSID) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	i := slices.IndexFunc(b.list, func(o Network) bool { return bytes.Equal(o.SSID, ssid) })
	if i < 0 {
		return fmt.Errorf("%w: %s", ErrUnknown, ssid)
	}
	n := b.list[i]
	return b.change(last(slices.Delete(slices.Clone(b.list), i, i+1), n))
}

// Adopt takes over networks that were saved in an earlier boot, behind those
// that were joined in this one.
func (b *Book) Adopt(older []Network) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	list := Union(older, b.list)
	if slices.EqualFunc(list, older, Network.equal) { // saved already
		b.list = list
		b.tell()
		return nil
	}
	return b.change(list)
}

// Union are the networks of both, those of newer preferred, and in place of
// older ones of the same name. The least preferred go where there are too many.
func Union(older, newer []Network) []Network {
	older = slices.DeleteFunc(ranked(older), func(n Network) bool {
		return slices.ContainsFunc(newer, func(o Network) bool { return bytes.Equal(n.SSID, o.SSID) })
	})
	return last(older, ranked(newer)...)
}

// ranked is list by priority, the preferred last.
func ranked(list []Network) []Network {
	list = slices.Clone(list)
	slices.SortStableFunc(list, func(a, b Network) int { return cmp.Compare(a.Priority, b.Priority) })
	return list
}

// last is list with more behind it, which are preferred, numbered anew.
func last(list []Network, more ...Network) []Network {
	list = append(ranked(list), more...)
	if n := len(list) - maxSaved; n > 0 {
		list = list[n:]
	}
	for i := range list {
		list[i].Priority = i + 1 // maxSaved is below the highest priority
	}
	return list
}

// ErrUnknown is returned by Forget and Prefer for a network that is not saved.
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
	Rank     int      `json:"rank,omitempty"`  // of a saved one: 1 is joined first
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
		rank := 1
		for _, o := range known {
			if o.Priority > n.Priority {
				rank++
			}
		}
		list = append(list, Entry{SSID: n.SSID, Name: n.SSID.String(), Security: n.Security, Saved: true, Rank: rank, Fixed: i < fixed, Hidden: n.Hidden})
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
		return cmp.Or(cmp.Compare(b.Signal, a.Signal), cmp.Compare(a.Rank, b.Rank))
	})
	return list, err
}
