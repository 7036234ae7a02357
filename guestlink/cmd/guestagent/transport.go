package main

import (
	"context"
	"fmt"
	"net"

	"sekisho/guestlink"
	"sekisho/guestlink/serial"
	"sekisho/guestlink/vsock"
)

// dialer connects to the host domain.
type dialer func(context.Context) (net.Conn, error)

// transport returns the dialer of that name: "vsock", or "serial" where the
// organisation's policy gives the work domain a virtio-serial port instead.
func transport(name string) (dialer, error) {
	switch name {
	case "vsock":
		return func(ctx context.Context) (net.Conn, error) {
			return vsock.Dial(ctx, guestlink.HostCID, guestlink.PortPackets)
		}, nil
	case "serial":
		return serial.Dial, nil
	}
	if d, ok := loopback(name); ok {
		return d, nil
	}
	return nil, fmt.Errorf("transport %q: want vsock or serial", name)
}
