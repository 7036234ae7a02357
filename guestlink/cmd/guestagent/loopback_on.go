//go:build loopback

package main

import (
	"context"
	"net"
	"os"
	"strings"

	"sekisho/guestlink/packet"
)

// loopback connects to a host end on this machine, as in tcp:127.0.0.1:1024.
func loopback(name string) (dialer, bool) {
	address, ok := strings.CutPrefix(name, "tcp:")
	if !ok || !strings.HasPrefix(address, "127.0.0.1:") {
		return nil, false
	}
	return func(ctx context.Context) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", address)
	}, true
}

// testDevice returns the device "echo", which gives every packet back with its
// IPv4 addresses exchanged.
func testDevice(name string) (packet.PacketDevice, bool) {
	if name != "echo" {
		return nil, false
	}
	return &echo{packets: make(chan []byte, 64), closed: make(chan struct{})}, true
}

type echo struct {
	packets chan []byte
	closed  chan struct{}
}

func (e *echo) Read(b []byte) (int, error) {
	select {
	case p := <-e.packets:
		return copy(b, p), nil
	case <-e.closed:
		return 0, os.ErrClosed
	}
}

func (e *echo) Write(b []byte) (int, error) {
	p := append([]byte(nil), b...)
	if len(p) >= 20 && p[0]>>4 == 4 {
		copy(p[12:16], b[16:20])
		copy(p[16:20], b[12:16])
	}
	select {
	case e.packets <- p:
	default: // full, as a device would be
	}
	return len(b), nil
}

func (e *echo) Close() error {
	select {
	case <-e.closed:
	default:
		close(e.closed)
	}
	return nil
}
