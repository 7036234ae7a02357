package guest

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestKilledHostEnd ends the host end by SIGKILL, with data on the way: its
// device stays as it was, and a TCP connection of the work domain goes on
// through the host end that follows.
func TestKilledHostEnd(t *testing.T) {
	privileged(t)
	w := world{host: newNamespace(t), guest: newNamespace(t), address: "10.80.0.1"}
	socket := filepath.Join(t.TempDir(), "link")
	start := func() (pid int) {
		pid, lines := end(t, w.host, "host-kept", socket)
		if !lines.Scan() { // listening
			t.Fatal("the host end ended at once")
		}
		go io.Copy(io.Discard, readerOf(lines))
		return pid
	}
	pid := start()
	if err := w.host.do(setUpHost); err != nil {
		t.Fatal(err)
	}
	device := func() (index int) {
		if err := w.host.do(func() error {
			l, err := netlink.LinkByName("work0")
			if err == nil {
				index = l.Attrs().Index
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		return index
	}
	before := device()
	end(t, w.guest, "guest", socket)
	guest, host := w.connect(t)
	go io.Copy(host, host)
	echo := make(chan error, 1)
	sent := bytes.Repeat([]byte("sekisho "), 1<<20)
	go func() {
		got := make([]byte, len(sent))
		guest.SetReadDeadline(time.Now().Add(60 * time.Second))
		_, err := io.ReadFull(guest, got)
		if err == nil && !bytes.Equal(got, sent) {
			err = io.ErrUnexpectedEOF
		}
		echo <- err
	}()
	if _, err := guest.Write(sent[:4<<20]); err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	untilDead(t, pid) // before that it has the device
	if device() != before {
		t.Fatal("work0 is another device")
	}
	guest.SetWriteDeadline(time.Now().Add(time.Minute))
	rest := make(chan error, 1)
	go func() { _, err := guest.Write(sent[4<<20:]); rest <- err }()
	start()
	if err := <-rest; err != nil {
		t.Fatalf("write behind the restart: %v", err)
	}
	if err := <-echo; err != nil {
		t.Fatalf("echo: %v", err)
	}
	if device() != before {
		t.Fatal("work0 is another device")
	}
}

// untilDead waits until of a killed process nothing is left but a zombie's
// first thread: it has nothing open any more.
func untilDead(t *testing.T, pid int) {
	t.Helper()
	late := time.After(time.Minute)
	for {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		threads, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		if err != nil || bytes.Contains(data, []byte("State:\tZ")) && len(threads) == 1 {
			return
		}
		select {
		case <-late:
			t.Fatalf("process %d does not end", pid)
		case <-time.After(time.Millisecond):
		}
	}
}
