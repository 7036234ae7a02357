//go:build !loopback

package main

import "sekisho/guestlink/packet"

// loopback knows no transport: only programs built with the tag loopback, for
// tests, connect to anything but the host domain.
func loopback(string) (dialer, bool) { return nil, false }

func testDevice(string) (packet.PacketDevice, bool) { return nil, false }
