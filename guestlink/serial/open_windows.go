package serial

import (
	"errors"
	"os"

	"golang.org/x/sys/windows"
)

// Present reports whether this machine has the port: a port that another
// process has open is there too.
func Present() bool {
	f, err := open()
	if err == nil {
		f.Close()
	}
	return err == nil || errors.Is(err, windows.ERROR_ACCESS_DENIED)
}

// open opens the port by the name that virtio-win's vioserial driver gives it,
// for overlapped calls, so that deadlines work (os.NewFile).
func open() (*os.File, error) {
	const path = `\\.\Global\` + PortName
	name, err := windows.UTF16PtrFromString(path)
	if err != nil {
		return nil, err
	}
	h, err := windows.CreateFile(name, windows.GENERIC_READ|windows.GENERIC_WRITE, 0, nil,
		windows.OPEN_EXISTING, windows.FILE_FLAG_OVERLAPPED, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(h), path), nil
}
