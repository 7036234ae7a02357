//go:build lab

package boot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// labServices are the services that only a lab image has.
func labServices() []Service {
	return []Service{{Name: "labhook", Args: []string{"/bbin/labhook"}}}
}

// labDevices makes the link /dev/virtio-ports/NAME that udev would make, for
// the port that labhook serves.
func labDevices() error {
	return linkPort("/sys/class/virtio-ports", "/dev/virtio-ports", "/dev", "org.sekisho.lab")
}

func linkPort(sys, dir, dev, name string) error {
	ports, err := filepath.Glob(filepath.Join(sys, "*", "name"))
	if err != nil {
		return fmt.Errorf("virtio ports: %w", err)
	}
	for _, p := range ports {
		if b, err := os.ReadFile(p); err != nil || strings.TrimSpace(string(b)) != name {
			continue
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("virtio ports: %w", err)
		}
		port := filepath.Join(dev, filepath.Base(filepath.Dir(p)))
		if err := os.Symlink(port, filepath.Join(dir, name)); err != nil && !errors.Is(err, os.ErrExist) {
			return fmt.Errorf("virtio ports: %w", err)
		}
		return nil
	}
	return fmt.Errorf("virtio ports: none is named %s", name)
}
