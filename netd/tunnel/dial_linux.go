package tunnel

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// maxProxyAnswer bounds a proxy's response header in bytes.
const maxProxyAnswer = 8 << 10

// ProxyError says that the HTTP proxy, and not the gateway, stands in the way.
type ProxyError struct {
	Proxy  netip.AddrPort
	Status int   // HTTP status of its refusal, or 0
	Err    error // why there is none
}

func (e *ProxyError) Error() string {
	if e.Status != 0 {
		return fmt.Sprintf("proxy %s refused the connection: http status %d %s", e.Proxy, e.Status, http.StatusText(e.Status))
	}
	return fmt.Sprintf("proxy %s: %v", e.Proxy, e.Err)
}

func (e *ProxyError) Unwrap() error { return e.Err }

// DialTCP connects to an address over the path, by the HTTP proxy if that is
// valid. Who dials has signs of life of its own: TCP keepalive is off.
func DialTCP(ctx context.Context, path Path, to, proxy netip.AddrPort) (*net.TCPConn, error) {
	dialer := net.Dialer{KeepAlive: -1, Control: path.control}
	if path.Source.IsValid() {
		dialer.LocalAddr = &net.TCPAddr{IP: path.Source.AsSlice()}
	}
	first := to
	if proxy.IsValid() {
		first = proxy
	}
	c, err := dialer.DialContext(ctx, "tcp", first.String())
	if err != nil {
		return nil, err
	}
	tcp := c.(*net.TCPConn)
	if proxy.IsValid() {
		status, err := connect(ctx, tcp, to)
		if err != nil || status/100 != 2 {
			tcp.Close()
			return nil, &ProxyError{proxy, status, err}
		}
	}
	return tcp, nil
}

// control binds a TCP socket to the path's link and has it announce, and keep
// to, segments that fit the path (tcp(7), TCP_MAXSEG): a way that swallows longer
// packets without a word is so none for it, in either direction.
func (p Path) control(network, address string, c syscall.RawConn) error {
	if bind := BindToLink(p.Link); bind != nil {
		if err := bind(network, address, c); err != nil {
			return err
		}
	}
	if p.MTU == 0 {
		return nil
	}
	headers := 40 // IPv4 and TCP without options
	if network == "tcp6" {
		headers = 60
	}
	var err error
	if cerr := c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_MAXSEG, p.MTU-headers)
	}); cerr != nil {
		return cerr
	}
	if err != nil {
		return fmt.Errorf("segments for an mtu of %d: %w", p.MTU, err)
	}
	return nil
}

// connect asks an HTTP proxy for a TCP connection (RFC 9110, section 9.3.6) and
// returns the status of its answer. The proxy learns where to, and nothing else.
func connect(ctx context.Context, c *net.TCPConn, to netip.AddrPort) (int, error) {
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err := fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", to, to); err != nil {
		return 0, err
	}
	// The server says nothing before the laptop does, so nothing comes behind
	// the header: it is read byte by byte all the same, to leave the rest alone.
	head := make([]byte, 0, 512)
	for !bytes.HasSuffix(head, []byte("\r\n\r\n")) {
		if len(head) == maxProxyAnswer {
			return 0, fmt.Errorf("answer over %d bytes", maxProxyAnswer)
		}
		var b [1]byte
		if _, err := c.Read(b[:]); err != nil {
			return 0, fmt.Errorf("answer: %w", err)
		}
		head = append(head, b[0])
	}
	resp, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(head)), &http.Request{Method: http.MethodConnect})
	if err != nil {
		return 0, fmt.Errorf("answer: %w", err)
	}
	return resp.StatusCode, nil
}
