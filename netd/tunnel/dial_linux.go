package tunnel

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"

	"sekisho/attest/proxy"
)

// DialTCP connects to an address over the path, by the HTTP proxy by if that is
// valid. Who dials has signs of life of its own: TCP keepalive is off.
func DialTCP(ctx context.Context, path Path, to, by netip.AddrPort) (*net.TCPConn, error) {
	dialer := net.Dialer{KeepAlive: -1, Control: path.control}
	first := to
	if by.IsValid() {
		first = by
	}
	if from := path.From(first.Addr()); from.IsValid() {
		dialer.LocalAddr = &net.TCPAddr{IP: from.AsSlice()}
	}
	c, err := proxy.Dial(ctx, &dialer, to, by)
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
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
