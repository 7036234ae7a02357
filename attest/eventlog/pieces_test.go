package eventlog

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestPieces reads the files of the corpus that are one structure, no log.
func TestPieces(t *testing.T) {
	read := func(name string) []byte {
		data, err := os.ReadFile(filepath.Join("../../../shared/corpus/attest/malformed", name))
		if errors.Is(err, os.ErrNotExist) {
			t.Skip("needs the corpus beside the repository")
		}
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	for _, c := range []struct {
		file string
		good bool
		read func([]byte) error
	}{
		{"esl-oversized-signature-size.part", false, checkSignatureLists},
		{"goattestation-specid-invalid_version.part", false, func(b []byte) error { _, err := parseSpecID(b); return err }},
		{"goattestation-specid-sha1.part", true, func(b []byte) error { _, err := parseSpecID(b); return err }},
		{"goattestation-event-size-zero-v2.part", true, func(b []byte) error {
			e, n, err := agileEvent(b, []algorithm{{SHA1, 20}, {SHA256, 32}})
			if err == nil && (n != len(b) || len(e.Data) != 0) {
				t.Errorf("event of %d bytes with %d of data in %d", n, len(e.Data), len(b))
			}
			return err
		}},
	} {
		err := c.read(read(c.file))
		t.Logf("%-45s expected good %t  got %v", c.file, c.good, err)
		if (err == nil) != c.good {
			t.Errorf("%s: %v", c.file, err)
		}
	}
}

func FuzzPieces(f *testing.F) {
	f.Add([]byte("Spec ID Event03\x00"))
	f.Add(globalVariable[:])
	f.Fuzz(func(t *testing.T, data []byte) {
		parseSpecID(data)
		parseVariable(data, maxShimRest)
		checkSignatureLists(data)
		checkSIPA(data, 0)
		isHPEROM(data)
		loadedFile(data)
	})
}

// TestGuarded: a parser that panics or never ends costs an error.
func TestGuarded(t *testing.T) {
	if _, err := guarded(func() (int, error) { panic("out of range") }); err == nil || !strings.Contains(err.Error(), "out of range") {
		t.Errorf("panic: %v", err)
	}
	synctest.Test(t, func(t *testing.T) {
		begin, release := time.Now(), make(chan struct{})
		defer close(release)
		if _, err := guarded(func() (int, error) { <-release; return 1, nil }); err == nil || time.Since(begin) != maxTime {
			t.Errorf("after %v: %v", time.Since(begin), err)
		}
	})
}
