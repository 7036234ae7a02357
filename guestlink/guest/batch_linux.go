package guest

import (
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// Yield has this process not interrupt another when a packet comes for it
// (SCHED_BATCH, sched(7)): on one processor the sender puts a row of segments
// into the TUN device before the agent carries them, instead of one for each
// change of process and each entry of the hypervisor. An idle processor takes the
// agent up at once as before. Threads that begin later inherit it.
func Yield() error {
	set := map[string]bool{}
	for n := -1; len(set) != n; { // until no thread has begun meanwhile
		n = len(set)
		threads, err := os.ReadDir("/proc/self/task")
		if err != nil {
			return fmt.Errorf("yield to others: %w", err)
		}
		for _, t := range threads {
			id, err := strconv.Atoi(t.Name())
			if err != nil || set[t.Name()] {
				continue
			}
			attr := unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_BATCH}
			if err := unix.SchedSetAttr(id, &attr, 0); err != nil && err != unix.ESRCH {
				return fmt.Errorf("yield to others: %w", err)
			}
			set[t.Name()] = true
		}
	}
	return nil
}
