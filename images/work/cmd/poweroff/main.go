// Command poweroff asks PID 1 of the Linux work domain that stands in for
// Windows to end its services and switch the machine off. guestagent calls it
// when the host asks for an orderly shutdown.
package main

import (
	"flag"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

const usage = `poweroff switches the work domain off: it sends SIGTERM to workinit, which
ends what it has started and then asks the kernel to cut the power. It returns
at once.

Exit status: 0 asked, 1 not allowed, 2 wrong arguments.
`

func main() {
	flag.Usage = func() { fmt.Fprint(os.Stderr, usage) }
	flag.Parse()
	if flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	if err := unix.Kill(1, unix.SIGTERM); err != nil {
		fmt.Fprintf(os.Stderr, "poweroff: PID 1: %v; run it as root\n", err)
		os.Exit(1)
	}
}
