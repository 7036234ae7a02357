package service

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestListenAndPeer(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	if _, err := Listen("unix", "", "-socket"); err == nil || !strings.Contains(err.Error(), "-socket") {
		t.Errorf("no address: %v", err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil { // a stale one
		t.Fatal(err)
	}
	l, err := Listen("unix", path, "-socket")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	done := make(chan error, 1)
	go func() {
		c, err := net.Dial("unix", path)
		if err == nil {
			err = c.Close()
		}
		done <- err
	}()
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if uid, err := PeerUID(c); err != nil || uid != uint32(os.Getuid()) {
		t.Errorf("uid %d, %v", uid, err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	one, other := net.Pipe()
	defer one.Close()
	defer other.Close()
	if _, err := PeerUID(one); err == nil {
		t.Error("a pipe has a user")
	}
}
