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

// transport returns the dialer of that name: "vsock", "serial", or "auto", which
// takes the virtio-serial port where the organisation's policy gives the work
// domain one, and vsock otherwise.
func transport(name string) (dialer, error) {
	overVsock := func(ctx context.Context) (net.Conn, error) {
		return vsock.Dial(ctx, guestlink.HostCID, guestlink.PortPackets)
	}
	switch name {
	case "auto":
		return func(ctx context.Context) (net.Conn, error) {
			if serial.Present() {
				return serial.Dial(ctx)
			}
			return overVsock(ctx)
		}, nil
	case "vsock":
		return overVsock, nil
	case "serial":
		return serial.Dial, nil
	}
	if d, ok := loopback(name); ok {
		return d, nil
	}
	return nil, fmt.Errorf("transport %q: want auto, vsock or serial", name)
}
