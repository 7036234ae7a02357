package attester

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// Notify tells the service manager that we have started, each change of state,
// and that we live, until ctx ends (sd_notify(3)). READY does not wait for the
// TPM, which may need longer than a start may take. Once Run hangs there is no
// sign of life, so that the service manager starts us anew.
func (a *Attester) Notify(ctx context.Context) error {
	watchdog, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		return fmt.Errorf("WATCHDOG_USEC: %w", err)
	}
	pause := time.Minute
	if watchdog > 0 {
		pause = watchdog / 2
	}
	first := true
	for seen := uint64(0); ctx.Err() == nil; first = false {
		s := a.Status()
		var lines []string
		if first {
			lines = append(lines, daemon.SdNotifyReady)
		}
		if first || s.Version != seen {
			lines = append(lines, "STATUS="+strings.ReplaceAll(Line(s), "\n", " "))
			seen = s.Version
		}
		if watchdog > 0 && !a.hangs() {
			lines = append(lines, daemon.SdNotifyWatchdog)
		}
		if len(lines) > 0 {
			if _, err := daemon.SdNotify(false, strings.Join(lines, "\n")); err != nil {
				return fmt.Errorf("NOTIFY_SOCKET: %w", err)
			}
		}
		wait, cancel := context.WithTimeout(ctx, pause)
		a.Wait(wait, seen)
		cancel()
	}
	return nil
}
