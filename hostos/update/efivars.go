package update

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"unicode/utf16"
)

// Vendors of variables: EFI_GLOBAL_VARIABLE (UEFI specification 2.10, section
// 3.3), and the boot loader interface's (systemd.io/BOOT_LOADER_INTERFACE).
const (
	globalVendor = "8be4df61-93ca-11d2-aa0d-00e098032b8c"
	loaderVendor = "4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
)

// maxVariable bounds a variable in bytes.
const maxVariable = 64 << 10

// EFIVars are the variables in an efivarfs (Linux
// Documentation/filesystems/efivarfs.rst).
type EFIVars struct {
	Dir string
	// Writable makes the file system writable, and read-only again.
	Writable func(bool) error
}

// read returns a variable without its attributes.
func (e EFIVars) read(name, vendor string) ([]byte, error) {
	f, err := os.Open(filepath.Join(e.Dir, name+"-"+vendor))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxVariable+4))
	if err != nil {
		return nil, fmt.Errorf("firmware variable %s: %w", name, err)
	}
	if len(data) < 4 {
		return nil, fmt.Errorf("firmware variable %s: %d bytes", name, len(data))
	}
	return data[4:], nil
}

// Get returns a global variable.
func (e EFIVars) Get(name string) ([]byte, error) { return e.read(name, globalVendor) }

// Set writes a global variable, or deletes it.
func (e EFIVars) Set(name string, data []byte) (err error) {
	if err := e.Writable(true); err != nil {
		return fmt.Errorf("firmware variables: %w", err)
	}
	defer func() {
		if rerr := e.Writable(false); rerr != nil {
			err = errors.Join(err, fmt.Errorf("firmware variables: %w", rerr))
		}
	}()
	path := filepath.Join(e.Dir, name+"-"+globalVendor)
	if len(data) == 0 {
		return os.Remove(path)
	}
	const attributes = 0x7 // non-volatile, at boot, at run time (section 8.2)
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	// One write is one SetVariable.
	_, err = f.Write(append(binary.LittleEndian.AppendUint32(nil, attributes), data...))
	return errors.Join(err, f.Close())
}

// Entries lists the Boot#### variables.
func (e EFIVars) Entries() (list []uint16, err error) {
	found, err := os.ReadDir(e.Dir)
	if err != nil {
		return nil, err
	}
	for _, f := range found {
		number, ok := strings.CutPrefix(strings.TrimSuffix(f.Name(), "-"+globalVendor), "Boot")
		b, err := hex.DecodeString(number)
		if ok && err == nil && len(b) == 2 && strings.HasSuffix(f.Name(), globalVendor) {
			list = append(list, binary.BigEndian.Uint16(b))
		}
	}
	return list, nil
}

// Loaded is the GUID of the partition that the running image was started from,
// in text, as the stub noted it (systemd-stub(7), LoaderDevicePartUUID).
func (e EFIVars) Loaded() (string, error) {
	data, err := e.read("LoaderDevicePartUUID", loaderVendor)
	if err != nil {
		return "", err
	}
	var units []uint16
	for i := 0; i+1 < len(data) && i < 128; i += 2 {
		if u := binary.LittleEndian.Uint16(data[i:]); u != 0 {
			units = append(units, u)
		}
	}
	return strings.ToLower(string(utf16.Decode(units))), nil
}
