package boot

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxNotify bounds one message of the service protocol in bytes.
const maxNotify = 4 << 10

// notification is what one message of a service says (sd_notify(3)); fields
// that init has no use for are ignored.
type notification struct {
	ready    bool
	stopping bool
	watchdog bool
	status   string
	hasState bool // status was given
}

// parseNotification reads newline-separated assignments. Unknown ones are
// ignored, as the protocol asks.
func parseNotification(b []byte) notification {
	var n notification
	for line := range strings.SplitSeq(string(b), "\n") {
		key, value, _ := strings.Cut(line, "=")
		switch key {
		case "READY":
			n.ready = value == "1"
		case "STOPPING":
			n.stopping = value == "1"
		case "WATCHDOG":
			n.watchdog = value == "1"
		case "STATUS":
			n.status, n.hasState = printable(value), true
		}
	}
	return n
}

// listenNotify opens the datagram socket that NOTIFY_SOCKET names. Beside root,
// group may write to it: who did, the kernel says (SCM_CREDENTIALS, unix(7)).
func listenNotify(path string, group int) (*net.UnixConn, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return nil, err
	}
	raw, err := c.SyscallConn()
	if err == nil {
		cerr := raw.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PASSCRED, 1)
		})
		err = errors.Join(err, cerr, os.Chown(path, -1, group), os.Chmod(path, 0o660))
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("notify socket: %w", err)
	}
	return c, nil
}

// receiveNotify calls f with each message and its sender's pid until c is
// closed. Messages that are cut or without credentials are ignored.
func receiveNotify(c *net.UnixConn, f func(pid int, n notification)) error {
	buf := make([]byte, maxNotify)
	oob := make([]byte, 256)
	for {
		n, on, flags, _, err := c.ReadMsgUnix(buf, oob)
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("notify socket: %w", err)
		}
		pid := senderPID(oob[:on])
		if pid == 0 || flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
			continue
		}
		f(pid, parseNotification(buf[:n]))
	}
}

// senderPID returns the pid in a control message, 0 when there is none. File
// descriptors that came along are closed.
func senderPID(oob []byte) int {
	msgs, err := syscall.ParseSocketControlMessage(oob)
	if err != nil {
		return 0
	}
	pid := 0
	for i := range msgs {
		if fds, err := syscall.ParseUnixRights(&msgs[i]); err == nil {
			for _, fd := range fds {
				syscall.Close(fd)
			}
			continue
		}
		if cred, err := syscall.ParseUnixCredentials(&msgs[i]); err == nil {
			pid = int(cred.Pid)
		}
	}
	return pid
}
