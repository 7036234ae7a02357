package attester

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// Notify tells the service manager each change of state, and that we live,
// until ctx ends (sd_notify(3)).
func (a *Attester) Notify(ctx context.Context) error {
	watchdog, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		return fmt.Errorf("WATCHDOG_USEC: %w", err)
	}
	pause := time.Minute
	if watchdog > 0 {
		pause = watchdog / 2
	}
	message := daemon.SdNotifyReady
	for seen := uint64(0); ctx.Err() == nil; {
		s := a.Status()
		if s.Version != seen || message == daemon.SdNotifyReady {
			message += "\nSTATUS=" + strings.ReplaceAll(Line(s), "\n", " ")
			seen = s.Version
		}
		if watchdog > 0 {
			message += "\n" + daemon.SdNotifyWatchdog
		}
		if message = strings.TrimSpace(message); message != "" {
			if _, err := daemon.SdNotify(false, message); err != nil {
				return fmt.Errorf("NOTIFY_SOCKET: %w", err)
			}
		}
		message = ""
		wait, cancel := context.WithTimeout(ctx, pause)
		a.Wait(wait, seen)
		cancel()
	}
	return nil
}
