package proxy

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// TestDial: what a proxy can answer, and that not one byte behind its answer is
// lost. The server's address leads nowhere: nothing but the proxy is called.
func TestDial(t *testing.T) {
	to := netip.MustParseAddrPort("192.0.2.1:443")
	for answer, want := range map[string]string{
		"HTTP/1.1 200 OK\r\n\r\nhello":                       "hello",
		"HTTP/1.1 200 OK\r\nVia: 1.1 p\r\n\r\nhello":         "hello",
		"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n": "http status 407",
		"HTTP/1.1 302 Found\r\nLocation: http://x/\r\n\r\n":  "http status 302",
		"SSH-2.0-x\r\n\r\n":                                  "malformed",
		"":                                                   "EOF",
		"HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", maxAnswer): "answer over",
	} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		asked := make(chan string, 1)
		go func() {
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer c.Close()
			b := make([]byte, 1024)
			n, _ := c.Read(b)
			asked <- string(b[:n])
			io.WriteString(c, answer)
		}()
		c, err := Dial(t.Context(), &net.Dialer{}, to, l.Addr().(*net.TCPAddr).AddrPort())
		switch {
		case err == nil:
			got, _ := io.ReadAll(c)
			c.Close()
			if string(got) != want {
				t.Errorf("%.40q: read %q", answer, got)
			}
		default:
			var e *Error
			if !errors.As(err, &e) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "proxy 127.0.0.1:") {
				t.Errorf("%.40q: %v, want %q", answer, err, want)
			}
		}
		if a := <-asked; !strings.HasPrefix(a, "CONNECT 192.0.2.1:443 HTTP/1.1\r\nHost: 192.0.2.1:443\r\n") {
			t.Errorf("asked %q", a)
		}
		l.Close()
	}
}

// TestSilent: a proxy that says nothing is left when the time is up.
func TestSilent(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	var e *Error
	if _, err := Dial(ctx, &net.Dialer{}, netip.MustParseAddrPort("192.0.2.1:443"), l.Addr().(*net.TCPAddr).AddrPort()); !errors.As(err, &e) || e.Status != 0 {
		t.Errorf("%v", err)
	}
}

func FuzzStatus(f *testing.F) {
	f.Add([]byte("HTTP/1.1 200 OK\r\n\r\n"))
	f.Fuzz(func(t *testing.T, head []byte) {
		if n, err := status(head); err == nil && (n < 0 || n > 999) {
			t.Errorf("status %d of %q", n, head)
		}
	})
}
