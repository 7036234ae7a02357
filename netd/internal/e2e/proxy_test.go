//go:build linux

package e2e

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sekisho/attest/gate"
	"sekisho/netd"
)

// TestThroughAProxy: a network that lets nobody out but by its HTTP proxy. What
// the proxy refuses is said in words; what it lets through carries the tunnel;
// nothing goes past it.
func TestThroughAProxy(t *testing.T) {
	w := newWorld(t)
	w.home.Run("nft", "add table inet wall; add chain inet wall out { type filter hook forward priority 0; policy accept; }; add rule inet wall out ip daddr 203.0.113.0/24 drop")
	w.organization.Proxy = netip.MustParseAddrPort("192.168.50.1:3128")
	p := &proxy{w: w}
	p.status.Store(http.StatusProxyAuthRequired)
	go p.serve(w.home.Listen(w.organization.Proxy.String()))
	w.verifierAt(time.Now().AddDate(0, 0, 1))
	w.startGateway()
	w.attestd.set(gate.StateAffirming, time.Hour)
	w.startNetd()

	s := w.waitState(40*time.Second, netd.Attesting, netd.ReasonProxy)
	if want := "proxy 192.168.50.1:3128 refused the connection: http status 407 Proxy Authentication Required"; !contains(s.Detail, want) {
		t.Errorf("detail %q, want %q", s.Detail, want)
	}
	if words := s.Say(); !contains(words.EN, "proxy") || !contains(words.JA, "プロキシ") {
		t.Errorf("in words: %+v", words)
	}
	p.status.Store(http.StatusOK)
	if s := w.waitState(60*time.Second, netd.Tunnel, ""); s.Tunnel.Carriage != "TLS on TCP" {
		t.Errorf("carried by %s", s.Tunnel.Carriage)
	}
	w.readPage(10 * time.Second)
	p.mu.Lock()
	for _, to := range p.asked {
		if to != gatewayAddr && to != verifierAddr {
			t.Errorf("the proxy was asked for %s", to)
		}
	}
	p.mu.Unlock()
	clockSeen(t, w) // the verifier signed the time through the proxy

	p.status.Store(http.StatusForbidden)
	p.drop()
	w.waitState(30*time.Second, netd.Attesting, netd.ReasonProxy)
	p.status.Store(http.StatusOK)
	w.readPage(60 * time.Second)
	w.judge()
}

// proxy is an HTTP proxy that knows CONNECT alone.
type proxy struct {
	w      *world
	status atomic.Int64 // what it answers; 200 lets through

	mu    sync.Mutex
	asked []string
	open  []net.Conn
}

func (p *proxy) serve(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go p.handle(c)
	}
}

func (p *proxy) handle(c net.Conn) {
	defer c.Close()
	req, err := http.ReadRequest(bufio.NewReader(c))
	if err != nil {
		return
	}
	status := int(p.status.Load())
	if req.Method != http.MethodConnect {
		status = http.StatusMethodNotAllowed
	}
	p.mu.Lock()
	p.asked = append(p.asked, req.RequestURI)
	p.open = append(p.open, c)
	p.mu.Unlock()
	if status != http.StatusOK {
		io.WriteString(c, fmt.Sprintf("HTTP/1.1 %d %s\r\n\r\n", status, http.StatusText(status)))
		return
	}
	to, err := dialFrom(p.w.home, "tcp", req.RequestURI)
	if err != nil {
		return
	}
	defer to.Close()
	io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n")
	go func() { io.Copy(c, to); c.Close() }()
	io.Copy(to, c)
}

// drop ends every connection.
func (p *proxy) drop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.open {
		c.Close()
	}
	p.open = nil
}
