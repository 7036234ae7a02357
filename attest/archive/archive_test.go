package archive

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

func anyRoom() error { return nil }

func open(t *testing.T, dir string, keep Retention, now func() time.Time) *Archive {
	t.Helper()
	a, err := Open(dir, keep, now, anyRoom)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func id(n int) (id ID) {
	binary.BigEndian.PutUint64(id[:], uint64(n)*0x9e3779b97f4a7c15) // in no order
	return id
}

func bytesOf(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

// made is an entry of 45 KB, nearly all of it in common with the others.
func made(n int, log []byte, at time.Time) Entry {
	head, tail := fmt.Appendf(nil, "head %d ", n), fmt.Appendf(nil, " tail %d", n)
	return Entry{ID: id(n), Time: at, Data: bytes.Join([][]byte{head, log, tail}, nil), Common: []Part{NewPart(log), NewPart([]byte("head"))}}
}

func check(t *testing.T, a *Archive, e Entry) {
	t.Helper()
	if data, err := a.Get(e.ID); err != nil || !bytes.Equal(data, e.Data) {
		t.Errorf("entry %x: %d bytes of %d, %v", e.ID, len(data), len(e.Data), err)
	}
}

func TestAppendAndGet(t *testing.T) {
	dir := t.TempDir()
	a := open(t, dir, Retention{}, time.Now)
	if _, err := Open(dir, Retention{}, time.Now, anyRoom); err == nil {
		t.Error("opened twice")
	}
	log := bytesOf(45000)
	var all []Entry
	for i := range 200 {
		all = append(all, made(i, log, time.Now()))
	}
	var wg sync.WaitGroup
	for _, e := range all {
		wg.Go(func() {
			if err := a.Append(t.Context(), e); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := a.Size(); n > 2*45000 {
		t.Errorf("200 entries with one log take %d bytes", n)
	}
	for range 2 {
		for _, e := range all {
			check(t, a, e)
		}
		if _, err := a.Get(id(999)); !errors.Is(err, ErrNotFound) {
			t.Error(err)
		}
		if err := a.Close(); err != nil {
			t.Fatal(err)
		}
		a = open(t, dir, Retention{}, time.Now)
	}
	if err := a.Append(t.Context(), Entry{Data: make([]byte, maxRecord)}); err == nil {
		t.Error("a huge entry was appended")
	}
	a.Close()
	if err := a.Append(t.Context(), all[0]); err == nil {
		t.Error("appended to a closed archive")
	}
}

// TestRetention fills segments until the oldest go: the rest stays whole, for
// old parts are written anew.
func TestRetention(t *testing.T) {
	dir := t.TempDir()
	now := time.Unix(1_700_000_000, 0)
	a := open(t, dir, Retention{Age: 36 * time.Hour}, func() time.Time { return now })
	log := bytesOf(5000)
	add := func(n int) Entry {
		e := made(n, log, now)
		if err := a.Append(t.Context(), e); err != nil {
			t.Fatal(err)
		}
		return e
	}
	first := add(1)
	now = now.Add(segmentTime)
	second := add(2) // ends the first segment
	now = now.Add(segmentTime)
	third := add(3)
	check(t, a, first)
	now = now.Add(segmentTime)
	fourth := add(4)
	if _, err := a.Get(first.ID); !errors.Is(err, ErrNotFound) {
		t.Errorf("an entry that is too old: %v", err)
	}
	if _, err := a.Get(second.ID); !errors.Is(err, ErrNotFound) {
		t.Errorf("another one: %v", err)
	}
	for range 2 {
		check(t, a, third)
		check(t, a, fourth)
		a.Close()
		a = open(t, dir, Retention{Age: 36 * time.Hour}, func() time.Time { return now })
	}
	a.Close()
	if names, err := filepath.Glob(dir + "/entries-*.log"); err != nil || len(names) != 2 {
		t.Errorf("segments %v %v", names, err)
	}
	if names, err := filepath.Glob(dir + "/parts-*.log"); err != nil || len(names) > 3 {
		t.Errorf("segments of parts %v %v", names, err)
	}

	// By size.
	dir = t.TempDir()
	a = open(t, dir, Retention{Bytes: segmentSize / 2}, func() time.Time { return now })
	defer a.Close()
	for i := range 40 {
		big := bytesOf(3 << 20)
		if err := a.Append(t.Context(), Entry{ID: id(i), Time: now, Data: big}); err != nil {
			t.Fatal(err)
		}
	}
	if n := a.Size(); n > segmentSize+segmentSize/2 {
		t.Errorf("archive of %d bytes", n)
	}
	if _, err := a.Get(id(39)); err != nil {
		t.Error(err)
	}
}

// TestTornWrite cuts the newest segment at every place within its last write,
// and puts rubbish there: what was answered before stays, and more can be
// appended.
func TestTornWrite(t *testing.T) {
	dir := t.TempDir()
	a := open(t, dir, Retention{}, time.Now)
	log := bytesOf(600)
	one, two := made(1, log, time.Now()), made(2, log, time.Now())
	if err := a.Append(t.Context(), one); err != nil {
		t.Fatal(err)
	}
	whole := a.entries.active.size
	if err := a.Append(t.Context(), two); err != nil {
		t.Fatal(err)
	}
	a.Close()
	path := filepath.Join(dir, segmentName("entries", 0)+logSuffix)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for n := whole; n < int64(len(good)); n++ {
		torn := append(bytes.Clone(good[:n]), make([]byte, int64(len(good))-n)...)
		if n%2 == 0 {
			torn = torn[:n]
		}
		if err := os.WriteFile(path, torn, 0o600); err != nil {
			t.Fatal(err)
		}
		a := open(t, dir, Retention{}, time.Now)
		check(t, a, one)
		if err := a.Append(t.Context(), two); err != nil {
			t.Fatal(err)
		}
		check(t, a, two)
		a.Close()
	}
}

func TestIndex(t *testing.T) {
	part := append(bytes.Repeat([]byte("ab"), 300), 'c')
	for _, before := range []string{"", "x", "ab", "abab", "xaba"} {
		data := append([]byte(before), part...)
		if got, want := index(data, part), bytes.Index(data, part); got != want {
			t.Errorf("%q: %d, want %d", before, got, want)
		}
		if got := index(data[:len(data)-1], part); got != -1 {
			t.Errorf("%q: %d in what is too short", before, got)
		}
	}
}

// TestNoRoom: with a full disk nothing is appended, the error says why, and it
// goes on when there is room again.
func TestNoRoom(t *testing.T) {
	full := errors.New("disk is full")
	var room error
	a, err := Open(t.TempDir(), Retention{}, time.Now, func() error { return room })
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	room = full
	e := made(1, bytesOf(600), time.Now())
	if err := a.Append(t.Context(), e); !errors.Is(err, full) {
		t.Error(err)
	}
	if _, err := a.Get(e.ID); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	room = nil
	if err := a.Append(t.Context(), e); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	a.Append(ctx, e) // may be in time or not
	check(t, a, e)
}

func FuzzSegment(f *testing.F) {
	dir := f.TempDir()
	a, err := Open(dir, Retention{}, time.Now, anyRoom)
	if err != nil {
		f.Fatal(err)
	}
	if err := a.Append(f.Context(), made(1, bytesOf(600), time.Unix(1, 0))); err != nil {
		f.Fatal(err)
	}
	a.Close()
	good, err := os.ReadFile(filepath.Join(dir, segmentName("entries", 0)+logSuffix))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good, []byte{})
	f.Add(good, make([]byte, indexHead+idSize+offsetSize))
	f.Fuzz(func(t *testing.T, log, index []byte) {
		dir := t.TempDir()
		os.WriteFile(filepath.Join(dir, segmentName("entries", 0)+logSuffix), log, 0o600)
		if len(index) > 0 {
			os.WriteFile(filepath.Join(dir, segmentName("entries", 0)+indexSuffix), index, 0o600)
		}
		a, err := Open(dir, Retention{}, time.Now, anyRoom)
		if err != nil {
			return
		}
		defer a.Close()
		a.Get(id(1))
		a.Get(ID{})
	})
}
