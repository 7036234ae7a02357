package boot

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// console writes the lines of docs/host-domain.md, one for each change.
type console struct {
	mu    sync.Mutex
	w     io.Writer
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
	fmt.Fprintf(c.w, "sekisho [%9.3f] %s: %s\n", c.since().Seconds(), name, printable(fmt.Sprintf(format, a...)))
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
