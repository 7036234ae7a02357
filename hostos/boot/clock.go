package boot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"sekisho/hostos/store"
)

const (
	// TimeFile holds the last time that a verifier signed, one line as in RFC
	// 3339: netd writes it, and reads it when it starts.
	TimeFile = NetdDir + "/time"
	// maxTime bounds it in bytes.
	maxTime = 64
	// timeLook is how often init looks at it, and timeStep by how much it has to
	// be later than what the disk holds to be written there before power-off.
	timeLook, timeStep = 10 * time.Second, time.Hour
)

// signedTime carries the last signed time over power-off, on the partition of
// the host domain's records. It only ever rises. What it holds is no secret and
// opens nothing: netd refuses what is earlier.
type signedTime struct {
	record store.Record
	file   string
	uid    int // the file's owner
	say    func(format string, a ...any)
	kept   time.Time // on the disk
}

func (h *host) newClock() *signedTime {
	uid, _ := lookup("netd")
	return &signedTime{
		record: store.Record{Path: byPartlabel + "/" + HostPart, Place: store.TimePlace},
		file:   TimeFile, uid: int(uid),
		say: func(format string, a ...any) { h.console.line("init", "warning: "+format, a...) },
	}
}

// recall gives netd the time that the disk holds.
func (s *signedTime) recall() {
	data, err := s.record.Load()
	if err == nil {
		if s.kept, err = parseTime(data); err == nil {
			err = s.give(data)
		}
	}
	if err != nil && !errors.Is(err, store.ErrNone) {
		s.say("last signed time: %v", err)
	}
}

func (s *signedTime) give(data []byte) error {
	if err := os.MkdirAll(filepath.Dir(s.file), 0o750); err != nil {
		return err
	}
	if err := os.Chown(filepath.Dir(s.file), s.uid, s.uid); err != nil {
		return err
	}
	return errors.Join(os.WriteFile(s.file, data, 0o600), os.Chown(s.file, s.uid, s.uid))
}

// watch keeps what netd has heard until ctx is done, and then once more.
func (s *signedTime) watch(ctx context.Context) {
	tick := time.NewTicker(timeLook)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			s.keep(time.Second)
			return
		case <-tick.C:
			s.keep(timeStep)
		}
	}
}

// keep writes what netd has heard if it is later than what the disk holds by
// step at least.
func (s *signedTime) keep(step time.Duration) {
	data, err := readTime(s.file)
	if err != nil {
		return // netd has heard nothing yet
	}
	at, err := parseTime(data)
	if err != nil || at.Sub(s.kept) < step {
		return
	}
	if err := s.record.Store(data); err != nil {
		s.say("last signed time: %v", err)
		return
	}
	s.kept = at
}

// readTime reads a file that another user made: it waits for no pipe and
// follows no link.
func readTime(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxTime))
}

func parseTime(data []byte) (time.Time, error) {
	n := len(data)
	if n == 0 || n > maxTime || data[n-1] != '\n' {
		return time.Time{}, fmt.Errorf("%d bytes are not one line", n)
	}
	return time.Parse(time.RFC3339, string(data[:n-1]))
}
