//go:build linux

// Command poweroff is the init of the benchmark's yardstick: a laptop whose
// whole host domain switches it off at once.
package main

import "golang.org/x/sys/unix"

func main() {
	for {
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF) // as PID 1 nobody could be told of an error
	}
}
