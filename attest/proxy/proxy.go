// Package proxy reaches the organisation's servers by its HTTP proxy, where the
// network lets nothing else out: CONNECT (RFC 9110, section 9.3.6). The proxy
// learns where to, and nothing else; TLS with the server itself comes after.
package proxy

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"time"
)

// maxAnswer bounds a proxy's response header in bytes.
const maxAnswer = 8 << 10

// Error says that the proxy, and not the server, stands in the way.
type Error struct {
	Proxy  netip.AddrPort
	Status int   // HTTP status of its refusal, or 0
	Err    error // why there is none
}

func (e *Error) Error() string {
	if e.Status != 0 {
		return fmt.Sprintf("proxy %s refused the connection: http status %d %s", e.Proxy, e.Status, http.StatusText(e.Status))
	}
	return fmt.Sprintf("proxy %s: %v", e.Proxy, e.Err)
}

func (e *Error) Unwrap() error { return e.Err }

// Dialer connects to TCP addresses: net.Dialer.
type Dialer interface {
	DialContext(ctx context.Context, network, address string) (net.Conn, error)
}

// Dial connects to a server, by the proxy if that is valid. A proxy that does
// not let through is an *Error.
func Dial(ctx context.Context, d Dialer, to, proxy netip.AddrPort) (net.Conn, error) {
	if !proxy.IsValid() {
		return d.DialContext(ctx, "tcp", to.String())
	}
	c, err := d.DialContext(ctx, "tcp", proxy.String())
	if err != nil {
		return nil, err
	}
	if status, err := connect(ctx, c, to); err != nil || status/100 != 2 {
		c.Close()
		return nil, &Error{proxy, status, err}
	}
	return c, nil
}

// connect asks for a connection and returns the status of the answer.
func connect(ctx context.Context, c net.Conn, to netip.AddrPort) (int, error) {
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err := fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", to, to); err != nil {
		return 0, err
	}
	// The server says nothing before the laptop does, so nothing comes behind
	// the header: it is read byte by byte all the same, to leave the rest alone.
	head := make([]byte, 0, 512)
	for !bytes.HasSuffix(head, []byte("\r\n\r\n")) {
		if len(head) == maxAnswer {
			return 0, fmt.Errorf("answer over %d bytes", maxAnswer)
		}
		var b [1]byte
		if _, err := c.Read(b[:]); err != nil {
			return 0, fmt.Errorf("answer: %w", err)
		}
		head = append(head, b[0])
	}
	return status(head)
}

// status reads the status of a proxy's answer.
func status(head []byte) (int, error) {
	resp, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(head)), &http.Request{Method: http.MethodConnect})
	if err != nil {
		return 0, fmt.Errorf("answer: %w", err)
	}
	return resp.StatusCode, nil
}
