package boot

import (
	"fmt"
	"os"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"
)

// ExecFailed is the exit status of a child whose program could not be
// executed, the same number that systemd uses (systemd.exec(5), EXIT_EXEC).
const ExecFailed = 203

// Exec is the second half of starting a service: `init exec PATH ARGS...`. The
// supervisor has forked it as the right user into the right namespace; what
// only the child itself can say is said here: LISTEN_PID and WATCHDOG_PID
// (sd_listen_fds(3), sd_watchdog_enabled(3)), no new privileges, no core
// dumps. It returns only when it fails.
func Exec(argv []string) error {
	if len(argv) == 0 {
		return fmt.Errorf("init exec: no program named")
	}
	pid := strconv.Itoa(os.Getpid())
	for fds, name := range map[string]string{"LISTEN_FDS": "LISTEN_PID", "WATCHDOG_USEC": "WATCHDOG_PID"} {
		if os.Getenv(fds) != "" {
			if err := os.Setenv(name, pid); err != nil {
				return fmt.Errorf("init exec: %w", err)
			}
		}
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("init exec: no core dumps: %w", err)
	}
	runtime.LockOSThread() // the attribute is the thread's, and this thread executes
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("init exec: no new privileges: %w", err)
	}
	return fmt.Errorf("init exec: %s: %w", argv[0], unix.Exec(argv[0], argv, os.Environ()))
}
