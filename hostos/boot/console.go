package boot

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// consolePatience is how long one line may wait for a console that takes
// nothing; lines after it only consoleGlance, until one gets through.
const (
	consolePatience = 500 * time.Millisecond
	consoleGlance   = 10 * time.Millisecond
)

// console writes the lines of docs/host-domain.md, one for each change. A
// console that somebody has stopped (Ctrl-S, Scroll Lock) loses lines; it must
// not stop PID 1.
type console struct {
	mu    sync.Mutex
	w     io.Writer
	stuck bool                 // the last line did not get through in time
	since func() time.Duration // since the kernel started
}

func newConsole(w io.Writer) *console { return &console{w: w, since: sinceKernelStart} }

// sinceKernelStart reads CLOCK_BOOTTIME (clock_gettime(2)).
func sinceKernelStart() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

// line writes one line about name. An error is of no use to anyone: there is
// no second console.
func (c *console) line(name, format string, a ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f, ok := c.w.(interface{ SetWriteDeadline(time.Time) error }); ok {
		wait := consolePatience
		if c.stuck {
			wait = consoleGlance
		}
		_ = f.SetWriteDeadline(time.Now().Add(wait)) // a file without deadlines does not block either
	}
	_, err := fmt.Fprintf(c.w, "sekisho [%9.3f] %s: %s\n", c.since().Seconds(), name, printable(fmt.Sprintf(format, a...)))
	c.stuck = errors.Is(err, os.ErrDeadlineExceeded)
}

// maxLine is how many bytes of a text reach the console.
const maxLine = 240

// printable makes one harmless line of text that a service sent: no control
// characters, so that no service can forge another's line or drive a terminal.
func printable(s string) string {
	s = strings.ToValidUTF8(s, "?")
	s = strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, s)
	for len(s) > maxLine {
		_, n := utf8.DecodeLastRuneInString(s)
		s = s[:len(s)-n]
	}
	return s
}
