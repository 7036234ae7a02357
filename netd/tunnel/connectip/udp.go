package connectip

import (
	"errors"
	"net"
	"os"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"
)

// away are the errors of a send on a network that is not there at the moment:
// link down or gone, no route, source address withdrawn, a rule against it, no
// buffer (send(2), ip(7)).
var away = []error{
	syscall.ENETDOWN, syscall.ENETUNREACH, syscall.EHOSTDOWN, syscall.EHOSTUNREACH, syscall.ENODEV, syscall.ENXIO,
	syscall.EADDRNOTAVAIL, syscall.EINVAL, syscall.EPERM, syscall.ENOBUFS,
}

// udpSocket is a UDP socket below QUIC. quic-go ends a connection whose packet
// could not be sent; here a network that is away for a moment has lost it, as
// below TCP, and signs of life judge.
type udpSocket struct{ *net.UDPConn }

// UDP returns the socket that both ends give to QUIC in the place of c.
func UDP(c net.PacketConn) net.PacketConn {
	if udp, ok := c.(*net.UDPConn); ok {
		return udpSocket{udp}
	}
	return c
}

// WriteMsgUDP implements quic.OOBCapablePacketConn.
func (s udpSocket) WriteMsgUDP(b, oob []byte, to *net.UDPAddr) (n, oobn int, err error) {
	n, oobn, err = s.UDPConn.WriteMsgUDP(b, oob, to)
	switch {
	case errors.Is(err, syscall.EINVAL) && segmented(oob):
		// Segments that are longer than the route's MTU (Linux, udp_send_skb). To
		// quic-go EIO means that segmentation is not to be had: it sends one by one.
		return 0, 0, os.NewSyscallError("sendmsg", syscall.EIO)
	case err != nil && slices.ContainsFunc(away, func(a error) bool { return errors.Is(err, a) }):
		return len(b), len(oob), nil
	}
	return n, oobn, err
}

// segmented reports whether the control messages ask for segmentation (udp(7),
// UDP_SEGMENT).
func segmented(oob []byte) bool {
	list, err := unix.ParseSocketControlMessage(oob)
	return err == nil && slices.ContainsFunc(list, func(m unix.SocketControlMessage) bool {
		return m.Header.Level == unix.IPPROTO_UDP && m.Header.Type == unix.UDP_SEGMENT
	})
}
