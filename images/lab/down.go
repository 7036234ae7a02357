package lab

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"sekisho/images/lab/hook"
)

const (
	initSocket = "/run/sekisho/init.sock"
	// powerOffTime is how long the laptop may take to end in order.
	powerOffTime = 90 * time.Second
)

// Down ends the lab in order: the laptop by its own power-off, then QEMU if it
// did not follow, then the rest, then the namespaces. It is no error when
// nothing runs.
func (l *Lab) Down(ctx context.Context) error {
	var errs []error
	if qemu, err := l.find("qemu"); err == nil {
		if err := l.powerOff(ctx, qemu); err != nil {
			l.say("lab: %v; taking its power away", err)
			_, err := qmp(ctx, "quit", nil)
			hard, cancel := context.WithTimeout(ctx, 10*time.Second)
			defer cancel()
			if err != nil || qemu.wait(hard) != nil {
				errs = append(errs, qemu.stop(ctx, time.Second))
			}
		}
	}
	errs = append(errs, l.stopAll(ctx), clearNamespaces(ctx))
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return l.update(func(s *state) { s.Processes = nil })
}

// powerOff asks init for an orderly end and waits for it.
func (l *Lab) powerOff(ctx context.Context, qemu process) error {
	ctx, cancel := context.WithTimeoutCause(ctx, powerOffTime, fmt.Errorf("the laptop did not end within %s", powerOffTime))
	defer cancel()
	a, err := l.Call(ctx, hook.Request{Target: hook.Host, Timeout: 5 * time.Second, Socket: initSocket, Method: http.MethodPost, Path: "/v1/poweroff"})
	if err != nil {
		return err
	}
	if a.Exit >= 300 {
		return fmt.Errorf("lab: power-off: http status %d: %.200s", a.Exit, a.Stdout)
	}
	return qemu.wait(ctx)
}
