package fleet

import (
	"strings"
	"testing"
)

// TestStoreNeverWritesWhatItCannotRead fills a store to its limit: the update
// beyond it fails, and the store goes on with what it has, also after a start.
func TestStoreNeverWritesWhatItCannotRead(t *testing.T) {
	dir := t.TempDir()
	s, err := OpenFileStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	s.max = 1000
	ticket := func(id string) func(*Registry) error {
		return func(r *Registry) error { r.Tickets[id] = Ticket{ID: id}; return nil }
	}
	if err := s.Update(ticket("first")); err != nil {
		t.Fatal(err)
	}
	if err := s.Update(ticket(strings.Repeat("x", 1000))); err == nil || !strings.Contains(err.Error(), "at most 1000") {
		t.Fatalf("an update beyond the limit: %v", err)
	}
	holds := func(s *FileStore) {
		t.Helper()
		s.View(func(r *Registry) error {
			if _, ok := r.Tickets["first"]; !ok || len(r.Tickets) != 1 {
				t.Errorf("tickets %v", r.Tickets)
			}
			return nil
		})
	}
	holds(s)
	if err := s.Update(ticket("second")); err != nil {
		t.Error(err)
	}
	if err := s.Update(func(r *Registry) error { delete(r.Tickets, "second"); return nil }); err != nil {
		t.Error(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if s, err = OpenFileStore(dir); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	holds(s)
}
