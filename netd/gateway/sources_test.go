package gateway

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"
)

// TestOneSourceCannotTakeEveryPlace opens connections from one address that
// never begin their handshake: beyond the limit they are closed, a laptop at
// another address is served, and so is one at the same address as soon as one
// place is free; an open session takes none.
func TestOneSourceCannotTakeEveryPlace(t *testing.T) {
	s := newSite(t, nil)
	dial := func(from string) net.Conn {
		t.Helper()
		d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(from), 0))}
		c, err := d.Dial("tcp", s.addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	s.open(s.device(1, time.Minute)) // from 127.0.0.1
	mute := make([]net.Conn, perSource)
	for i := range mute {
		mute[i] = dial("127.0.0.1")
	}
	ended := func(c net.Conn) bool {
		c.SetReadDeadline(time.Now().Add(5 * time.Second))
		_, err := c.Read(make([]byte, 1))
		return err == io.EOF || err != nil && !errors.Is(err, os.ErrDeadlineExceeded)
	}
	if !ended(dial("127.0.0.1")) {
		t.Error("a connection beyond the limit is kept open")
	}
	if n := s.server.Status().Crowded; n != 1 {
		t.Errorf("crowded %d, want 1", n)
	}
	under := func() int {
		f := s.server.sources
		f.mu.Lock()
		defer f.mu.Unlock()
		return f.count[netip.MustParsePrefix("127.0.0.1/32")]
	}
	if n := under(); n != perSource {
		t.Errorf("%d under way, want %d", n, perSource)
	}
	other := dial("127.0.0.2")
	other.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if _, err := other.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("another source: %v", err)
	}
	mute[0].Close()
	limit := time.After(10 * time.Second)
	for under() == perSource {
		select {
		case <-limit:
			t.Fatal("a closed connection still counts")
		case <-time.After(time.Millisecond):
		}
	}
	s.open(s.device(2, time.Minute)) // takes the free place, and gives it back
	if n := under(); n != perSource-1 {
		t.Errorf("%d under way after a session opened, want %d", n, perSource-1)
	}
}

func TestSourceOf(t *testing.T) {
	for address, want := range map[string]string{
		"192.0.2.7:443":            "192.0.2.7/32",
		"[::ffff:192.0.2.7]:1":     "192.0.2.7/32",
		"[2001:db8:1:2:3:4:5:6]:1": "2001:db8:1:2::/64",
		"[fe80::1%eth0]:1":         "fe80::/64",
	} {
		if got := sourceOf(net.TCPAddrFromAddrPort(netip.MustParseAddrPort(address))); got.String() != want {
			t.Errorf("%s: %s, want %s", address, got, want)
		}
	}
}
