package attester_test

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"sekisho/attest/gate"
)

// TestThroughAProxy: the verifier's address leads nowhere from here but by the
// organisation's proxy. Its refusal is said; then the laptop enrols and attests
// through it.
func TestThroughAProxy(t *testing.T) {
	m := software(t, image.Boot())
	s := newSite(t, m.roots, time.Hour, image.Reference("sekisho", "1"))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	const public = "192.0.2.1:443"
	var open atomic.Bool
	go serveProxy(l, public, s.address, &open)
	s.address, s.proxy = public, l.Addr().(*net.TCPAddr).AddrPort()
	p := newLaptop(t, s, m, newState(t, s.ticket()))
	p.until(func(st gate.Status) bool {
		return st.State == gate.StateUnreachable && strings.Contains(st.Detail, "proxy "+s.proxy.String()+" refused the connection: http status 407")
	})
	open.Store(true)
	p.untilState(gate.StateAffirming)
}

// serveProxy is an HTTP proxy that lets through to one address alone.
func serveProxy(l net.Listener, public, real string, open *atomic.Bool) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			req, err := http.ReadRequest(bufio.NewReader(c))
			if err != nil || req.Method != http.MethodConnect || req.RequestURI != public || !open.Load() {
				io.WriteString(c, "HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
				return
			}
			to, err := net.DialTCP("tcp", nil, net.TCPAddrFromAddrPort(netip.MustParseAddrPort(real)))
			if err != nil {
				return
			}
			defer to.Close()
			io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n")
			go func() { io.Copy(c, to); c.Close() }()
			io.Copy(to, c)
		}()
	}
}
