package work

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// inputDir is where the kernel lists input devices.
const inputDir = "/sys/class/input"

// struct input_event of a 64-bit kernel, and the key that module button sends
// (include/uapi/linux/input.h and input-event-codes.h).
const (
	inputEventSize = 24
	evKey          = 1
	keyPower       = 116
	keyDown        = 1
)

// waitPowerKey returns nil when the power button is pressed. dir is inputDir
// but in tests.
func waitPowerKey(dir string) error {
	device, err := findPowerButton(dir)
	if err != nil {
		return err
	}
	f, err := os.Open(device)
	if err != nil {
		return fmt.Errorf("power button: %w", err)
	}
	defer f.Close()
	return readPowerKey(f)
}

// findPowerButton returns the event device of the ACPI power button.
func findPowerButton(dir string) (string, error) {
	names, err := filepath.Glob(filepath.Join(dir, "event*", "device", "name"))
	if err != nil {
		return "", fmt.Errorf("power button: %w", err)
	}
	for _, name := range names {
		data, err := os.ReadFile(name)
		if err == nil && strings.TrimSpace(string(data)) == "Power Button" {
			return "/dev/input/" + filepath.Base(filepath.Dir(filepath.Dir(name))), nil
		}
	}
	return "", errors.New("power button: no input device of that name; is module button loaded?")
}

// readPowerKey reads input events until the power key goes down.
func readPowerKey(r io.Reader) error {
	var event [inputEventSize]byte
	for {
		if _, err := io.ReadFull(r, event[:]); err != nil {
			return fmt.Errorf("power button: %w", err)
		}
		typ, code := binary.NativeEndian.Uint16(event[16:]), binary.NativeEndian.Uint16(event[18:])
		if typ == evKey && code == keyPower && binary.NativeEndian.Uint32(event[20:]) == keyDown {
			return nil
		}
	}
}
