package serial

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// sysPorts is where the kernel lists virtio-serial ports (virtio_console.c):
// their names are there also where no udev makes /dev/virtio-ports.
const sysPorts = "/sys/class/virtio-ports"

// find returns the device of the port.
func find(dir string) (string, error) {
	names, _ := filepath.Glob(filepath.Join(dir, "*", "name")) // a good pattern cannot fail
	for _, file := range names {
		name, err := os.ReadFile(file)
		if err == nil && strings.TrimSpace(string(name)) == PortName {
			return "/dev/" + filepath.Base(filepath.Dir(file)), nil
		}
	}
	return "", fmt.Errorf("no port of this name in %s: %w", dir, os.ErrNotExist)
}

// open opens the port without blocking, so that deadlines work.
func open() (*os.File, error) {
	path, err := find(sysPorts)
	if err != nil {
		return nil, err
	}
	return os.OpenFile(path, os.O_RDWR|unix.O_NONBLOCK, 0)
}

// Present reports whether this machine has the port.
func Present() bool {
	_, err := find(sysPorts)
	return err == nil
}
