package vsock

import (
	"net"
	"path/filepath"
	"testing"
)

// TestListenerRefusesOtherPeers stands a unix socket in for AF_VSOCK and gives
// each connection the context id that its first byte says.
func TestListenerRefusesOtherPeers(t *testing.T) {
	inner, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	l := &Listener{l: inner, peer: 3, cid: func(c net.Conn) (uint32, bool) {
		var b [1]byte
		c.Read(b[:])
		return uint32(b[0]), b[0] != 0
	}}
	defer l.Close()
	dial := func(cid byte) net.Conn {
		c, err := net.Dial("unix", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		c.Write([]byte{cid})
		return c
	}
	others := []net.Conn{dial(4), dial(2), dial(0)}
	dial(3)
	if _, err := l.Accept(); err != nil {
		t.Fatal(err)
	}
	if got := l.Refused(); got != uint64(len(others)) {
		t.Errorf("refused %d connections, want %d", got, len(others))
	}
	for i, c := range others {
		if n, err := c.Read(make([]byte, 1)); err == nil {
			t.Errorf("connection %d of another peer is open: read %d bytes", i, n)
		}
	}
	l.Close()
	if _, err := l.Accept(); err == nil {
		t.Error("accept on a closed listener gave a connection")
	}
}
