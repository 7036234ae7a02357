package auditlog

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/attest/archive"
)

const patience = 30 * time.Second // for what takes a second

func id(n int) (x archive.ID) {
	binary.BigEndian.PutUint64(x[:], uint64(n)*0x9e3779b97f4a7c15)
	return x
}

func body(n int) []byte { return fmt.Appendf(nil, "report %d", n) }

// kept is an archive with its log.
type kept struct {
	t   *testing.T
	dir string
	key Key
	*archive.Archive
	log *Log
}

func newKept(t *testing.T) *kept {
	t.Helper()
	text, err := NewKey("verifier.example", "Test City +")
	if err != nil {
		t.Fatal(err)
	}
	k := &kept{t: t, dir: t.TempDir()}
	if k.key, err = ParseKey(text); err != nil {
		t.Fatal(err)
	}
	k.open()
	t.Cleanup(k.close)
	return k
}

func (k *kept) openArchive() {
	k.t.Helper()
	var err error
	if k.Archive, err = archive.Open(filepath.Join(k.dir, "archive"), archive.Retention{}, time.Now, func() error { return nil }); err != nil {
		k.t.Fatal(err)
	}
}

func (k *kept) openLog() {
	k.t.Helper()
	var err error
	if k.log, err = Open(k.t.Context(), k.logDir(), k.key, k.Archive, slog.New(slog.DiscardHandler)); err != nil {
		k.t.Fatal(err)
	}
}

func (k *kept) logDir() string { return filepath.Join(k.dir, "log") }

func (k *kept) open() {
	k.t.Helper()
	k.openArchive()
	k.openLog()
}

func (k *kept) close() {
	k.t.Helper()
	if k.log != nil {
		if err := k.log.Close(); err != nil {
			k.t.Error(err)
		}
		k.log = nil
	}
	if k.Archive != nil {
		k.Archive.Close()
		k.Archive = nil
	}
}

func (k *kept) add(from, to int) {
	k.t.Helper()
	done := make(chan error)
	for n := from; n < to; n++ {
		go func() {
			done <- k.Append(context.Background(), archive.Entry{ID: id(n), Device: sha256.Sum256(body(n)), Time: time.UnixMilli(int64(n)), Data: body(n)})
		}()
	}
	for range to - from {
		if err := <-done; err != nil {
			k.t.Fatal(err)
		}
	}
}

// check demands that the log has each report from 0 to n once.
func (k *kept) check(n int, earlier []byte) *State {
	k.t.Helper()
	seen := make(map[archive.ID]Leaf)
	s, err := Check(k.t.Context(), Dir(k.logDir()), k.key.verifier, earlier, func(_ uint64, l Leaf) error {
		if _, ok := seen[l.Report]; ok {
			k.t.Errorf("report %x is in the log twice", l.Report)
		}
		seen[l.Report] = l
		return nil
	})
	if err != nil {
		k.t.Fatal(err)
	}
	if s.Size != uint64(n) || len(seen) != n {
		k.t.Errorf("%d leaves of %d reports, want %d", s.Size, len(seen), n)
	}
	for i := range n {
		if l := seen[id(i)]; l.Digest != sha256.Sum256(body(i)) || l.Device != sha256.Sum256(body(i)) || l.Time.UnixMilli() != int64(i) {
			k.t.Fatalf("report %d: %+v", i, l)
		}
	}
	return s
}

func TestLogFollowsTheArchive(t *testing.T) {
	k := newKept(t)
	k.add(0, 300)
	var err error
	var p Proof
	for until := time.Now().Add(patience); time.Now().Before(until); {
		if p, err = k.log.Proof(t.Context(), id(299)); !errors.Is(err, ErrNotInLog) {
			break
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	if l, err := p.Verify(k.key.verifier); err != nil || l.Report != id(299) || l.Digest != sha256.Sum256(body(299)) {
		t.Errorf("%+v, %v", l, err)
	}
	k.close()
	first := k.check(300, nil)
	for round, n := range []int{301, 2000, 2001} { // several starts, with and without a full batch to take in
		k.openArchive()
		k.add([]int{300, 301, 2000}[round], n)
		k.openLog()
		k.close()
		first = k.check(n, []byte(first.Text))
	}
}

// TestProofs proves each of some reports, by the archive's order and from a
// copy, and refuses what was changed.
func TestProofs(t *testing.T) {
	k := newKept(t)
	k.add(0, 700)
	k.close()
	k.open()
	server := httptest.NewServer(http.FileServer(http.Dir(k.logDir())))
	defer server.Close()
	mirror, err := NewMirror(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	copied := filepath.Join(t.TempDir(), "copy")
	if n, err := Copy(t.Context(), mirror, k.key.verifier, copied); err != nil || n != 700 {
		t.Fatal(n, err)
	}
	for _, i := range []int{0, 1, 255, 256, 511, 512, 699} {
		p, err := k.log.Proof(t.Context(), id(i))
		if err != nil {
			t.Fatal(err)
		}
		for _, from := range []Source{Dir(copied), mirror} {
			q, err := ProofIn(t.Context(), from, k.key.verifier, id(i))
			if err != nil {
				t.Fatal(err)
			}
			a, _ := p.MarshalText()
			if b, _ := q.MarshalText(); !bytes.Equal(a, b) || !IsProof(a) {
				t.Errorf("report %d: two proofs:\n%s\n%s", i, a, b)
			}
		}
		text, _ := p.MarshalText()
		if p, err = ParseProof(text); err != nil {
			t.Fatal(err)
		}
		if l, err := p.Verify(k.key.verifier); err != nil || l.Report != id(i) {
			t.Fatal(l, err)
		}
		p.Index ^= 1
		if _, err := p.Verify(k.key.verifier); err == nil {
			t.Error("a proof of another index was taken")
		}
		p.Index ^= 1
		p.Leaf, _ = Leaf{Report: id(999)}.encode()
		if _, err := p.Verify(k.key.verifier); err == nil {
			t.Error("a proof of another leaf was taken")
		}
	}
	if _, err := k.log.Proof(t.Context(), id(7000)); !errors.Is(err, archive.ErrNotFound) {
		t.Error(err)
	}
	if _, err := ProofIn(t.Context(), Dir(copied), k.key.verifier, id(7000)); !errors.Is(err, ErrNotInLog) {
		t.Error(err)
	}
	// Another key's log.
	other := newKept(t)
	if _, err := Check(t.Context(), mirror, other.key.verifier, nil, nil); !isTampered(err) {
		t.Error(err)
	}
	if _, err := Open(t.Context(), k.logDir(), other.key, other.Archive, slog.New(slog.DiscardHandler)); err == nil {
		t.Error("a log was opened with the key of another")
	}
}

func isTampered(err error) bool {
	var bad *Tampered
	return errors.As(err, &bad)
}

// TestTampered changes each file of a log in each way that counts.
func TestTampered(t *testing.T) {
	k := newKept(t)
	k.add(0, 300)
	k.close()
	old := k.check(300, nil)
	k.openArchive()
	k.add(300, 600)
	k.openLog()
	k.close()
	k.check(600, []byte(old.Text))
	judge := func(earlier []byte) error {
		_, err := Check(t.Context(), Dir(k.logDir()), k.key.verifier, earlier, func(uint64, Leaf) error { return nil })
		return err
	}
	bundles := []string{"tile/entries/000", "tile/entries/001", "tile/entries/002.p/88"}
	for _, name := range bundles {
		path := filepath.Join(k.logDir(), name)
		good, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for at := 0; at < len(good); at += 97 {
			bad := bytes.Clone(good)
			bad[at] ^= 1
			if os.WriteFile(path, bad, 0o600); !isTampered(judge(nil)) {
				t.Fatalf("%s: byte %d changed: %v", name, at, judge(nil))
			}
		}
		os.WriteFile(path, good[:len(good)-1], 0o600)
		if err := judge(nil); !isTampered(err) {
			t.Error(err)
		}
		os.Remove(path)
		if err := judge(nil); !isTampered(err) {
			t.Error(err)
		}
		os.WriteFile(path, good, 0o600)
	}
	// The old state: a log that was cut is seen by who has a newer checkpoint.
	now, err := os.ReadFile(filepath.Join(k.logDir(), "checkpoint"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(k.logDir(), "checkpoint"), []byte(old.Text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := judge(nil); err != nil {
		t.Error(err)
	}
	if err := judge(now); !isTampered(err) {
		t.Error(err)
	}
	// Another history under the same key: well signed, and not grown out of
	// what was shown before.
	fork := newKept(t)
	fork.close()
	fork.key, fork.dir = k.key, t.TempDir()
	fork.openArchive()
	fork.add(1, 601)
	fork.openLog()
	fork.close()
	_, err = Check(t.Context(), Dir(fork.logDir()), k.key.verifier, []byte(old.Text), func(uint64, Leaf) error { return nil })
	if !isTampered(err) {
		t.Error(err)
	}
	if err := os.Remove(filepath.Join(k.logDir(), "checkpoint")); err != nil {
		t.Fatal(err)
	}
	if err := judge(nil); !errors.Is(err, fs.ErrNotExist) || isTampered(err) {
		t.Error(err)
	}
}

// TestResume puts a log into the states that a crash or a failed write leaves.
func TestResume(t *testing.T) {
	k := newKept(t)
	k.add(0, 10)
	k.close()
	// A hole: the first part of a batch failed, the second went in.
	k.openArchive()
	k.add(10, 20)
	at := archive.Position{}
	var all []archive.Stored
	for range 20 {
		e, err := k.Next(at)
		if err != nil {
			t.Fatal(err)
		}
		all, at = append(all, e), e.Next
	}
	l, err := open(t.Context(), k.logDir(), k.key, k.Archive, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	l.at = all[15].At
	if n, err := l.takeBatch(t.Context()); n != 5 || err != nil {
		t.Fatal(n, err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	k.openLog()
	k.close()
	k.check(20, nil)
	// An archive that was removed: its reports stay in the log, and those of
	// the new one are added, though they stand at the same places.
	if err := os.RemoveAll(filepath.Join(k.dir, "archive")); err != nil {
		t.Fatal(err)
	}
	k.openArchive()
	k.add(20, 40)
	k.openLog()
	p, err := k.log.Proof(t.Context(), id(30))
	for until := time.Now().Add(patience); errors.Is(err, ErrNotInLog) && time.Now().Before(until); {
		p, err = k.log.Proof(t.Context(), id(30))
	}
	if err != nil {
		t.Fatal(err)
	}
	if l, err := p.Verify(k.key.verifier); err != nil || l.Report != id(30) {
		t.Error(l, err)
	}
	k.close()
	k.check(40, nil)
}

func FuzzLeaf(f *testing.F) {
	good, err := Leaf{Report: id(1), Device: attest.Digest{1}, Time: time.UnixMilli(5), At: archive.Position{Segment: 1, Offset: 2}}.encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Fuzz(func(t *testing.T, data []byte) {
		l, err := parseLeaf(data)
		if err != nil {
			return
		}
		if again, err := l.encode(); err != nil || !bytes.Equal(again, data) {
			t.Errorf("%x became %x, %v", data, again, err)
		}
	})
}

func FuzzProof(f *testing.F) {
	good, err := Proof{5, []byte("leaf"), [][]byte{make([]byte, 32)}, "origin\n1\nAAAA\n\n— x y\n"}.MarshalText()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := ParseProof(data)
		if err != nil {
			return
		}
		text, err := p.MarshalText()
		if err != nil {
			t.Fatal(err)
		}
		if q, err := ParseProof(text); err != nil || q.Index != p.Index || q.Checkpoint != p.Checkpoint || len(q.Hashes) != len(p.Hashes) {
			t.Errorf("%+v became %+v, %v", p, q, err)
		}
	})
}
