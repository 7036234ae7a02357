package path

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"
)

// maxKept bounds the file of a Kept in bytes.
const maxKept = 64

// Kept is the file with the last signed time, one line as in RFC 3339. It is in
// memory, and outlives netd; init carries it over power-off (hostos/boot).
type Kept struct{ Path string }

// Load returns the time; an error that wraps fs.ErrNotExist says that there is none.
func (k Kept) Load() (time.Time, error) {
	f, err := os.Open(k.Path)
	if err != nil {
		return time.Time{}, fmt.Errorf("last signed time: %w", err)
	}
	defer f.Close()
	line, err := io.ReadAll(io.LimitReader(f, maxKept))
	if err != nil {
		return time.Time{}, fmt.Errorf("last signed time: %w", err)
	}
	t, err := parseKept(line)
	if err != nil {
		return time.Time{}, fmt.Errorf("last signed time: %s: %w", k.Path, err)
	}
	return t, nil
}

func parseKept(line []byte) (time.Time, error) {
	text := string(line)
	if n := len(text); n == 0 || text[n-1] != '\n' {
		return time.Time{}, errors.New("not one line")
	}
	return time.Parse(time.RFC3339, text[:len(text)-1])
}

// Store replaces the file as a whole.
func (k Kept) Store(t time.Time) error {
	next := filepath.Join(filepath.Dir(k.Path), ".time")
	err := os.WriteFile(next, []byte(t.UTC().Format(time.RFC3339)+"\n"), 0o600)
	if err == nil {
		err = os.Rename(next, k.Path)
	}
	if err != nil {
		return fmt.Errorf("last signed time: %w", err)
	}
	return nil
}
