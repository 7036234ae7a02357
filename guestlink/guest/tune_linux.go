package guest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// ProcSys is where the kernel's settings are.
const ProcSys = "/proc/sys"

// longSegments has TCP hand the TUN device segments as long as it takes.
//
// TCP makes a segment as long as what the path carries in a millisecond, and at
// least two packets. That is meant for a network card, before which short
// bursts wait less. Here nothing is sent at all until the hypervisor has been
// entered, and an entry costs more than the bytes of the longest segment: short
// segments make the path slow, and on a slow path TCP keeps them short.
var longSegments = []struct{ path, value string }{
	// The longest where the round trip is under 2^31 µs (from Linux 5.18, also
	// for BBR; Documentation/networking/ip-sysctl.rst).
	{"net/ipv4/tcp_tso_rtt_log", "31"},
	// At least as many packets as 64 KiB hold at MTU 1500, for kernels before.
	{"net/ipv4/tcp_min_tso_segs", "44"},
}

// LongSegments sets, below procSys, how TCP cuts what it sends. It sets what it
// can: a kernel without one of the settings is slower, no more.
func LongSegments(procSys string) error {
	var errs []error
	for _, s := range longSegments {
		path := filepath.Join(procSys, s.path)
		if err := write(path, s.value); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, fmt.Errorf("tell tcp to send long segments: %w", err))
		}
	}
	return errors.Join(errs...)
}

// write is without O_CREATE: a setting is there or not.
func write(path, value string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}
