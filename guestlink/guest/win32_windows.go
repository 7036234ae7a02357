package guest

import (
	"fmt"
	"time"
	"unsafe"

	"golang.org/x/sys/windows"
)

// answerFirst is how long a suspend waits, so that the answer to the host is on
// its way before the machine stops.
const answerFirst = 500 * time.Millisecond

func setSystemTime(t *windows.Systemtime) error {
	r, _, err := windows.NewLazySystemDLL("kernel32.dll").NewProc("SetSystemTime").Call(uintptr(unsafe.Pointer(t)))
	if r == 0 {
		return err
	}
	return nil
}

// setSuspendState suspends to memory (powrprof.h: hibernate false, force
// ignored since Windows Vista, wake events stay on).
func setSuspendState() error {
	r, _, err := windows.NewLazySystemDLL("powrprof.dll").NewProc("SetSuspendState").Call(0, 0, 0)
	if r == 0 {
		return err
	}
	return nil
}

// privilege turns on a privilege that the process's token holds.
func privilege(name string) error {
	wide, err := windows.UTF16PtrFromString(name)
	if err != nil {
		return err
	}
	var luid windows.LUID
	if err := windows.LookupPrivilegeValue(nil, wide, &luid); err != nil {
		return fmt.Errorf("look up %s: %w", name, err)
	}
	var token windows.Token
	if err := windows.OpenProcessToken(windows.CurrentProcess(), windows.TOKEN_ADJUST_PRIVILEGES|windows.TOKEN_QUERY, &token); err != nil {
		return fmt.Errorf("open own token: %w", err)
	}
	defer token.Close()
	p := windows.Tokenprivileges{PrivilegeCount: 1}
	p.Privileges[0] = windows.LUIDAndAttributes{Luid: luid, Attributes: windows.SE_PRIVILEGE_ENABLED}
	if err := windows.AdjustTokenPrivileges(token, false, &p, 0, nil, nil); err != nil {
		return fmt.Errorf("turn on %s: %w", name, err)
	}
	return nil
}
