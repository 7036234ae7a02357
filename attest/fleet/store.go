// Package fleet is the verifier's server side: the registry of devices,
// tickets and reference values, enrolment, and the HTTP API. It holds state;
// judging is done by attest/verifier.
package fleet

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"sekisho/attest"
	"sekisho/attest/tpm"
)

// maxRegistry bounds the registry file in bytes.
const maxRegistry = 256 << 20

// Device is one enrolled device. Identity never changes after enrolment; a
// permit puts another record in its place (Former keeps this one).
type Device struct {
	ID            attest.Digest `json:"device_id"`
	EK            []byte        `json:"ek"` // TPMT_PUBLIC
	EKCertificate []byte        `json:"ek_certificate"`
	AK            []byte        `json:"ak"` // TPMT_PUBLIC
	TicketID      string        `json:"ticket_id"`
	Enrolled      time.Time     `json:"enrolled"`

	// Of the last affirming evidence.
	Clock    *tpm.Clock `json:"clock,omitempty"`
	Firmware uint64     `json:"tpm_firmware,omitempty"`
	Affirmed time.Time  `json:"affirmed,omitzero"`
	Image    string     `json:"image,omitempty"`
}

// Ticket lets devices enrol. The text that devices present is not stored.
type Ticket struct {
	ID      string        `json:"id"`     // first digits of Digest
	Digest  attest.Digest `json:"digest"` // SHA-256 of the text
	Uses    int           `json:"uses"`   // left
	Expires time.Time     `json:"expires"`
}

// Registry is all state of a fleet.
type Registry struct {
	Devices    map[attest.Digest]Device          `json:"devices"`
	Tickets    map[string]Ticket                 `json:"tickets"`    // by ID
	References map[string]attest.ReferenceValues `json:"references"` // by ReferenceID
	Identities
}

// ReferenceID names reference values in the registry.
func ReferenceID(r attest.ReferenceValues) string { return r.Image + " " + r.Version }

// Store keeps a Registry. Both functions see one consistent registry; an error
// from f is returned as it is, and then nothing is stored.
type Store interface {
	View(f func(*Registry) error) error
	Update(f func(*Registry) error) error
}

// FileStore keeps the registry in one file of a directory, with one process
// writing. Every update is on disk before it is visible: a new file is
// written, synced, and renamed over the old one.
type FileStore struct {
	dir  *os.Root
	lock *os.File
	max  int // bytes that the file may have

	mu   sync.RWMutex
	data []byte    // as on disk
	reg  *Registry // decoded data, read-only
}

const (
	registryFile = "registry.json"
	newFile      = "registry.json.new"
	lockFile     = "lock"
)

// OpenFileStore opens or creates the store in directory dir. It fails while
// another process has it open.
func OpenFileStore(dir string) (*FileStore, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	s := &FileStore{dir: root, max: maxRegistry}
	if err := s.open(); err != nil {
		return nil, errors.Join(fmt.Errorf("store %s: %w", dir, err), s.Close())
	}
	return s, nil
}

func (s *FileStore) open() (err error) {
	if s.lock, err = s.dir.OpenFile(lockFile, os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return err
	}
	if err := unix.Flock(int(s.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("in use by another process: %w", err)
	}
	f, err := s.dir.Open(registryFile)
	switch {
	case errors.Is(err, os.ErrNotExist):
		s.data = []byte("{}")
	case err != nil:
		return err
	default:
		s.data, err = io.ReadAll(io.LimitReader(f, maxRegistry+1))
		f.Close()
		if err != nil {
			return err
		}
	}
	s.reg, err = decode(s.data)
	return err
}

func decode(data []byte) (*Registry, error) {
	if len(data) > maxRegistry {
		return nil, fmt.Errorf("registry of over %d bytes", maxRegistry)
	}
	r := &Registry{}
	if err := json.Unmarshal(data, r); err != nil {
		return nil, fmt.Errorf("registry: %w", err)
	}
	if r.Devices == nil {
		r.Devices = make(map[attest.Digest]Device)
	}
	if r.Tickets == nil {
		r.Tickets = make(map[string]Ticket)
	}
	if r.References == nil {
		r.References = make(map[string]attest.ReferenceValues)
	}
	return r, nil
}

// Close releases the store.
func (s *FileStore) Close() error {
	var err error
	if s.lock != nil {
		err = s.lock.Close()
	}
	return errors.Join(err, s.dir.Close())
}

// View calls f with the registry, which f must not change.
func (s *FileStore) View(f func(*Registry) error) error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return f(s.reg)
}

// Update calls f with a copy of the registry and stores what f made of it.
func (s *FileStore) Update(f func(*Registry) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	next, err := decode(s.data)
	if err != nil {
		return err
	}
	if err := f(next); err != nil {
		return err
	}
	data, err := json.MarshalIndent(next, "", " ")
	if err != nil {
		return fmt.Errorf("store: %w", err)
	}
	if bytes.Equal(data, s.data) {
		return nil
	}
	if err := s.write(data); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	s.data, s.reg = data, next
	return nil
}

func (s *FileStore) write(data []byte) error {
	if len(data) > s.max { // a verifier could not start with it again
		return fmt.Errorf("registry of %d bytes, at most %d: nothing is stored; remove reference values that no laptop has any more", len(data), s.max)
	}
	f, err := s.dir.OpenFile(newFile, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := s.dir.Rename(newFile, registryFile); err != nil {
		return err
	}
	// The rename is durable once the directory is.
	d, err := s.dir.Open(".")
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
