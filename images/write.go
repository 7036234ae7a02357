package images

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// content is a file to write, by its name in the output directory.
type content struct {
	name string
	data []byte
}

// write writes files to the output directory, each in one step.
func (b *Builder) write(files ...content) ([]File, error) {
	if err := os.MkdirAll(b.Out, 0o755); err != nil {
		return nil, fmt.Errorf("output: %w", err)
	}
	var out []File
	for _, c := range files {
		name := filepath.Join(b.Out, c.name)
		if err := writeFile(name, c.data); err != nil {
			return nil, fmt.Errorf("output: %w", err)
		}
		out = append(out, File{name, int64(len(c.data))})
	}
	return out, nil
}

func writeFile(name string, data []byte) error {
	f, err := os.CreateTemp(filepath.Dir(name), ".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // of no effect once renamed
	_, err = f.Write(data)
	if err := errors.Join(err, f.Chmod(0o644), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), name)
}

// readCapped reads a file of at most limit bytes.
func readCapped(name string, limit int64) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if st.Size() > limit {
		return nil, fmt.Errorf("%s: %d bytes, at most %d", name, st.Size(), limit)
	}
	data := make([]byte, st.Size())
	_, err = io.ReadFull(f, data)
	return data, err
}

// size of a file that was just written, for the report; 0 when it is gone.
func size(name string) int64 {
	if st, err := os.Stat(name); err == nil {
		return st.Size()
	}
	return 0
}
